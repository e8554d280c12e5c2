"""A suite -> one result: the default detector and its heads, other detectors and baselines, on the same features.

Each task is planned (its images are found), fitted, evaluated, and its methods are timed; with several seeds, it is
fitted and evaluated again. Features and trained networks stay in the cache: a stopped run continues where it was, and a
second run is quick.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..data.decoding import short_sides
from ..data.labels import list_labelled
from ..data.references import ImageRef
from ..detectors import BaseDetector, Detector, PixelDetector
from ..detectors.run_config import RUNTIME
from ..exceptions import UsageError
from ..runtime.progress import Progress
from .seeds import merge_runs
from .students import check_students
from .suite_images import NotThere, everything_else, find_images
from .suites import EVERYTHING_ELSE, Source, Suite, Task
from .task_run import DEFAULT, Plan, TaskRun, Tell

# Detectors that a suite may name, by mode.
_KINDS: dict[str, type[Detector] | type[PixelDetector]] = {Detector.mode: Detector, PixelDetector.mode: PixelDetector}
# Arguments of the command that mean the same in every mode, and those that also apply to students.
_EVERY_MODE = ("fpr", "seed", *(name for name in RUNTIME if name != "image_batch"))
_STUDENTS_TOO = (*_EVERY_MODE, "image_batch")


def run_suite(
    suite: Suite,
    data: Path,
    arguments: Mapping[str, Any] | None = None,
    download: bool = False,
    progress: Progress | None = None,
    tell: Tell = lambda text: None,
    seeds: int = 1,
) -> dict[str, Any]:
    """Train and measure everything that a suite names; its mistakes are reported before any work.

    Parameters
    ----------
    suite : Suite
        From :func:`featdiff.evaluation.suites.load_suite`.
    data : Path
        Folder that the paths of the suite's sources start from.
    arguments : mapping, optional
        Arguments of all detectors (backbone, layers, device ...) where the suite does not say otherwise.
    download : bool, default False
        Whether torchvision may fetch missing data sets.
    progress : callable (stage, done, total), optional
    tell : callable, optional
        Gets a line for every task and detector, and for every OOD set that is left out because it is missing.
    seeds : int, default 1
        Fit everything so often: with its seed, the next one, and so on.

    Returns
    -------
    dict
        ``{"suite", "backbone", "seeds": [..], "tasks": [{"name", "n_train", "n_bank", "methods": {name:
        {"images_per_second", "training_seconds", "megabytes"}}, "pairs": [...], "means": [{"protocol", "ood": [..],
        "heads"}]}], "published": [...], "left_out": {name: reason}, "unreadable": {path: reason}}``; methods of
        students also have an ``accuracy`` (share of the test images). Shares are 0..1, published ones too.

        Pairs are those of :func:`featdiff.evaluation.protocols.evaluate_detector`, means over seeds if there are
        several. Their heads also have, for ``auroc`` and ``fpr95``, ``<metric>_std`` (the standard deviation over
        seeds; None with one), ``<metric>_difference`` (the method - featdiff's own score) and
        ``<metric>_difference_ci`` (its 95 % interval, by resamples of images and seeds that all methods share). So have
        the heads of ``means``, which are over the sets that are named beside them.

        Of the first seed are ``images_per_second`` (decoding, backbone and the method together), ``training_seconds``
        (the training of its networks; of a baseline: its fitting) and ``megabytes`` (the size of what it needs to
        keep).

    Raises
    ------
    UsageError
        In-domain images are missing, no task has an OOD set, or a detector's arguments make no sense.
    """
    arguments = arguments or {}
    if seeds < 1:
        raise UsageError(f"seeds must be 1 or more, not {seeds}", argument="seeds")
    default, others = _build(suite, arguments)
    check_students(suite.students)

    left_out: dict[str, str] = {}
    plans = _plan_all(suite, data, download, left_out)
    for name, reason in left_out.items():
        tell(f"left out: {name}: {reason}")
    if not any(plan.ood for plan in plans):
        raise UsageError(f"none of the OOD sets is below {data}: {'; '.join(left_out.values())}")

    unreadable: dict[str, str] = {}
    tasks = []
    for plan in plans:
        if not plan.ood:
            continue
        runs = []
        for later in range(seeds):
            detectors = _build(suite, arguments, later) if later else (default, others)
            students = _student_settings(suite, arguments, later)
            run = TaskRun(plan, *detectors, students, unreadable, progress, tell, timed=later == 0)
            runs.append(run.run())
        tasks.append(merge_runs(plan.task.name, runs, DEFAULT, progress))

    return {
        "suite": suite.title,
        "backbone": default.name,
        "seeds": [default.settings.seed + later for later in range(seeds)],
        "tasks": tasks,
        "published": _published_shares(suite),
        "left_out": left_out,
        "unreadable": unreadable,
    }


def _build(suite: Suite, arguments: Mapping[str, Any], later: int = 0) -> tuple[Detector, dict[str, BaseDetector[Any]]]:
    """The default detector and all others that the suite names, unfitted, with the seed that comes so much later."""
    settings: dict[str, Mapping[str, Any]] = {DEFAULT: {}, **suite.detectors}
    detectors: dict[str, BaseDetector[Any]] = {}
    for name, own_settings in settings.items():
        detectors[name] = _build_one(name, own_settings, arguments, later)

    for detector in detectors.values():
        if isinstance(detector, PixelDetector):
            detector.prepare()
    default = detectors.pop(DEFAULT)
    if not isinstance(default, Detector):
        raise UsageError(f"the suite's detector {DEFAULT!r} is of mode {default.mode}: it must look at features")
    return default, detectors


def _build_one(name: str, settings: Mapping[str, Any], arguments: Mapping[str, Any], later: int) -> BaseDetector[Any]:
    kind = _KINDS.get(str(settings.get("mode", Detector.mode)))
    if kind is None:
        raise UsageError(f"the suite's detector {name!r} has no mode {settings['mode']!r}; known: {', '.join(_KINDS)}")

    shared = arguments if kind is Detector else _only(arguments, _EVERY_MODE)
    merged = _with_later_seed({**shared, **settings}, later)
    merged.pop("mode", None)
    try:
        return kind(**merged)
    except UsageError as error:
        raise UsageError(f"the suite's detector {name!r} cannot be built: {error}") from None


def _student_settings(suite: Suite, arguments: Mapping[str, Any], later: int) -> dict[str, dict[str, Any]]:
    """Settings of each student: those of the command where the suite does not say otherwise."""
    shared = _only(arguments, _STUDENTS_TOO)
    return {name: _with_later_seed({**shared, **settings}, later) for name, settings in suite.students.items()}


def _with_later_seed(settings: dict[str, Any], later: int) -> dict[str, Any]:
    return settings | {"seed": settings.get("seed", 0) + later} if later else settings


def _only(arguments: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name in names}


def _published_shares(suite: Suite) -> list[dict[str, Any]]:
    """Published numbers as shares, 0..1; suites give percent."""
    numbers = []
    for published in suite.published:
        number = asdict(published)
        for key in ("auroc", "fpr95"):
            if number[key] is not None:
                number[key] /= 100
        numbers.append(number)
    return numbers


# ---- plan ----


def _plan_all(suite: Suite, data: Path, download: bool, left_out: dict[str, str]) -> list[Plan]:
    plans = [_plan(suite, task, data, download, left_out) for task in suite.tasks]
    if suite.students:  # they need classes, and a lack of them is better reported now
        for plan in plans:
            _check_classes(plan)
    return plans


def _plan(suite: Suite, task: Task, data: Path, download: bool, left_out: dict[str, str]) -> Plan:
    """Find a task's images; OOD sets that are missing or hold no readable image go to ``left_out``."""
    train = find_images(suite.sources[task.train], data, download)
    test = find_images(suite.sources[task.test], data, download)

    ood: dict[str, list[ImageRef]] = {}
    for name, source in _ood_sources(suite, task, data).items():
        try:
            images = find_images(source, data, download)
            if np.isnan(short_sides(images)).all():
                raise NotThere("none of its images can be read")
            ood[name] = images
        except NotThere as error:
            left_out[name] = str(error)
    return Plan(task, train, test, ood)


def _ood_sources(suite: Suite, task: Task, data: Path) -> dict[str, Source]:
    sources = {name: suite.sources[name] for name in task.ood if name != EVERYTHING_ELSE}
    if EVERYTHING_ELSE in task.ood:
        sources |= everything_else(data)
    return sources


def _check_classes(plan: Plan) -> None:
    """Refuse a single class to train on, and test images of classes that are not trained (``UsageError``)."""
    _, _, train_classes = list_labelled(plan.train)
    _, _, test_classes = list_labelled(plan.test)
    if len(train_classes) < 2:
        only = train_classes[0]
        raise UsageError(f"{plan.task.name}: students need two classes, and all images to train lie in {only!r}")
    if unknown := sorted({*test_classes} - {*train_classes}):
        raise UsageError(f"{plan.task.name}: no image to train is of the test images' class {unknown[0]!r}")
