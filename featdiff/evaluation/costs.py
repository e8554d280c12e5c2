"""What a method costs: images per second, seconds of training, megabytes to keep."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.references import ImageRef
from ..data.splits import evenly
from ..detectors import BaseDetector, Detector, PixelDetector
from ..features.extraction import FeatureBatch, featurise
from ..hardening.harden import Hardened
from ..scores.diffusion import DiffusionScore
from ..scores.fused import FUSED
from .baselines import Baselines

_TIMED_IMAGES = 512
_TIMED_INPAINTINGS = 8  # each takes a thousand times as long
_LONG_SECONDS = 2


@dataclass(frozen=True)
class Method:
    """One way to score features.

    Parameters
    ----------
    score : callable
        Features (B, D) -> scores.
    training_seconds : float
        Time to train its networks, or to fit a baseline.
    nbytes : int
        Size of what it needs to keep.
    """

    score: Callable[[Tensor], object]
    training_seconds: float
    nbytes: int


@dataclass(frozen=True)
class TimedPass:
    """Seconds per image for decoding and backbone, and the features (N, D) of the timed images."""

    seconds: float
    features: Tensor


def detector_methods(detector: BaseDetector[Any]) -> dict[str, Method]:
    """A detector's own score and each of its heads as if it stood alone, by name of the head."""
    if isinstance(detector, PixelDetector):
        return _pixel_methods(detector)
    assert isinstance(detector, Detector)
    return _feature_methods(detector)


def _feature_methods(detector: Detector) -> dict[str, Method]:
    heads = detector.heads_
    methods: dict[str, Method] = {}
    for name, score in heads.scores.items():
        trained = detector.training_seconds_ if isinstance(score, DiffusionScore) else 0.0
        methods[name] = Method(score, trained, score.nbytes)

    if heads.head == FUSED:
        methods[FUSED] = Method(detector.score_features, detector.training_seconds_, _bytes(heads))
    return methods


def _pixel_methods(detector: PixelDetector) -> dict[str, Method]:
    """Each distance as if it stood alone; its images are inpainted anew."""
    heads = detector.heads_
    shared = _bytes(heads) - _bytes(heads.distances)

    methods: dict[str, Method] = {}
    for name in heads.names:
        nbytes = shared + _bytes(heads.distances[name])
        methods[name] = Method(partial(heads, names=(name,)), detector.training_seconds_, nbytes)
    return methods


def student_methods(name: str, student: Hardened) -> dict[str, Method]:
    """The energy of a student's logits, which needs nothing more, and the score of the guard on it."""
    detector = student.guard.detector
    heads = detector.heads_
    trained = student.facts["seconds"]
    nbytes = _bytes(student.classifier.model)
    return {
        f"{name}_energy": Method(heads.scores["energy"], trained, nbytes),
        f"{name}_guard": Method(detector.score_features, trained + detector.training_seconds_, nbytes + _bytes(heads)),
    }


def baseline_methods(baselines: Baselines) -> dict[str, Method]:
    """Baselines by the name that tables show."""
    methods: dict[str, Method] = {}
    for name, score in baselines.scores.items():
        methods[name] = Method(score, baselines.seconds[name], score.nbytes)
    return methods


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def measure_costs(
    methods: Mapping[str, Method], timed: TimedPass, detector: BaseDetector[Any]
) -> dict[str, dict[str, float]]:
    """Time methods on the features of a timed pass.

    Parameters
    ----------
    methods : dict of Method
        By name.
    timed : TimedPass
        With the extractor of ``detector``.
    detector : BaseDetector
        Decides how many images are scored at once: as many as when files are scored.

    Returns
    -------
    dict
        ``{name: {"images_per_second", "training_seconds", "megabytes"}}``.
    """
    batch = detector.batches_at_once * detector.settings.image_batch
    features = timed.features
    if isinstance(detector, PixelDetector):
        features = features[:_TIMED_INPAINTINGS]

    costs: dict[str, dict[str, float]] = {}
    for name, method in methods.items():
        seconds = timed.seconds + _seconds(method.score, features, batch)
        costs[name] = {
            "images_per_second": 1 / seconds,
            "training_seconds": method.training_seconds,
            "megabytes": method.nbytes / 1e6,
        }
    return costs


def timed_pass(detector: BaseDetector[Any], images: list[ImageRef]) -> TimedPass:
    """Decode up to 512 images, evenly chosen, and run them through the backbone."""
    batches, _ = detector.batches(evenly(images, _TIMED_IMAGES))
    start = time.perf_counter()
    featurised = FeatureBatch.concatenate([each for _, each in featurise(batches, detector.extractor_)])
    seconds = time.perf_counter() - start
    return TimedPass(seconds / len(featurised.features), featurised.features)


def _seconds(score: Callable[[Tensor], object], features: Tensor, batch: int) -> float:
    """Seconds per image: the better of two runs, because the first one warms up; a long run is made once."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        for part in features.split(batch):
            score(part)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

        best = min(best, time.perf_counter() - start)
        if best > _LONG_SECONDS:
            break
    return best / len(features)
