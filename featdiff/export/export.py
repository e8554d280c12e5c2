"""A fitted detector with its backbone as one file for other programs: ONNX, or ``torch.export`` (.pt2).

Either takes preprocessed images ``pixels`` (B, 3, H, W) float32, B from 1 up, and gives ``ood_score`` (B,), higher =
more OOD, and ``p_value`` (B,) in (0, 1], both float32. How to preprocess, the threshold and more stands in the metadata
(:func:`facts`); an image is OOD if ``ood_score > threshold``. :mod:`featdiff.export.verify` compares files with torch.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..exceptions import FeatdiffError, UsageError, did_you_mean, first_line
from ..features.networks import evaluating, logits_of
from ..files.atomic import write_atomically
from ..scores.diffusion import LikelihoodRegret
from ..scores.nearest import NearestNeighbors
from ..verdicts.calibration import Calibration

if TYPE_CHECKING:
    from ..detectors import Detector
    from ..detectors.base import BaseDetector
    from ..features.extractor import FeatureExtractor
    from ..guard.guard import Guard
    from ..scores.fused import Heads

#: Kinds of files, and what they are called.
FILES = {"onnx": "model.onnx", "pt2": "model.pt2"}
#: What a .pt2 file calls its metadata.
FACTS = "featdiff.json"
INPUT, OUTPUTS = "pixels", ("ood_score", "p_value")


class Exportable(nn.Module):
    """Pixels -> score and p-value in tensor operations alone. Nothing that it is made of is changed.

    Parameters
    ----------
    run : nn.Module
        Preprocessed images (B, 3, H, W) -> a tuple: rows (B, D) for ``heads``, and then what else the file shall give.
    heads : Heads
    calibration : Calibration
    further : sequence of str
        Names of what else ``run`` gives, for example ``("logits",)``.
    """

    def __init__(self, run: nn.Module, heads: Heads, calibration: Calibration, further: Sequence[str] = ()) -> None:
        super().__init__()
        self.run = run
        self.outputs = (*OUTPUTS, *further)
        self.calibration = calibration
        self.heads = copy.deepcopy(heads).cpu()
        if heads.head != LikelihoodRegret.name:
            self.heads.diffusion.early = nn.Identity()  # only likelihood regret looks at it
        for score in self.heads.members:
            if isinstance(score, NearestNeighbors):
                score.search_coded()

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> scores (B,), p-values (B,), and the rest."""
        rows, *further = self.run(pixels)
        score, _ = self.heads(rows)
        return score, self.calibration.p_values(score), *further


class Rows(nn.Module):
    """An extractor as a module, so that the weights of its network are found: (B, 3, H, W) -> (rows (B, D),)."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self.network, self._extractor = extractor.model, extractor

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        return (self._extractor(pixels),)


class RowsAndLogits(Rows):
    """The same for a guarded classifier, in one pass: (B, C, H, W) -> (rows (B, D), logits (B, classes))."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with evaluating(self.network), self._extractor.recording() as found:
            output = self.network(pixels.to(self._extractor.dtype))
        return self._extractor.in_passing(found, output, pixels.shape[0]), logits_of(output)


def export(
    model: BaseDetector[Any] | Guard,
    folder: str | os.PathLike[str],
    formats: Sequence[str] = tuple(FILES),
    classes: Sequence[str] = (),
) -> dict[str, Path]:
    """Write a detector and its backbone as ``model.onnx`` and ``model.pt2``; older ones are replaced.

    The files of a guard give ``logits`` (B, classes) as a third output.

    Parameters
    ----------
    model : fitted, of the default mode, on the CPU
    folder : made when missing
    formats : which of ``FILES``
    classes : names of a guarded classifier's classes, for the metadata

    Returns
    -------
    Files by format.

    Raises
    ------
    NotFittedError, UsageError
        A detector that cannot be exported, an unknown format, or a package is missing.
    FeatdiffError
        The network does something that cannot be exported, or the files cannot be written.
    """
    detector, guarded = check_exportable(model), model is not detector_of(model)
    if not formats:
        raise UsageError(f"name at least one format: {', '.join(FILES)}")
    for name in formats:
        if name not in FILES:
            raise UsageError(f"unknown format {name!r}{did_you_mean(name, list(FILES))}; known: {', '.join(FILES)}")
    if "onnx" in formats:
        need("onnx", "onnxscript")
    run = (RowsAndLogits if guarded else Rows)(detector.extractor_)
    further = ("logits",) if guarded else ()
    exportable = Exportable(run, detector.heads_, detector.calibration_, further)
    return write(exportable, facts(model) | {"classes": list(classes)}, folder, formats)


