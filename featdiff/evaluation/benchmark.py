"""A suite -> one result: the default detector and its heads, other detectors and baselines, on the same features.

Features and trainings are kept in the cache: a run that was stopped goes on, and a second one is quick.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.decoding import short_sides
from ..data.labels import list_labelled
from ..data.references import ImageRef
from ..data.splits import evenly
from ..detectors import MODES, BaseDetector, Detector, PixelDetector
from ..detectors.config import RUNTIME
from ..exceptions import UsageError
from ..features.extraction import FeatureBatch, featurise
from ..hardening.harden import Hardened
from ..runtime.progress import Progress
from ..scores.diffusion import DiffusionScore
from ..scores.fused import FUSED
from .baselines import Baselines, fit_baselines
from .protocols import evaluate_detector, measure_accuracy
from .students import check_students, train_students
from .suites import EVERYTHING_ELSE, NotThere, Suite, Task, everything_else, find_images

#: Name of the default detector in a result; others are named ``<name>_<head>``.
DEFAULT = "featdiff"
_TIMED_IMAGES = 512
_TIMED_INPAINTINGS = 8  # each takes a thousand times as long
_LONG_SECONDS = 2
# Arguments of the command that mean the same in every mode, and those that are for students.
_EVERY_MODE = ("fpr", "seed", *(name for name in RUNTIME if name != "image_batch"))
_STUDENTS_TOO = (*_EVERY_MODE, "image_batch")

Tell = Callable[[str], None]


def run_suite(
    suite: Suite,
    data: Path,
    arguments: Mapping[str, Any] | None = None,
    download: bool = False,
    progress: Progress | None = None,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Train and measure everything a suite names. What is wrong with it is said before any work.

    Parameters
    ----------
    data : folder that the suite's sources count from
    arguments : of all detectors (backbone, layers, device ...) where the suite does not say otherwise
    download : whether torchvision may fetch data sets that are not there
    tell : callable, optional
        Gets a line for every task and detector, and for every OOD set that is left out because it is not there.

    Returns
    -------
    dict
        ``{"suite", "backbone", "tasks": [{"name", "n_train", "n_bank", "methods": {name: {"images_per_second",
        "training_seconds", "megabytes"}}, "pairs": [...]}], "published": [...], "left_out": {name: reason},
        "unreadable": {path: reason}}``; methods of students have an ``accuracy`` (share of the test images), too.
        Pairs are those of :func:`featdiff.evaluation.protocols.evaluate_detector`; ``images_per_second`` is decoding,
        backbone and the method together, ``training_seconds`` the training of its networks (of a baseline: its
        fitting), ``megabytes`` what it needs to keep. Shares are 0..1, published ones too.

    Raises
    ------
    UsageError
        In-domain images are not there, no task has an OOD set, or a detector's arguments make no sense.
    """
    detectors = _build(suite, arguments or {})
    check_students(suite.students)
    default = detectors.pop(DEFAULT)
    if not isinstance(default, Detector):
        raise UsageError(f"the suite's detector {DEFAULT!r} is of mode {default.mode}: it must look at features")
    left_out: dict[str, str] = {}
    plans = [_plan(suite, task, data, download, left_out) for task in suite.tasks]
    for plan in plans if suite.students else ():  # students need classes: better said now
        _check_classes(plan)
    for name, reason in left_out.items():
        tell(f"left out: {name}: {reason}")
    if not any(plan.ood for plan in plans):
        raise UsageError(f"none of the OOD sets is below {data}: {'; '.join(left_out.values())}")
    unreadable: dict[str, str] = {}
    own = {name: value for name, value in (arguments or {}).items() if name in _STUDENTS_TOO}
    students = {name: {**own, **settings} for name, settings in suite.students.items()}
    tasks = [_run(plan, default, detectors, students, unreadable, progress, tell) for plan in plans if plan.ood]
    published = [asdict(number) for number in suite.published]
    for number in published:
        number |= {key: number[key] / 100 for key in ("auroc", "fpr95") if number[key] is not None}
    result = {"suite": suite.title, "backbone": default.name, "tasks": tasks, "published": published}
    return result | {"left_out": left_out, "unreadable": unreadable}


