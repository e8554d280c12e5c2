"""Calibration by folds: nothing calibrates by what has seen it, and stopped trainings go on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from small_stores import in_memory
from torch import Tensor

from featdiff import Detector
from featdiff.data.splits import Plan, Split, make_plan
from featdiff.detectors.fitting import Bank, Fitted, fit_heads
from featdiff.diffusion.training import Recipe
from featdiff.features.layout import FeatureLayout, Kind
from featdiff.features.store import Features as StoredFeatures
from featdiff.features.store import Rows
from featdiff.runtime import checkpoints
from featdiff.scores.diffusion import Diffusion
from featdiff.scores.fused import FUSED, Heads, Measured
from featdiff.scores.registry import Context, Features, Score

LAYOUT = FeatureLayout.of({("early", Kind.MEAN): 4, ("last", Kind.MEAN): 8})
SETTINGS: dict[str, Any] = {
    **{"joint": False, "hidden_ratio": 2.0, "hidden_max": 8, "blocks": 1, "timesteps": 100},
    **{"start_times": (20, 60), "draws": 2, "stride": None, "seed": 0},
}
QUICK = Recipe(epochs=1, min_steps=1, batch_size=16)
ROWS = np.random.default_rng(0).normal(size=(60, 12)).astype(np.float32)
GROUPS = np.random.default_rng(1).permutation(np.repeat(np.arange(12), 5))


def numbers_of(features: Tensor) -> set[int]:
    """Which of ``ROWS`` these are."""
    return {int((abs(ROWS - row.numpy()).sum(1)).argmin()) for row in features}


class Remembers(Score):
    """The first number of a row as its score; it remembers what it was fitted on and what it was asked."""

    name = "remembers"

    def __init__(self, layout: FeatureLayout) -> None:
        super().__init__(layout)
        self.kept: set[int] = set()
        self.trained: set[int] = set()
        self.asked: list[set[int]] = []

    def fit(self, features: Features, context: Context | None = None) -> Self:
        assert context is not None
        self.kept = numbers_of(features[:])
        self.trained = numbers_of(context.training[:])
        return self

    def forward(self, features: Tensor) -> Tensor:
        self.asked.append(numbers_of(features))
        return features[:, 0]


class Run:
    """A fit of synthetic features, and all that took part in it."""

    def __init__(self, plan: Plan, head: str = FUSED, bank: int = 500) -> None:
        self.plan = plan
        self.scores: list[Remembers] = []
        self.measured: list[Measured] = []
        self.progress: list[tuple[str, int, int]] = []
        self.features = in_memory(ROWS)
        self.head = head
        chosen = Bank(bank, "random", seed=0)
        self.fitted: Fitted = fit_heads(self.features, plan, chosen, self.new_heads, self.context, self.measure)

    def new_heads(self, size: int) -> Heads:
        self.scores.append(Remembers(LAYOUT))
        return Heads(Diffusion(LAYOUT, **SETTINGS), [self.scores[-1]], self.head)

    def context(self, part: Split) -> Context:
        training = self.features.select(part.training)
        validation = self.features.select(part.validation)
        return Context(training, validation, QUICK, progress=lambda *call: self.progress.append(call))

    def measure(self, heads: Heads, features: StoredFeatures) -> Measured:
        measured = heads.measure_all(features)
        if not isinstance(features, Rows):  # the check at the end scores rows of its own
            self.measured.append(measured)
        return measured


@pytest.fixture(scope="module", params=["images", "groups"])
def run(request: pytest.FixtureRequest) -> Run:
    return Run(make_plan(60, groups=GROUPS if request.param == "groups" else None))


def test_no_row_is_measured_by_what_has_seen_it_or_its_group(run: Run) -> None:
    assert len(run.plan.folds) == 5
    assert len(run.scores) == 6
    for fold, score in zip(run.plan.folds, run.scores, strict=False):
        held_out = set(fold.calibration.tolist())
        validation = set(fold.validation.tolist())
        assert score.kept == score.trained == set(fold.training.tolist())
        assert score.asked == [validation, held_out]  # validation at fit, then those that calibrate
        assert not (held_out | validation) & score.kept
        if run.plan.groups == 12:
            seen = set(GROUPS[list(score.kept)].tolist())
            assert not seen & set(GROUPS[list(held_out)].tolist())


def test_the_final_scores_keep_all_rows(run: Run) -> None:
    final = run.scores[-1]
    assert final.kept == set(range(60))
    assert run.fitted.bank.tolist() == list(range(60))
    assert final.trained == set(run.plan.final.training.tolist())


def test_calibration_is_what_the_folds_measured_by_the_final_scale(run: Run) -> None:
    assert len(run.measured) == 5
    measured = Measured.concatenate(run.measured)
    order = run.plan.calibration
    np.testing.assert_array_equal(measured.members[:, 0], ROWS[order, 0])
    assert measured.errors.shape == (60, 2, 2)

    heads = run.fitted.heads
    scaled = heads.rescaled(heads.combined(measured))
    np.testing.assert_array_equal(run.fitted.calibration, scaled[:, 0].double())
    assert run.fitted.calibration.mean() == pytest.approx(0, abs=1e-5)
    assert run.fitted.calibration.std() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(scaled[:, 1:].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(scaled[:, 1:].std(0, correction=0), 1, atol=1e-5)


def test_statistics_are_those_of_the_measured_rows(run: Run) -> None:
    heads = run.fitted.heads
    assert heads.mean[1] == pytest.approx(ROWS[:, 0].mean(), abs=1e-5)
    assert heads.deviation[1] == pytest.approx(ROWS[:, 0].std(), rel=1e-4)

    again = copy.deepcopy(heads)
    for name in ("mean", "deviation"):
        getattr(again, name).fill_(7)
    again.fit_statistics(Measured.concatenate(run.measured))
    for name, value in heads.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_progress_is_one_bar_for_all_trainings(run: Run) -> None:
    shares = [done / total for stage, done, total in run.progress if stage == "training"]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert {round(6 * share, 6) for share in shares} >= {1, 2, 3, 4, 5, 6}  # each ends a sixth


def test_a_head_of_its_own_is_calibrated_by_the_folds() -> None:
    run = Run(make_plan(60), head="remembers")
    values = ROWS[run.plan.calibration, 0].astype(float)
    np.testing.assert_allclose(run.fitted.calibration, (values - values.mean()) / values.std(), atol=1e-5)


def test_a_small_bank_is_chosen_among_rows_that_may_be_seen() -> None:
    run = Run(make_plan(60, groups=GROUPS), bank=20)
    for fold, score in zip(run.plan.folds, run.scores, strict=False):
        assert len(score.kept) == 20
        assert score.kept <= set(fold.training.tolist())
    assert len(run.fitted.bank) == 20


def test_without_folds_validation_sets_the_statistics() -> None:
    plan = make_plan(60, calibration=0.25, groups=GROUPS)
    run = Run(plan)
    (score,) = run.scores
    (measured,) = run.measured
    assert score.kept == set(plan.final.training.tolist())
    assert score.asked[:2] == [set(plan.final.validation.tolist()), set(plan.final.calibration.tolist())]
    assert run.fitted.heads.mean[1] == pytest.approx(ROWS[plan.final.validation, 0].mean(), abs=1e-5)
    np.testing.assert_array_equal(measured.members[:, 0], ROWS[plan.final.calibration, 0])


# ---- in a detector ----


@pytest.fixture
def by_folds(small: dict[str, Any]) -> dict[str, Any]:
    return {**small, "calibration": "auto"}


def labels_of(files: list[str]) -> list[int]:
    """Ten groups of four."""
    return [i // 4 for i in range(len(files))]


def same_tensors(a: Detector, b: Detector) -> None:
    ours, theirs = a.tensors(), b.tensors()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def stop_at(share: float) -> Callable[[str, int, int], None]:
    """A progress callback that acts as Ctrl-C does after this share of all training."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "training" and done >= share * total:
            raise KeyboardInterrupt

    return progress


