"""A backbone's pass, traced once -> files of another engine -> a running engine.

Tracing and converting take most of the time, so the files can be kept; to start from them takes about a second.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..files.atomic import filling
from ..files.sealed import checksum, read_sealed, write_sealed
from ..runtime.sessions import OpenVinoPasses, onnxruntime_session

#: What another engine may run; ``auto`` chooses among those that are installed, and ``torch`` is PyTorch as it is.
OPENVINO = "openvino"
ONNXRUNTIME = "onnxruntime"
COMPILE = "compile"
# The file that holds the checksums of the others.
_SEAL = "seal"

#: Preprocessed images (B, C, H, W) -> vectors and maps, in a fixed order.
Run = Callable[[Tensor], Sequence[Tensor]]


class _Conversion(NamedTuple):
    """How an engine comes to a pass: files from a traced pass and an example, and what runs from these files."""

    write: Callable[[nn.Module, Tensor, Path], None]
    start: Callable[[Path, bool], Run]


def running(name: str, traced: nn.Module, example: Tensor, bfloat16: bool, folder: Path | None) -> Run:
    """Start an engine on a pass.

    Parameters
    ----------
    name : {"openvino", "onnxruntime"}
    traced : nn.Module
        Preprocessed images (B, C, H, W) -> a tuple of vectors and maps.
    example : Tensor of shape (B, C, H, W)
        To trace it with.
    bfloat16 : bool
        Whether to compute in bfloat16; see :func:`has_bfloat16`.
    folder : Path, optional
        Where the engine's files of this very pass are, or will be kept; those that were damaged are written anew.

    Returns
    -------
    callable
        Images (B, C, H, W) in float32 -> vectors and maps, in the order of the pass.

    Raises
    ------
    Exception
        Of many kinds: the pass cannot be traced or converted.
    """
    write, start = _CONVERSIONS[name]
    if folder is None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
            _write(write, traced, example, Path(place))
            return start(Path(place), bfloat16)

    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        with filling(folder) as place:
            _write(write, traced, example, place)
    return start(folder, bfloat16)


def _write(write: Callable[[nn.Module, Tensor, Path], None], traced: nn.Module, example: Tensor, folder: Path) -> None:
    """Write an engine's files, and then their checksums."""
    example = example if len(example) > 1 else example.repeat(2, 1, 1, 1)  # tracers take 1 for a constant
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracers warn of sizes, which are compared later
        write(traced, example, folder)
    write_sealed(folder / _SEAL, _checksums(folder))


def _is_whole(folder: Path) -> bool:
    """Whether the files in a folder are those that were written."""
    try:
        return read_sealed(folder / _SEAL) == _checksums(folder)
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> bytes:
    files = sorted(file for file in folder.iterdir() if file.name != _SEAL)
    return b"".join(checksum(file.read_bytes(), file.name) for file in files)


def has_bfloat16(name: str) -> bool:
    """Whether an engine computes in bfloat16 on this machine."""
    if name != OPENVINO:
        return name == COMPILE
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _write_openvino(traced: nn.Module, example: Tensor, folder: Path) -> None:
    import openvino

    script = torch.jit.trace(traced, example, check_trace=False)
    model = openvino.convert_model(script, example_input=example, input=[-1, example.shape[1], -1, -1])
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def _start_openvino(folder: Path, bfloat16: bool) -> Run:
    passes = OpenVinoPasses(folder / "model.xml", torch.get_num_threads(), bfloat16)

    def run(pixels: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(values) for values in passes(pixels.numpy())]

    return run


def _write_onnx(traced: nn.Module, example: Tensor, folder: Path) -> None:
    free = {"pixels": {0: "images", 2: "height", 3: "width"}}
    # the other exporter takes a minute for a network, and needs sizes that it can prove
    torch.onnx.export(
        traced, (example,), folder / "model.onnx", dynamo=False, input_names=["pixels"], dynamic_axes=free
    )


def _start_onnxruntime(folder: Path, bfloat16: bool) -> Run:
    session = onnxruntime_session(folder / "model.onnx", torch.get_num_threads())

    def run(pixels: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(values) for values in session.run(None, {"pixels": pixels.numpy()})]

    return run


_CONVERSIONS: Mapping[str, _Conversion] = {
    OPENVINO: _Conversion(_write_openvino, _start_openvino),
    ONNXRUNTIME: _Conversion(_write_onnx, _start_onnxruntime),
}
