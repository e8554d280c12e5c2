"""One task of a suite, with one seed -> metrics, scores and costs of every method, on the same features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..data.references import ImageRef
from ..detectors import BaseDetector, Detector, PixelDetector
from ..hardening.harden import Hardened
from ..runtime.progress import Progress
from .baselines import Baselines, fit_baselines
from .costs import baseline_methods, detector_methods, measure_costs, student_methods, timed_pass
from .protocols import ScoredSet, evaluate_detector, measure_accuracy
from .seeds import PairScores, Run
from .students import train_students
from .suites import Task

#: Name of the default detector in a result; others are named ``<name>_<head>``.
DEFAULT = "featdiff"

Tell = Callable[[str], None]
#: For each OOD set and protocol the metrics of all heads, and both sets with their scores.
_Evaluated = list[tuple[dict[str, Any], tuple[ScoredSet, ScoredSet]]]


@dataclass(frozen=True)
class Plan:
    """A task with its images.

    Parameters
    ----------
    task : Task
    train, test : list of ImageRef
        In-domain images.
    ood : dict of list of ImageRef
        Those of the OOD sets that are there.
    """

    task: Task
    train: list[ImageRef]
    test: list[ImageRef]
    ood: dict[str, list[ImageRef]]


class TaskRun:
    """One task: fits every detector, evaluates it on the task's sets, and measures what it costs.

    Parameters
    ----------
    plan : Plan
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
    timed : bool, default True
        Measure costs; the seed does not change them.
    """

    def __init__(
        self,
        plan: Plan,
        default: Detector,
        others: Mapping[str, BaseDetector[Any]],
        students: Mapping[str, Mapping[str, Any]],
        unreadable: dict[str, str],
        progress: Progress | None,
        tell: Tell,
        timed: bool = True,
    ) -> None:
        self.plan = plan
        self.default = default
        self.others = others
        self.students = students
        self.unreadable = unreadable
        self.progress = progress
        self.tell = tell
        self.timed = timed

        self.pairs: list[dict[str, Any]] = []
        self.scores: list[dict[str, PairScores]] = []
        self.costs: dict[str, dict[str, float]] = {}

    def run(self) -> Run:
        """All steps."""
        plan = self.plan
        seed = self.default.settings.seed
        self.tell(f"{plan.task.name}, seed {seed}: {len(plan.train):,} images to train, {len(plan.test):,} to test")
        self._fit()

        self._measure_default()
        for name, detector in self.others.items():
            self._measure_other(name, detector)
        for name, student in train_students(self.students, plan.train, self.default, self.progress, self.tell):
            self._measure_student(name, student)
        return Run(self.default.n_images_, len(self.default.bank_digests_), self.costs, self.pairs, self.scores)

    def _fit(self) -> None:
        for name, detector in {DEFAULT: self.default, **self.others}.items():
            detector.fit(self.plan.train, self.progress)
            self.unreadable |= dict(detector.unreadable_)
            self.tell(f"  {name}: networks trained in {detector.training_seconds_:.0f} s")

    def _measure_default(self) -> None:
        """The default detector, each of its heads, and the baselines."""
        baselines = fit_baselines(self.default)
        evaluated = self._evaluate(self.default, baselines)
        self._keep(evaluated, {head: head for head in _heads(evaluated)})
        if not self.timed:
            return

        methods = detector_methods(self.default)
        own_head = _own_head(self.default)
        named = {DEFAULT if head == own_head else head: method for head, method in methods.items()}
        self.timed_pass = timed_pass(self.default, self.plan.test)
        self.costs |= measure_costs(named | baseline_methods(baselines), self.timed_pass, self.default)

    def _measure_other(self, name: str, detector: BaseDetector[Any]) -> None:
        """Another detector; its heads are named ``<name>_<head>``."""
        evaluated = self._evaluate(detector)
        heads = [head for head in _heads(evaluated) if not head.startswith("layer_")]
        named = {head: f"{name}_{_own_head(detector) if head == DEFAULT else head}" for head in heads}
        self._keep(evaluated, named)
        if not self.timed:
            return

        same_features = detector.extractor_.key() == self.default.extractor_.key()
        timed = self.timed_pass if same_features else timed_pass(detector, self.plan.test)
        methods = {f"{name}_{head}": method for head, method in detector_methods(detector).items()}
        self.costs |= measure_costs(methods, timed, detector)

    def _measure_student(self, name: str, student: Hardened) -> None:
        """A student: the energy of its logits, and its guard."""
        detector = student.guard.detector
        self.unreadable |= dict(student.unreadable)
        names = {"energy": f"{name}_energy", DEFAULT: f"{name}_guard"}
        self._keep(self._evaluate(detector), names)

        accuracy = measure_accuracy(detector, self.plan.test, student.classifier.classes, self.progress)
        costs: dict[str, dict[str, float]] = {method: {} for method in names.values()}
        if self.timed:
            costs = measure_costs(student_methods(name, student), timed_pass(detector, self.plan.test), detector)
        for method, cost in costs.items():
            self.costs[method] = cost | {"accuracy": accuracy}

    def _evaluate(self, detector: BaseDetector[Any], baselines: Baselines | None = None) -> _Evaluated:
        """Metrics and scores of all heads, for each OOD set and protocol."""
        plan = self.plan
        sets: list[tuple[ScoredSet, ScoredSet]] = []
        result = evaluate_detector(
            detector, plan.test, plan.ood, plan.task.protocols, self.progress, self.unreadable, baselines, sets=sets
        )
        return list(zip(result["pairs"], sets, strict=True))

    def _keep(self, evaluated: _Evaluated, names: Mapping[str, str]) -> None:
        """Take over heads under the given names."""
        if not self.pairs:
            self.pairs = [pair | {"heads": {}} for pair, _ in evaluated]
            self.scores = [{} for _ in evaluated]
        for i, (pair, (normal, strange)) in enumerate(evaluated):
            for head, name in names.items():
                self.pairs[i]["heads"][name] = pair["heads"][head]
                self.scores[i][name] = normal.scores[head], strange.scores[head]


def _heads(evaluated: _Evaluated) -> list[str]:
    return list(evaluated[0][0]["heads"])


def _own_head(detector: BaseDetector[Any]) -> str:
    """The head whose score is the detector's ood_score."""
    if isinstance(detector, Detector):
        return detector.settings.head
    assert isinstance(detector, PixelDetector)
    return detector.settings.distances[0]
