"""Compares the scores and verdicts of exported files with those of the detector, on real images."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..exceptions import ModelError, UsageError, first_line
from ..exported.layout import INPUT, OUTPUTS, check_shape
from ..runtime.progress import Progress
from .export import FACTS, LIMIT, check_exportable, facts, need

if TYPE_CHECKING:
    from ..detectors import Detector
    from ..detectors.base import BaseDetector
    from ..guard.guard import Guard

Run = Callable[[Tensor], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Agreement:
    """How a file compares with the detector it was exported from.

    Attributes
    ----------
    file : Path
    images : int
        Number of images compared.
    difference : float
        Largest |file - torch| / max(1, |torch|) among scores.
    verdicts : int
        Number of verdicts that differ from torch's.
    p_values : int
        Number of p-values that do not match the file's own scores.
    speed : float
        Images per second of the file. Speeds are measured alternately on the same batches with the same threads,
        without the first batch.
    torch_speed : float
        Images per second of torch.
    """

    file: Path
    images: int
    difference: float
    verdicts: int
    p_values: int
    speed: float
    torch_speed: float

    @property
    def problem(self) -> str:
        """What is wrong, in one line; empty if the file can be trusted."""
        if self.difference <= LIMIT and not self.verdicts and not self.p_values:
            return ""
        return (
            f"{self.file} disagrees with torch, do not use it: of {self.images:,} images, scores differ by up to "
            f"{self.difference:.1e} x max(1, |score|) (allowed {LIMIT:g}), {self.verdicts:,} verdicts and "
            f"{self.p_values:,} p-values are wrong"
        )


def verify(
    model: BaseDetector[Any] | Guard,
    files: Sequence[str | os.PathLike[str]],
    images: object,
    progress: Progress | None = None,
    unreadable: dict[str, str] | None = None,
) -> list[Agreement]:
    """Score images with torch and with exported files.

    Parameters
    ----------
    model : Detector or Guard
        The exported one, on the CPU.
    files : sequence of paths
        .onnx and .pt2 files.
    images : images
        As for :meth:`Detector.score`.
    progress : callable (stage, done, total), optional
    unreadable : dict, optional
        Filled with {path: reason} of images that could not be compared.

    Returns
    -------
    list of Agreement
        One for each file.

    Raises
    ------
    ModelError
        A file is missing or damaged, says that it was exported from another detector, or does not take these images.
    UsageError
        None of the images can be read, or ONNX Runtime is missing.
    """
    detector = check_exportable(model)
    unreadable = {} if unreadable is None else unreadable
    metadata = facts(model)
    torch_scorer = _Scorer(_torch(detector))
    file_scorers: list[tuple[Path, _Scorer]] = []
    for file in files:
        path = Path(file)
        file_scorers.append((path, _Scorer(_open(path, metadata))))

    for pixels in _readable(detector, images, progress, unreadable):
        torch_scorer.take(pixels)
        for _, scorer in file_scorers:
            scorer.take(pixels)
    if not torch_scorer.sizes:
        raise UsageError("none of the images to compare on could be read")

    return [_compare(path, scorer, torch_scorer, detector, model.fpr) for path, scorer in file_scorers]


class _Scorer:
    """A function that scores batches, its outputs for each batch, and the time they took."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._outputs: list[Sequence[np.ndarray]] = []
        self._seconds: list[float] = []
        self.sizes: list[int] = []

    def take(self, pixels: Tensor) -> None:
        """Score a batch (B, 3, H, W), and time it."""
        start = time.perf_counter()
        self._outputs.append(self._run(pixels))
        self._seconds.append(time.perf_counter() - start)
        self.sizes.append(len(pixels))

    @property
    def outputs(self) -> list[np.ndarray]:
        """Scores (N,) and p-values (N,) of all batches, in float64."""
        return [np.concatenate(column).astype(np.float64) for column in zip(*self._outputs, strict=True)]

    @property
    def speed(self) -> float:
        """Images per second, without the first batch (a warm-up) if there are more."""
        first = min(1, len(self.sizes) - 1)
        return sum(self.sizes[first:]) / sum(self._seconds[first:])


