"""An exported ONNX file -> a model repository that NVIDIA Triton serves as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..exceptions import FeatdiffError
from ..files.atomic import write_together

#: File names in the folder of a model.
CONFIG = "config.pbtxt"
FILE = "1/model.onnx"
# ONNX's names of types -> Triton's, where they differ.
_TYPES = {"FLOAT": "FP32", "FLOAT16": "FP16", "DOUBLE": "FP64"}
# Microseconds that Triton waits for a batch to fill, as featdiff serve does.
_WAIT = 5000


def write_repository(file: Path, folder: Path, name: str, max_batch: int = 32) -> Path:
    """Write ``<folder>/<name>/config.pbtxt`` and ``<folder>/<name>/1/model.onnx``.

    Parameters
    ----------
    file : Path
        An .onnx file that :func:`featdiff.export.export.export` has written.
    folder : Path
        A model repository; other models in it stay.
    name : str
        Of the model.
    max_batch : int, default 32
        Images of one pass.

    Returns
    -------
    Path
        The folder of the model.

    Raises
    ------
    FeatdiffError
        It cannot be written.
    """
    place = folder / name
    try:
        (place / FILE).parent.mkdir(parents=True, exist_ok=True)
        contents = {place / FILE: file.read_bytes(), place / CONFIG: config(file, name, max_batch).encode()}
        write_together(contents)
    except OSError as error:
        raise FeatdiffError(f"{place} cannot be written: {error.strerror or error}") from None
    return place


def config(file: Path, name: str, max_batch: int) -> str:
    """The text of ``config.pbtxt``: inputs and outputs of an .onnx file without the batch, and dynamic batching."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    return "\n".join(
        [
            f'name: "{name}"',
            'platform: "onnxruntime_onnx"',
            f"max_batch_size: {max_batch}",
            *(_tensor("input", tensor) for tensor in graph.input),
            *(_tensor("output", tensor) for tensor in graph.output),
            f"dynamic_batching {{ max_queue_delay_microseconds: {_WAIT} }}",
            "",
        ]
    )


def _tensor(kind: str, tensor: Any) -> str:
    """An input or an output; sides that vary are -1, and one number an image is a vector of one for Triton."""
    import onnx

    shape = tensor.type.tensor_type.shape.dim[1:]
    sides = ", ".join(str(side.dim_value or -1) for side in shape)
    name = onnx.TensorProto.DataType.Name(tensor.type.tensor_type.elem_type)
    dims = f"dims: [ {sides} ]" if sides else "dims: [ 1 ] reshape { shape: [ ] }"
    return f'{kind} {{ name: "{tensor.name}" data_type: TYPE_{_TYPES.get(name, name)} {dims} }}'
