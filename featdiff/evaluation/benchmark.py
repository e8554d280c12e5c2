"""A suite -> one result: the default detector and its heads, other detectors and baselines, on the same features.

Each task is planned (its images are found), fitted, evaluated, and its methods are timed. Features and trained networks
stay in the cache: a stopped run continues where it was, and a second run is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.decoding import short_sides
from ..data.labels import list_labelled
from ..data.references import ImageRef
from ..detectors import MODES, BaseDetector, Detector, PixelDetector
from ..detectors.run_config import RUNTIME
from ..exceptions import UsageError
from ..hardening.harden import Hardened
from ..runtime.progress import Progress
from .baselines import Baselines, fit_baselines
from .costs import baseline_methods, detector_methods, measure_costs, student_methods, timed_pass
from .protocols import evaluate_detector, measure_accuracy
from .students import check_students, train_students
from .suite_images import NotThere, everything_else, find_images
from .suites import EVERYTHING_ELSE, Source, Suite, Task

#: Name of the default detector in a result; others are named ``<name>_<head>``.
DEFAULT = "featdiff"
# Arguments of the command that mean the same in every mode, and those that also apply to students.
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

    Returns
    -------
    dict
        ``{"suite", "backbone", "tasks": [{"name", "n_train", "n_bank", "methods": {name: {"images_per_second",
        "training_seconds", "megabytes"}}, "pairs": [...]}], "published": [...], "left_out": {name: reason},
        "unreadable": {path: reason}}``; methods of students also have an ``accuracy`` (share of the test images).
        Pairs are those of :func:`featdiff.evaluation.protocols.evaluate_detector`. ``images_per_second`` is decoding,
        backbone and the method together; ``training_seconds`` is the training of its networks (of a baseline: its
        fitting); ``megabytes`` is the size of what it needs to keep. Shares are 0..1, published ones too.

    Raises
    ------
    UsageError
        In-domain images are missing, no task has an OOD set, or a detector's arguments make no sense.
    """
    arguments = arguments or {}
    detectors = _build(suite, arguments)
    check_students(suite.students)
    default = detectors.pop(DEFAULT)
    if not isinstance(default, Detector):
        raise UsageError(f"the suite's detector {DEFAULT!r} is of mode {default.mode}: it must look at features")

    left_out: dict[str, str] = {}
    plans = _plan_all(suite, data, download, left_out)
    for name, reason in left_out.items():
        tell(f"left out: {name}: {reason}")
    if not any(plan.ood for plan in plans):
        raise UsageError(f"none of the OOD sets is below {data}: {'; '.join(left_out.values())}")

    students = _student_settings(suite, arguments)
    unreadable: dict[str, str] = {}
    tasks = []
    for plan in plans:
        if plan.ood:
            task = _TaskRun(plan, default, detectors, students, unreadable, progress, tell)
            tasks.append(task.run())

    return {
        "suite": suite.title,
        "backbone": default.name,
        "tasks": tasks,
        "published": _published_shares(suite),
        "left_out": left_out,
        "unreadable": unreadable,
    }


def _build(suite: Suite, arguments: Mapping[str, Any]) -> dict[str, BaseDetector[Any]]:
    """The default detector and all that the suite names, unfitted."""
    settings: dict[str, Mapping[str, Any]] = {DEFAULT: {}, **suite.detectors}
    detectors: dict[str, BaseDetector[Any]] = {}
    for name, own_settings in settings.items():
        detectors[name] = _build_one(name, own_settings, arguments)

    for detector in detectors.values():
        if isinstance(detector, PixelDetector):
            detector.prepare()
    return detectors


