"""A fitted detector with its backbone as one file for other programs: ONNX, or ``torch.export`` (.pt2).

Both take preprocessed images ``pixels`` (B, 3, H, W) float32, B >= 1, of one size or of all sizes that the detector's
pictures may become (:class:`featdiff.export.sizes.Sizes`), and return ``ood_score`` (B,), higher = more OOD,
``p_value`` (B,) in (0, 1], and ``layer_scores`` (B, L), all float32. With a local score, ``part_scores`` (B, 2) are the
global and the local one, which ``ood_score`` joins. The metadata (:func:`facts`) holds the preprocessing, the threshold
and more; an image is OOD if ``ood_score > threshold``. :mod:`featdiff.export.verify` compares files with torch;
:class:`featdiff.ExportedDetector` scores pictures with an .onnx file, without torch.
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
from ..exported.layout import CALIBRATION, FILES, FORMAT_VERSION, INPUT, LAYER_SCORES, OUTPUTS, PART_SCORES
from ..features.networks import evaluating, logits_of
from ..files.atomic import write_atomically
from ..scores.diffusion import LikelihoodRegret
from ..scores.nearest import NearestNeighbors
from ..verdicts.calibration import Calibration
from .sizes import Sizes, fixed_padding, preprocessing_facts

if TYPE_CHECKING:
    from ..detectors import Detector
    from ..detectors.base import BaseDetector
    from ..features.extractor import FeatureExtractor
    from ..guard.guard import Guard
    from ..scores.fused import Heads
    from ..scores.joint import Joint

#: Name of the metadata inside a .pt2 file.
FACTS = "featdiff.json"
#: Largest accepted difference between a file's score and torch's, relative to max(1, |score|).
LIMIT = 1e-4


class Exportable(nn.Module):
    """Pixels -> score, p-value and more in tensor operations alone. Its parts are copied or left unchanged.

    Parameters
    ----------
    run : nn.Module
        Preprocessed images (B, 3, H, W) -> a tuple: features (B, D) for ``heads``, then further outputs of the file.
    heads : Heads
    calibration : Calibration
    further : sequence of str, default ()
        Names of the further outputs of ``run``, for example ``("logits",)``.
    joint : Joint, optional
        Joins the score of the heads with the local one, with which the features then end.
    """

    def __init__(
        self,
        run: nn.Module,
        heads: Heads,
        calibration: Calibration,
        further: Sequence[str] = (),
        joint: Joint | None = None,
    ) -> None:
        super().__init__()
        self.run = run
        parts = () if joint is None else (PART_SCORES,)
        self.outputs = (*OUTPUTS, *further, LAYER_SCORES, *parts)
        self.calibration = calibration
        self.heads = copy.deepcopy(heads).cpu()
        self.joint = joint
        if heads.head != LikelihoodRegret.name:
            self.heads.diffusion.early = None  # only likelihood regret needs it
        for score in self.heads.members:
            if isinstance(score, NearestNeighbors):
                score.search_coded()

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> the outputs, in the order of their names."""
        features, *further = self.run(pixels)
        score, layers = self.heads(features)
        parts = []
        if self.joint is not None:
            score, joined = self.joint(score, features[:, -1])
            parts = [joined]
        return score, self.calibration.p_values(score), *further, layers, *parts


class Rows(nn.Module):
    """An extractor as a module that owns the weights of its network: (B, 3, H, W) -> (features (B, D),)."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self.network = extractor.model
        self._extractor = extractor.in_torch()

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        return (self._extractor(pixels),)


class RowsAndLogits(Rows):
    """The same for a guarded classifier, in one pass: (B, C, H, W) -> (features (B, D), logits (B, classes))."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with evaluating(self.network), self._extractor.recording() as recorded:
            output = self.network(pixels.to(self._extractor.dtype))
        features = self._extractor.in_passing(recorded, output, pixels.shape[0])
        return features, logits_of(output)


