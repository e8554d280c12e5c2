"""Whether an exported file gives the scores and verdicts that the detector gives, on real images."""

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
from ..runtime.progress import Progress
from .export import FACTS, INPUT, OUTPUTS, check_exportable, facts, need

if TYPE_CHECKING:
    from ..detectors import Detector
    from ..detectors.base import BaseDetector
    from ..guard.guard import Guard

#: Scores of a file may be this far from torch's, in shares of their size or of 1, whichever is more.
LIMIT = 1e-4

Run = Callable[[Tensor], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Agreement:
    """How a file compares with the detector it was exported from.

    ``difference`` is the largest |file - torch| / max(1, |torch|) among scores, ``verdicts`` counts verdicts that are
    not torch's, ``p_values`` those that do not belong to the file's own scores; speeds are in images/s, taken in turns
    on the same batches with the same threads, without the first batch.
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
    model : detector or guard that was exported
    files : .onnx and .pt2
    images : as for :meth:`Detector.score`
    unreadable : dict, optional
        Filled with the paths of images that could not be compared, and why.

    Raises
    ------
    ModelError
        A file is missing or damaged, says that it was exported from another detector, or does not take these images.
    UsageError
        None of the images can be read, or ONNX Runtime is missing.
    """
    detector = check_exportable(model)
    known = facts(model)
    paths = [Path(file) for file in files]
    ways = [_Way(_torch(detector)), *(_Way(_open(path, known)) for path in paths)]
    for pixels in _readable(detector, images, progress, {} if unreadable is None else unreadable):
        for way in ways:
            way.take(pixels)
    if not ways[0].sizes:
        raise UsageError("none of the images to compare on could be read")
    own, *others = ways
    return [_compare(path, way, own, detector, model.fpr) for path, way in zip(paths, others, strict=True)]


class _Way:
    """One way to score: what it gave for each batch, and in how many seconds."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._outputs: list[Sequence[np.ndarray]] = []
        self._seconds: list[float] = []
        self.sizes: list[int] = []

    def take(self, pixels: Tensor) -> None:
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
        """Images/s; the first batch finds everything cold and does not count, if there are more."""
        first = min(1, len(self.sizes) - 1)
        return sum(self.sizes[first:]) / sum(self._seconds[first:])


def _compare(file: Path, way: _Way, own: _Way, detector: Detector, fpr: float) -> Agreement:
    scores, p = way.outputs
    expected, _ = own.outputs
    difference = np.abs(scores - expected) / np.maximum(1, np.abs(expected))
    calibration = detector.calibration_
    verdicts = scores > calibration.threshold(fpr)
    _, expected_verdicts = calibration.flags(expected, fpr)
    wrong = ~np.isclose(p, calibration.p_values(scores), rtol=1e-5, atol=0)
    return Agreement(
        file,
        len(scores),
        float(difference.max()),
        int((verdicts != expected_verdicts).sum()),
        int(wrong.sum()),
        way.speed,
        own.speed,
    )


def _readable(
    detector: Detector, images: object, progress: Progress | None, unreadable: dict[str, str]
) -> Iterator[Tensor]:
    """Batches (B, 3, H, W) of what can be scored; the rest is noted in ``unreadable``."""
    batches, total = detector.batches(images)
    done = 0
    for batch in batches:
        unreadable |= {item.ref.path: item.reason for item in batch.loaded if item.reason}
        if batch.pixels is not None:
            finite = batch.pixels.isfinite().flatten(1).all(1)
            names = [batch.loaded[i].ref.path for i in batch.decoded]
            unreadable |= {name: "NaN or infinite values" for name, good in zip(names, finite, strict=True) if not good}
            if finite.any():
                yield batch.pixels[finite]
        done += len(batch.loaded)
        if progress:
            progress("verifying", done, max(total, done))


def _torch(detector: Detector) -> Run:
    def run(pixels: Tensor) -> Sequence[np.ndarray]:
        scores = detector.score_features(detector.extractor_(pixels))
        return scores, detector.calibration_.p_values(scores)

    return run


def _open(file: Path, expected: Mapping[str, Any]) -> Run:
    """An exported file as a function, after a look at whether its metadata is what is expected."""
    if file.suffix not in (".onnx", ".pt2"):
        raise UsageError(f"{file} is neither an .onnx nor a .pt2 file")
    if not file.is_file():
        raise ModelError(f"no file at {file}")
    if file.suffix == ".onnx":
        need("onnxruntime")
    try:
        run, known = (_open_onnx if file.suffix == ".onnx" else _open_pt2)(file)
    except Exception as error:  # either library raises nearly anything on a damaged file
        raise ModelError(f"{file} cannot be loaded: {first_line(error)}") from None
    for key, value in expected.items():
        if key not in ("featdiff_version", "classes") and known.get(key) != value:
            says, is_ = (json.dumps(what)[:60] for what in (known.get(key), value))
            raise ModelError(f"{file} was not exported from this detector: its {key} is {says}, not {is_}")

    def checked(pixels: Tensor) -> Sequence[np.ndarray]:
        try:
            return run(pixels)
        except Exception as error:
            raise ModelError(f"{file} fails on a batch {tuple(pixels.shape)}: {first_line(error)}") from None

    return checked


def _open_onnx(file: Path) -> tuple[Run, dict[str, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # what fails is raised
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    known = session.get_modelmeta().custom_metadata_map
    return lambda pixels: session.run(list(OUTPUTS), {INPUT: pixels.numpy()}), {k: json.loads(known[k]) for k in known}


def _open_pt2(file: Path) -> tuple[Run, dict[str, Any]]:
    extra = {FACTS: ""}
    program = torch.export.load(io.BytesIO(file.read_bytes()), extra_files=extra).module()

    @torch.inference_mode()
    def run(pixels: Tensor) -> Sequence[np.ndarray]:
        return [output.numpy() for output in program(pixels)[: len(OUTPUTS)]]

    return run, json.loads(extra[FACTS])