def _compare(file: Path, scorer: _Scorer, torch_scorer: _Scorer, detector: Detector, fpr: float) -> Agreement:
    scores, p_values = scorer.outputs
    expected, _ = torch_scorer.outputs
    difference = np.abs(scores - expected) / np.maximum(1, np.abs(expected))

    calibration = detector.calibration_
    verdicts = scores > calibration.threshold(fpr)
    _, expected_verdicts = calibration.flags(expected, fpr)
    wrong_p_values = ~np.isclose(p_values, calibration.p_values(scores), rtol=1e-5, atol=0)

    return Agreement(
        file=file,
        images=len(scores),
        difference=float(difference.max()),
        verdicts=int((verdicts != expected_verdicts).sum()),
        p_values=int(wrong_p_values.sum()),
        speed=scorer.speed,
        torch_speed=torch_scorer.speed,
    )


def _readable(
    detector: Detector, images: object, progress: Progress | None, unreadable: dict[str, str]
) -> Iterator[Tensor]:
    """Batches (B, 3, H, W) of images that can be scored; the others go to ``unreadable``."""
    batches, total = detector.batches(images)
    done = 0
    for batch in batches:
        for item in batch.loaded:
            if item.reason:
                unreadable[item.ref.path] = item.reason

        for stack in batch.stacks:
            finite = stack.pixels.isfinite().flatten(1).all(1)
            for i, is_finite in zip(stack.positions, finite, strict=True):
                if not is_finite:
                    unreadable[batch.loaded[i].ref.path] = "NaN or infinite values"
            if finite.any():
                yield stack.pixels[finite]

        done += len(batch.loaded)
        if progress:
            progress("verifying", done, max(total, done))


def _torch(detector: Detector) -> Run:
    """The detector itself as a function."""

    def run(pixels: Tensor) -> Sequence[np.ndarray]:
        scores = detector.score_features(detector.extractor_(pixels))
        return scores, detector.calibration_.p_values(scores)

    return run


def _open(file: Path, expected: Mapping[str, Any]) -> Run:
    """An exported file as a function, once its metadata is checked."""
    if file.suffix not in (".onnx", ".pt2"):
        raise UsageError(f"{file} is neither an .onnx nor a .pt2 file")
    if not file.is_file():
        raise ModelError(f"no file at {file}")
    open_file = _open_pt2
    if file.suffix == ".onnx":
        need("onnxruntime")
        open_file = _open_onnx
    try:
        run, metadata = open_file(file)
    except Exception as error:  # both libraries raise nearly anything on a damaged file
        raise ModelError(f"{file} cannot be loaded: {first_line(error)}") from None
    _check_metadata(file, metadata, expected)

    def checked(pixels: Tensor) -> Sequence[np.ndarray]:
        check_shape(pixels.shape, metadata["sizes"], file)
        try:
            return run(pixels)
        except Exception as error:
            raise ModelError(f"{file} fails on a batch {tuple(pixels.shape)}: {first_line(error)}") from None

    return checked


def _check_metadata(file: Path, metadata: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a file that was exported from another detector (``ModelError``)."""
    for key, value in expected.items():
        if key in ("featdiff_version", "classes") or metadata.get(key) == value:
            continue
        actual = json.dumps(metadata.get(key))[:60]
        wanted = json.dumps(value)[:60]
        raise ModelError(f"{file} was not exported from this detector: its {key} is {actual}, not {wanted}")


def _open_onnx(file: Path) -> tuple[Run, dict[str, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors are raised anyway
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    texts = session.get_modelmeta().custom_metadata_map
    metadata = {key: json.loads(text) for key, text in texts.items()}

    def run(pixels: Tensor) -> Sequence[np.ndarray]:
        outputs: Sequence[np.ndarray] = session.run(list(OUTPUTS), {INPUT: pixels.numpy()})
        return outputs

    return run, metadata


def _open_pt2(file: Path) -> tuple[Run, dict[str, Any]]:
    extra = {FACTS: ""}
    program = torch.export.load(io.BytesIO(file.read_bytes()), extra_files=extra).module()

    @torch.inference_mode()
    def run(pixels: Tensor) -> Sequence[np.ndarray]:
        return [output.numpy() for output in program(pixels)[: len(OUTPUTS)]]

    return run, json.loads(extra[FACTS])