def export(
    model: BaseDetector[Any] | Guard,
    folder: str | os.PathLike[str],
    formats: Sequence[str] = tuple(FILES),
    classes: Sequence[str] = (),
) -> dict[str, Path]:
    """Write a detector and its backbone as ``model.onnx`` and ``model.pt2``; existing files are replaced.

    The files of a guard also give ``logits`` (B, classes).

    Parameters
    ----------
    model : Detector or Guard
        Fitted, of the default mode, on the CPU.
    folder : str or path
        Created if missing.
    formats : sequence of str, default ("onnx", "pt2")
        Keys of :data:`FILES`.
    classes : sequence of str, default ()
        Class names of a guarded classifier, for the metadata.

    Returns
    -------
    dict of Path
        Files by format.

    Raises
    ------
    NotFittedError, UsageError
        A detector that cannot be exported, an unknown format, or a missing package.
    FeatdiffError
        An operation of the network cannot be exported, or only for images of one size where the detector takes
        several; the files cannot be written.
    """
    detector = check_exportable(model)
    if not formats:
        raise UsageError(f"name at least one format: {', '.join(FILES)}")
    for name in formats:
        if name not in FILES:
            raise UsageError(f"unknown format {name!r}{did_you_mean(name, list(FILES))}; known: {', '.join(FILES)}")
    if "onnx" in formats:
        need("onnx", "onnxscript")

    run: nn.Module = Rows(detector.extractor_)
    further: tuple[str, ...] = ()
    if model is not detector:  # a guard
        run = RowsAndLogits(detector.extractor_)
        further = ("logits",)
    joint = detector.local_.joint if detector.local_ else None
    exportable = Exportable(run, detector.heads_, detector.calibration_, further, joint)
    metadata = facts(model) | {"classes": list(classes)}
    return write(exportable, metadata, Sizes.of(detector.extractor_.backbone), folder, formats)


def detector_of(model: BaseDetector[Any] | Guard) -> BaseDetector[Any]:
    """The detector of a guard, or the detector itself."""
    return model.detector if isinstance(model, nn.Module) else model