def _build(suite: Suite, arguments: Mapping[str, Any]) -> dict[str, BaseDetector[Any]]:
    built: dict[str, BaseDetector[Any]] = {}
    wanted: dict[str, Mapping[str, Any]] = {DEFAULT: {}, **suite.detectors}
    for name, own in wanted.items():
        kind = MODES.get(str(own.get("mode", Detector.mode)))
        if kind is None:
            raise UsageError(f"the suite's detector {name!r} has no mode {own['mode']!r}; known: {', '.join(MODES)}")
        shared = arguments if kind is Detector else {k: v for k, v in arguments.items() if k in _EVERY_MODE}
        own = {key: value for key, value in own.items() if key != "mode"}
        try:
            built[name] = kind(**{**shared, **own})
        except UsageError as error:
            raise UsageError(f"the suite's detector {name!r} cannot be built: {error}") from None
    for detector in built.values():
        if isinstance(detector, PixelDetector):
            detector.prepare()
    return built


@dataclass(frozen=True)
class _Plan:
    """A task with its images."""

    task: Task
    train: list[ImageRef]
    test: list[ImageRef]
    ood: dict[str, list[ImageRef]]


def _plan(suite: Suite, task: Task, data: Path, download: bool, left_out: dict[str, str]) -> _Plan:
    """Find a task's images; OOD sets that are not there, or hold nothing that can be read, are left out."""
    train, test = (find_images(suite.sources[name], data, download) for name in (task.train, task.test))
    sources = {name: suite.sources[name] for name in task.ood if name != EVERYTHING_ELSE}
    if EVERYTHING_ELSE in task.ood:
        sources |= everything_else(data)
    found = {}
    for name, source in sources.items():
        try:
            images = find_images(source, data, download)
            if np.isnan(short_sides(images)).all():
                raise NotThere("none of its images can be read")
            found[name] = images
        except NotThere as error:
            left_out[name] = str(error)
    return _Plan(task, train, test, found)


def _check_classes(plan: _Plan) -> None:
    """Refuse images without two classes to train on, and test images of classes that nobody learns (``UsageError``)."""
    (_, _, learnt), (_, _, asked) = (list_labelled(images) for images in (plan.train, plan.test))
    if len(learnt) < 2:
        raise UsageError(f"{plan.task.name}: students need two classes, and all images to train lie in {learnt[0]!r}")
    if unknown := sorted({*asked} - {*learnt}):
        raise UsageError(f"{plan.task.name}: no image to train is of the test images' class {unknown[0]!r}")


def _run(
    plan: _Plan,
    default: Detector,
    others: Mapping[str, BaseDetector[Any]],
    students: Mapping[str, Mapping[str, Any]],
    unreadable: dict[str, str],
    progress: Progress | None,
    tell: Tell,
) -> dict[str, Any]:
    """Fit every detector on a task's training images, then measure all methods on its sets."""
    tell(f"{plan.task.name}: {len(plan.train):,} images to train, {len(plan.test):,} to test")
    for name, detector in {DEFAULT: default, **others}.items():
        unreadable |= dict(detector.fit(plan.train, progress).unreadable_)
        tell(f"  {name}: networks trained in {detector.training_seconds_:.0f} s")
    baselines = fit_baselines(default)

    def evaluate(detector: BaseDetector[Any], baselines: Baselines | None = None) -> list[dict[str, Any]]:
        sets = (plan.test, plan.ood, plan.task.protocols)
        pairs: list[dict[str, Any]] = evaluate_detector(detector, *sets, progress, unreadable, baselines)["pairs"]
        return pairs

    pairs = evaluate(default, baselines)
    timed = _timed_pass(default, plan.test)
    own = _own_head(default)
    methods = {DEFAULT if name == own else name: method for name, method in _methods(default).items()}
    costs = _costs(methods | _baseline_methods(baselines), *timed, default)
    for name, detector in others.items():
        for pair, more in zip(pairs, evaluate(detector), strict=True):
            heads = {_own_head(detector): more["heads"].pop(DEFAULT)} | more["heads"]
            pair["heads"] |= {f"{name}_{head}": m for head, m in heads.items() if not head.startswith("layer_")}
        if detector.extractor_.key() != default.extractor_.key():
            timed = _timed_pass(detector, plan.test)
        methods = _methods(detector) if isinstance(detector, Detector) else _pixel_methods(detector)
        costs |= _costs({f"{name}_{head}": method for head, method in methods.items()}, *timed, detector)
    for name, student in train_students(students, plan.train, default, progress, tell):
        detector = student.guard.detector
        unreadable |= dict(student.unreadable)
        for pair, more in zip(pairs, evaluate(detector), strict=True):
            pair["heads"] |= {f"{name}_energy": more["heads"]["energy"], f"{name}_guard": more["heads"][DEFAULT]}
        found = _costs(_student_methods(name, student), *_timed_pass(detector, plan.test), detector)
        accuracy = measure_accuracy(detector, plan.test, student.classifier.classes, progress)
        costs |= {method: cost | {"accuracy": accuracy} for method, cost in found.items()}
    sizes = {"n_train": default.n_images_, "n_bank": len(default.bank_digests_)}
    return {"name": plan.task.name} | sizes | {"methods": costs, "pairs": pairs}