def detector_of(model: BaseDetector[Any] | Guard) -> BaseDetector[Any]:
    """The detector of a guard, or the detector itself."""
    return model.detector if isinstance(model, nn.Module) else model


def check_exportable(model: BaseDetector[Any] | Guard) -> Detector:
    """Refuse what is not fitted, of the pixel mode, or not on the CPU (``NotFittedError``, ``UsageError``)."""
    detector = detector_of(model)
    if detector.mode != "feature":
        raise UsageError(
            "only detectors of the default mode can be exported: the pixel mode draws its noise from each image's "
            "bytes, which no such file can do"
        )
    detector.check_fitted()
    detector = cast("Detector", detector)
    device = detector.extractor_.device
    if device.type != "cpu":
        raise UsageError(f"this detector is on {device}, and files are made on the CPU: load it with device='cpu'")
    return detector


def need(*packages: str) -> None:
    """Raise ``UsageError`` unless these packages of the extra ``onnx`` can be imported."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UsageError(
                f"{name} is not installed, and ONNX files need it: pip install 'featdiff[onnx]', or use --format pt2"
            ) from None


def facts(model: BaseDetector[Any] | Guard) -> dict[str, Any]:
    """What the metadata of a file says; in ONNX every value is JSON, in .pt2 all are one JSON object (``FACTS``).

    ``preprocessing`` holds timm's names (``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``), or a hash
    of what a transform of your own does. ``classes`` is empty: a detector alone classifies nothing, see :func:`export`.
    """
    from importlib.metadata import version

    detector = check_exportable(model)
    fpr = model.fpr  # a guard has one of its own
    backbone = detector.extractor_.backbone
    preprocessing = {key: value for key, value in backbone.data_config.items() if key != "input_size"}
    found = {
        "featdiff_version": version("featdiff"),
        "threshold": detector.calibration_.threshold(fpr),
        "fpr": fpr,
        "calibration_images": len(detector.calibration_),
        "classes": [],
        "input_size": backbone.data_config["input_size"],
        "preprocessing": preprocessing,
        "backbone": backbone.tag,
        "backbone_fingerprint": backbone.fingerprint,
        "layers": detector.extractor_.layers,
        "head": detector.settings.head,
    }
    return dict(json.loads(json.dumps(found)))  # tuples become lists, as they will be in the files


def write(
    exportable: Exportable, known: Mapping[str, Any], folder: str | os.PathLike[str], formats: Sequence[str]
) -> dict[str, Path]:
    """Trace ``exportable`` once and write it in each format, with the metadata ``known``; see :func:`export`."""
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)  # what cannot be written is better known before the long work
    except OSError as error:
        raise _unwritable(target, error) from None
    with torch.inference_mode():
        exportable(_example(known))  # what torch refuses, too, is said in its own words
    make = {"onnx": _onnx_bytes, "pt2": _pt2_bytes}
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # the exporters warn of their own ways
            program = _trace(exportable, _example(known))
            found = {name: make[name](program, known, exportable.outputs) for name in formats}
    except Exception as error:  # exporters fail in many ways on what they do not know; the first cause says most
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        raise FeatdiffError(f"{known['backbone']} cannot be exported: {first_line(error)}") from None
    files = {name: target / FILES[name] for name in found}
    try:
        for name, file in files.items():
            write_atomically(file, found[name])
    except OSError as error:
        raise _unwritable(target, error) from None
    return files


def _unwritable(folder: Path, error: OSError) -> FeatdiffError:
    return FeatdiffError(f"{folder} cannot be written: {error.strerror or error}")


def _example(known: Mapping[str, Any]) -> Tensor:
    return torch.zeros(2, *known["input_size"])  # one image alone would fix the batch size


def _trace(exportable: Exportable, pixels: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(exportable, (pixels,), dynamic_shapes=({0: batch},))
    program.example_inputs = None  # as large as two images
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _onnx_bytes(program: torch.export.ExportedProgram, known: Mapping[str, Any], outputs: Sequence[str]) -> bytes:
    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[INPUT], output_names=list(outputs))
    assert made is not None
    proto = made.model_proto
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info):
        del part.metadata_props[:]  # notes on how it was traced, larger than the graph
    for key, value in known.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    if proto.ByteSize() >= 2 << 30:
        raise ValueError("one ONNX file cannot hold more than 2 GB: use --format pt2")
    return bytes(proto.SerializeToString())


def _pt2_bytes(program: torch.export.ExportedProgram, known: Mapping[str, Any], outputs: Sequence[str]) -> bytes:
    stream = io.BytesIO()
    named = dict(known) | {"outputs": list(outputs)}  # they come as a tuple
    torch.export.save(program, stream, extra_files={FACTS: json.dumps(named)})
    return stream.getvalue()