def test_all_images_calibrate_up_to_500(by_folds: dict[str, Any], files: list[str], fresh: list[str]) -> None:
    detector = Detector(**by_folds).fit(files)
    assert len(detector.calibration_) == detector.calibration_.groups == 40
    assert detector.grouping_.how == "none"
    assert detector.calibration_digests_ == []  # all of them trained the final model
    assert len(detector.bank_digests_) == 40
    assert detector.calibration_.smallest_fpr == 1 / 41
    assert detector.training_seconds_ > 0

    p = detector.score(fresh, fpr=0.05).p_value
    np.testing.assert_allclose(p * 41, np.round(p * 41), atol=1e-9)


def test_images_in_the_bank_are_not_what_they_are_compared_with(by_folds: dict[str, Any], files: list[str]) -> None:
    """Calibration scores are those of images that were not seen; the final scores of the same images are smaller."""
    detector = Detector(**by_folds).fit(files)
    own = detector.score(files)
    assert np.median(own.ood_score) < np.median(detector.calibration_.scores) - 0.3


@pytest.mark.parametrize("share", [0.4, 0.95])
def test_a_training_stopped_in_a_fold_goes_on(
    by_folds: dict[str, Any],
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    """In the third fold, or in the final training: what is finished is not done again."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", -1)
    arguments = {**by_folds, "recipe": {"epochs": 4, "min_steps": 1, "batch_size": 8}}
    groups = labels_of(files)
    with pytest.raises(KeyboardInterrupt):
        Detector(**arguments, cache=tmp_path / "stopped").fit(files, stop_at(share), groups=groups)

    steps: list[float] = []
    resumed = Detector(**arguments, cache=tmp_path / "stopped").fit(
        files, lambda stage, done, total: steps.append(done / total) if stage == "training" else None, groups=groups
    )
    through = Detector(**arguments, cache=tmp_path / "through").fit(files, groups=groups)
    assert steps[0] >= int(share * 6) / 6
    assert steps[-1] == 1
    same_tensors(resumed, through)


def test_a_second_fit_trains_nothing(by_folds: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    first = Detector(**by_folds, cache=tmp_path).fit(files, groups=labels_of(files))
    second = Detector(**by_folds, cache=tmp_path).fit(files, stop_at(0), groups=labels_of(files))
    same_tensors(first, second)


def test_an_interrupted_fit_leaves_nothing_to_score_with(by_folds: dict[str, Any], files: list[str]) -> None:
    detector = Detector(**by_folds, seed=11)
    with pytest.raises(KeyboardInterrupt):
        detector.fit(files, stop_at(0.5))
    assert not detector.is_fitted