def _own_head(detector: BaseDetector[Any]) -> str:
    """What a detector's ood_score is called among its heads."""
    if isinstance(detector, Detector):
        return detector.settings.head
    assert isinstance(detector, PixelDetector)
    return detector.settings.distances[0]


#: (what scores rows of features, seconds of training, bytes it needs to keep)
_Method = tuple[Callable[[Tensor], object], float, int]


def _methods(detector: Detector) -> dict[str, _Method]:
    """A detector's own score, by the name of its head, and each of its heads as if it stood alone."""
    heads = detector.heads_
    methods: dict[str, _Method] = {}
    for name, score in heads.scores.items():
        trained = detector.training_seconds_ if isinstance(score, DiffusionScore) else 0.0
        methods[name] = (score, trained, score.nbytes)
    if heads.head == FUSED:
        kept = _bytes(heads) - _bytes(heads.diffusion.early)  # only likelihood regret needs it
        methods[FUSED] = (detector.score_features, detector.training_seconds_, kept)
    return methods


def _student_methods(name: str, student: Hardened) -> dict[str, _Method]:
    """The energy of a student's logits, which needs nothing more, and the score of the guard on it."""
    detector, trained, size = student.guard.detector, student.facts["seconds"], _bytes(student.classifier.model)
    heads = detector.heads_
    guarded = (detector.score_features, trained + detector.training_seconds_, size + _bytes(heads))
    return {f"{name}_energy": (heads.scores["energy"], trained, size), f"{name}_guard": guarded}


def _pixel_methods(detector: BaseDetector[Any]) -> dict[str, _Method]:
    """Each distance as if it stood alone; what was inpainted before is inpainted again."""
    assert isinstance(detector, PixelDetector)
    heads, trained = detector.heads_, detector.training_seconds_
    kept = _bytes(heads) - _bytes(heads.distances)
    return {
        name: (lambda rows, name=name: heads(rows, (name,)), trained, kept + _bytes(heads.distances[name]))  # type: ignore[misc]
        for name in heads.names
    }


def _baseline_methods(baselines: Baselines) -> dict[str, _Method]:
    return {name: (score, baselines.seconds[name], score.nbytes) for name, score in baselines.scores.items()}


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def _costs(
    methods: Mapping[str, _Method], seconds: float, features: Tensor, detector: BaseDetector[Any]
) -> dict[str, dict[str, float]]:
    rows = detector.batches_at_once * detector.settings.image_batch  # as when files are scored
    if isinstance(detector, PixelDetector):
        features = features[:_TIMED_INPAINTINGS]
    return {
        name: {
            "images_per_second": 1 / (seconds + _seconds(score, features, rows)),
            "training_seconds": trained,
            "megabytes": kept / 1e6,
        }
        for name, (score, trained, kept) in methods.items()
    }


def _timed_pass(detector: BaseDetector[Any], images: list[ImageRef]) -> tuple[float, Tensor]:
    """Seconds for an image through decoding and backbone, and the features of the images that were timed."""
    batches, _ = detector.batches(evenly(images, _TIMED_IMAGES))
    start = time.perf_counter()
    featurised = FeatureBatch.concatenate([featurise(batch, detector.extractor_) for batch in batches])
    seconds = time.perf_counter() - start
    return seconds / len(featurised.features), featurised.features


def _seconds(score: Callable[[Tensor], object], features: Tensor, rows: int) -> float:
    """Seconds for an image; the better of two runs, for the first one warms up (of a long one, the first)."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        for part in features.split(rows):
            score(part)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        if best > _LONG_SECONDS:
            break
    return best / len(features)