def _build_one(name: str, settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> BaseDetector[Any]:
    kind = MODES.get(str(settings.get("mode", Detector.mode)))
    if kind is None:
        raise UsageError(f"the suite's detector {name!r} has no mode {settings['mode']!r}; known: {', '.join(MODES)}")

    shared = arguments if kind is Detector else _only(arguments, _EVERY_MODE)
    merged = {**shared, **settings}
    merged.pop("mode", None)
    try:
        return kind(**merged)
    except UsageError as error:
        raise UsageError(f"the suite's detector {name!r} cannot be built: {error}") from None


def _student_settings(suite: Suite, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of each student: those of the command where the suite does not say otherwise."""
    shared = _only(arguments, _STUDENTS_TOO)
    return {name: {**shared, **settings} for name, settings in suite.students.items()}


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


@dataclass(frozen=True)
class _Plan:
    """A task with its images."""

    task: Task
    train: list[ImageRef]
    test: list[ImageRef]
    ood: dict[str, list[ImageRef]]


def _plan_all(suite: Suite, data: Path, download: bool, left_out: dict[str, str]) -> list[_Plan]:
    plans = [_plan(suite, task, data, download, left_out) for task in suite.tasks]
    if suite.students:  # they need classes, and a lack of them is better reported now
        for plan in plans:
            _check_classes(plan)
    return plans


def _plan(suite: Suite, task: Task, data: Path, download: bool, left_out: dict[str, str]) -> _Plan:
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
    return _Plan(task, train, test, ood)


def _ood_sources(suite: Suite, task: Task, data: Path) -> dict[str, Source]:
    sources = {name: suite.sources[name] for name in task.ood if name != EVERYTHING_ELSE}
    if EVERYTHING_ELSE in task.ood:
        sources |= everything_else(data)
    return sources


def _check_classes(plan: _Plan) -> None:
    """Refuse a single class to train on, and test images of classes that are not trained (``UsageError``)."""
    _, _, train_classes = list_labelled(plan.train)
    _, _, test_classes = list_labelled(plan.test)
    if len(train_classes) < 2:
        only = train_classes[0]
        raise UsageError(f"{plan.task.name}: students need two classes, and all images to train lie in {only!r}")
    if unknown := sorted({*test_classes} - {*train_classes}):
        raise UsageError(f"{plan.task.name}: no image to train is of the test images' class {unknown[0]!r}")


# ---- fit, evaluate, cost ----


class _TaskRun:
    """One task: fits every detector, evaluates it on the task's sets, and measures what it costs.

    Parameters
    ----------
    plan : _Plan
    default : Detector
        Its scores get the short names; baselines and students look at its features.
    others : dict of BaseDetector
        Further detectors by name.
    students : dict
        Settings of the students by name.
    unreadable : dict
        Filled with {path: reason}.
    progress : callable (stage, done, total), optional
    tell : callable
        Gets a line for the task and for every detector.
    """

    def __init__(
        self,
        plan: _Plan,
        default: Detector,
        others: Mapping[str, BaseDetector[Any]],
        students: Mapping[str, Mapping[str, Any]],
        unreadable: dict[str, str],
        progress: Progress | None,
        tell: Tell,
    ) -> None:
        self.plan = plan
        self.default = default
        self.others = others
        self.students = students
        self.unreadable = unreadable
        self.progress = progress
        self.tell = tell

        self.pairs: list[dict[str, Any]] = []
        self.costs: dict[str, dict[str, float]] = {}

    def run(self) -> dict[str, Any]:
        """All steps -> the task's part of the result."""
        plan = self.plan
        self.tell(f"{plan.task.name}: {len(plan.train):,} images to train, {len(plan.test):,} to test")
        self._fit()

        self._measure_default()
        for name, detector in self.others.items():
            self._measure_other(name, detector)
        for name, student in train_students(self.students, plan.train, self.default, self.progress, self.tell):
            self._measure_student(name, student)

        return {
            "name": plan.task.name,
            "n_train": self.default.n_images_,
            "n_bank": len(self.default.bank_digests_),
            "methods": self.costs,
            "pairs": self.pairs,
        }

    def _fit(self) -> None:
        for name, detector in {DEFAULT: self.default, **self.others}.items():
            detector.fit(self.plan.train, self.progress)
            self.unreadable |= dict(detector.unreadable_)
            self.tell(f"  {name}: networks trained in {detector.training_seconds_:.0f} s")

    def _measure_default(self) -> None:
        """The default detector, each of its heads, and the baselines."""
        baselines = fit_baselines(self.default)
        self.pairs = self._evaluate(self.default, baselines)

        methods = detector_methods(self.default)
        own_head = _own_head(self.default)
        named = {DEFAULT if head == own_head else head: method for head, method in methods.items()}
        self.timed = timed_pass(self.default, self.plan.test)
        self.costs |= measure_costs(named | baseline_methods(baselines), self.timed, self.default)

    def _measure_other(self, name: str, detector: BaseDetector[Any]) -> None:
        """Another detector; its heads are named ``<name>_<head>``."""
        own_head = _own_head(detector)
        for pair, other in zip(self.pairs, self._evaluate(detector), strict=True):
            metrics = other["heads"]
            pair["heads"][f"{name}_{own_head}"] = metrics.pop(DEFAULT)
            for head, values in metrics.items():
                if not head.startswith("layer_"):
                    pair["heads"][f"{name}_{head}"] = values

        same_features = detector.extractor_.key() == self.default.extractor_.key()
        timed = self.timed if same_features else timed_pass(detector, self.plan.test)
        methods = detector_methods(detector)
        named = {f"{name}_{head}": method for head, method in methods.items()}
        self.costs |= measure_costs(named, timed, detector)

    def _measure_student(self, name: str, student: Hardened) -> None:
        """A student: the energy of its logits, and its guard."""
        detector = student.guard.detector
        self.unreadable |= dict(student.unreadable)
        for pair, other in zip(self.pairs, self._evaluate(detector), strict=True):
            pair["heads"][f"{name}_energy"] = other["heads"]["energy"]
            pair["heads"][f"{name}_guard"] = other["heads"][DEFAULT]

        timed = timed_pass(detector, self.plan.test)
        costs = measure_costs(student_methods(name, student), timed, detector)
        accuracy = measure_accuracy(detector, self.plan.test, student.classifier.classes, self.progress)
        for method, cost in costs.items():
            self.costs[method] = cost | {"accuracy": accuracy}

    def _evaluate(self, detector: BaseDetector[Any], baselines: Baselines | None = None) -> list[dict[str, Any]]:
        """Metrics of all heads, for each OOD set and protocol."""
        plan = self.plan
        result = evaluate_detector(
            detector, plan.test, plan.ood, plan.task.protocols, self.progress, self.unreadable, baselines
        )
        pairs: list[dict[str, Any]] = result["pairs"]
        return pairs


def _own_head(detector: BaseDetector[Any]) -> str:
    """The head whose score is the detector's ood_score."""
    if isinstance(detector, Detector):
        return detector.settings.head
    assert isinstance(detector, PixelDetector)
    return detector.settings.distances[0]