def check_exportable(model: BaseDetector[Any] | Guard) -> Detector:
    """Refuse what is not fitted, of the pixel mode, or not on the CPU (``NotFittedError``, ``UsageError``)."""
    detector = detector_of(model)
    if detector.mode == "joined":
        raise UsageError("a model of several encoders cannot be exported yet: train one on a single backbone")
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
    """Raise ``UsageError`` unless these packages, of the extra ``onnx``, can be imported."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            remedy = "pip install 'featdiff[onnx]', or choose the format pt2"
            message = f"{name} is not installed, and ONNX files need it: {remedy}"
            raise UsageError(message, argument="formats") from None


def facts(model: BaseDetector[Any] | Guard) -> dict[str, Any]:
    """The metadata of a file; in ONNX each value is JSON, in .pt2 all are one JSON object (``FACTS``).

    ``preprocessing`` holds timm's names (``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``), or a hash
    that identifies a user transform. With the crop mode ``rectangle``, its entry ``rectangle`` says how the size for a
    picture is chosen (:func:`featdiff.data.preprocessing.rectangle`), to which the picture is then resized. ``sizes``
    says which heights and widths the file takes, ``input_size`` what a square picture becomes. ``classes`` is empty
    here: :func:`export` fills in those of a classifier. ``layer_scores`` and ``part_scores`` name the columns of these
    outputs, and ``calibration`` holds the scores of the held-out images, for p-values at full precision and any
    ``fpr``.
    """
    from importlib.metadata import version

    detector = check_exportable(model)
    fpr = model.fpr
    backbone = detector.extractor_.backbone
    sizes = Sizes.of(backbone)
    parts = detector.local_.calibrations if detector.local_ else {}
    held_out = {OUTPUTS[0]: detector.calibration_} | {name: parts[name] for name in detector.parts}
    metadata = {
        "featdiff_version": version("featdiff"),
        "format_version": FORMAT_VERSION,
        "threshold": detector.calibration_.threshold(fpr),
        "fpr": fpr,
        "calibration_images": len(detector.calibration_),
        "calibration_groups": detector.calibration_.groups,
        "classes": [],
        "input_size": [sizes.channels, sizes.height, sizes.width],
        "sizes": sizes.to_json(),
        "preprocessing": preprocessing_facts(backbone),
        "backbone": backbone.tag,
        "backbone_fingerprint": backbone.fingerprint,
        "layers": detector.extractor_.layers,
        "head": detector.settings.head,
        "maps": list(detector.extractor_.maps) if detector.local_ else [],
        LAYER_SCORES: detector.layers,
        PART_SCORES: list(detector.parts),
        CALIBRATION: {name: calibration.scores.tolist() for name, calibration in held_out.items()},
    }
    return dict(json.loads(json.dumps(metadata)))  # tuples become lists, as in the files


def write(
    exportable: Exportable,
    metadata: Mapping[str, Any],
    sizes: Sizes,
    folder: str | os.PathLike[str],
    formats: Sequence[str],
) -> dict[str, Path]:
    """Trace ``exportable`` once and write it in each format, with its metadata; see :func:`export`."""
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)  # before the long work
    except OSError as error:
        raise _unwritable(target, error) from None

    with torch.inference_mode():
        exportable(sizes.example())  # a network that fails in torch, too, raises its own error
    contents = _export_bytes(exportable, metadata, sizes, formats)

    files = {name: target / FILES[name] for name in contents}
    try:
        for name, file in files.items():
            write_atomically(file, contents[name])
    except OSError as error:
        raise _unwritable(target, error) from None
    return files


def _export_bytes(
    exportable: Exportable, metadata: Mapping[str, Any], sizes: Sizes, formats: Sequence[str]
) -> dict[str, bytes]:
    """Contents of the files by format."""
    exporters = {"onnx": _onnx_bytes, "pt2": _pt2_bytes}
    contents: dict[str, bytes] = {}
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # exporters warn of their own internals
            program = _trace(exportable, sizes)
            for name in formats:
                contents[name] = exporters[name](program, metadata, exportable.outputs)
    except Exception as error:  # exporters raise many errors; the root cause is the most telling
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        problem = f"{metadata['backbone']} cannot be exported: {first_line(error)[:300]}"
        if sizes.area:
            problem += ". It may be possible for images of one size: train with view='squash' or view='crop'"
        raise FeatdiffError(problem) from None
    return contents


def _unwritable(folder: Path, error: OSError) -> FeatdiffError:
    return FeatdiffError(f"{folder} cannot be written: {error.strerror or error}")


def _trace(exportable: Exportable, sizes: Sizes) -> torch.export.ExportedProgram:
    pixels = sizes.example()
    if sizes.area:
        with fixed_padding(exportable.run):
            program = torch.export.export(exportable, (pixels,), dynamic_shapes=sizes.dynamic_shapes())
        _check_sizes(program, exportable, sizes)
    else:
        program = torch.export.export(exportable, (pixels,), dynamic_shapes=sizes.dynamic_shapes())

    # what a file need not hold: two images, and paths of this machine
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)

    return program


def _check_sizes(program: torch.export.ExportedProgram, exportable: Exportable, sizes: Sizes) -> None:
    """Refuse a program that does not give the same scores for images of other sizes (``ValueError``)."""
    run = program.module()
    for pixels in sizes.others():
        shape = f"{pixels.shape[2]} x {pixels.shape[3]} pixels"
        expected = exportable(pixels)[0]
        try:
            score = run(pixels)[0]
        except Exception:  # messages of failed guards fill pages
            raise ValueError(f"what was traced does not take images of {shape}") from None
        if not torch.allclose(score, expected, rtol=LIMIT, atol=LIMIT):
            raise ValueError(f"what was traced gives other scores for images of {shape}")


def _onnx_bytes(program: torch.export.ExportedProgram, metadata: Mapping[str, Any], outputs: Sequence[str]) -> bytes:
    exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[INPUT], output_names=list(outputs))
    assert exported is not None
    proto = exported.model_proto

    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info):
        del part.metadata_props[:]  # notes on how it was traced, larger than the graph
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    if proto.ByteSize() >= 2 << 30:
        raise ValueError("one ONNX file cannot hold more than 2 GB: choose the format pt2")
    return bytes(proto.SerializeToString())


def _pt2_bytes(program: torch.export.ExportedProgram, metadata: Mapping[str, Any], outputs: Sequence[str]) -> bytes:
    stream = io.BytesIO()
    with_outputs = {**metadata, "outputs": list(outputs)}  # the program returns a tuple without names
    torch.export.save(program, stream, extra_files={FACTS: json.dumps(with_outputs)})
    return stream.getvalue()
