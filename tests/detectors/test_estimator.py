"""Vectors without images: the scikit-learn estimator, and what it keeps of its promises."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_mutations import reseal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from featdiff import FeatureDiffusion, load_detector
from featdiff.exceptions import ModelError, TooFewRows, UsageError
from featdiff.scores.diffusion import DIFFUSION
from featdiff.verdicts.calibration import Calibration

#: Enough to tell apart what is easily told apart.
QUICK = {"epochs": 2, "min_steps": 40, "batch_size": 32}


WIDTH = 24


def inside(n: int, seed: int) -> np.ndarray:
    """Rows (n, 24) near a plane of 6 dimensions, always the same one."""
    plane = np.random.default_rng(100).normal(size=(6, WIDTH))
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 6)) @ plane + 0.2 * rng.normal(size=(n, WIDTH))).astype(np.float32)


def outside(n: int) -> np.ndarray:
    """Rows (n, 24) of the same length in all directions."""
    return np.random.default_rng(101).normal(0, 6**0.5, (n, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> FeatureDiffusion:
    """Do not change it."""
    layers = {"low": slice(0, 8), "high": slice(8, None)}
    return FeatureDiffusion(recipe=QUICK, layers=layers, calibration=0.2).fit(inside(400, 0))


# ---- scikit-learn ----


@pytest.mark.filterwarnings("ignore::featdiff.exceptions.TooFewRows")
@parametrize_with_checks([FeatureDiffusion(recipe={"epochs": 1, "min_steps": 10})])
def test_it_is_a_scikit_learn_estimator(estimator: FeatureDiffusion, check: Any) -> None:
    check(estimator)


def test_it_works_with_neighbours_as_an_estimator() -> None:
    model = FeatureDiffusion(recipe=QUICK, neighbors=3, bank_size=50).fit(inside(200, 0))
    (bank,) = model.heads_.heads.members
    assert bank.scales.shape == (50, 1)
    assert list(model.heads_.heads.scores) == [*DIFFUSION, "neighbors"]
    assert np.median(model.ood_score(outside(50))) > np.quantile(model.ood_score(inside(100, 1)), 0.95)


def test_pipeline_and_grid_search() -> None:
    model = FeatureDiffusion(recipe=QUICK, draws=np.int64(2))
    pipeline = make_pipeline(StandardScaler(), model)
    order = np.random.default_rng(0).permutation(220)
    rows, y = np.concatenate([inside(200, 0), outside(20)])[order], np.repeat([1, -1], [200, 20])[order]
    search = GridSearchCV(pipeline, {"featurediffusion__blocks": [1, 2]}, scoring="roc_auc", cv=2)
    search.fit(rows, y)
    assert search.best_score_ > 0.9
    assert search.best_estimator_[-1].heads_.heads.diffusion.noise.shape == (1, 2, WIDTH + 2)
    assert np.array_equal(search.predict(rows) == -1, search.decision_function(rows) < 0)


def test_layer_scores_as_a_table() -> None:
    """``set_output``, alone and in a pipeline: a score for each layer, under its name."""
    model = FeatureDiffusion(layers={"early": slice(0, 8), "late": slice(8, None)}, recipe=QUICK)
    new = inside(5, 1)
    table = clone(model).set_output(transform="pandas").fit(inside(100, 0)).transform(new)
    assert list(table.columns) == ["layer_early", "layer_late"]
    scores = model.fit(inside(100, 0)).verdicts(new, list("abcde"))
    np.testing.assert_allclose(table["layer_late"], scores.layers["late"], rtol=1e-6)
    chain = make_pipeline(StandardScaler(), clone(model)).set_output(transform="pandas")
    assert list(chain.fit_transform(inside(100, 0)).columns) == ["layer_early", "layer_late"]


def test_parameters_are_kept_as_given() -> None:
    layers = [slice(0, 3), slice(3, 9)]
    model = FeatureDiffusion(layers=layers, fpr=7, recipe="nonsense")
    assert model.layers is layers and model.fpr == 7 and model.recipe == "nonsense"
    copy = clone(model)
    assert copy.layers == layers and copy.layers is not layers


# ---- the score ----


def test_strange_rows_score_higher(fitted: FeatureDiffusion) -> None:
    home, away = fitted.ood_score(inside(300, 1)), fitted.ood_score(outside(300))
    assert abs(np.median(home)) < 0.7
    assert (away[:, None] > home).mean() > 0.97
    assert np.array_equal(fitted.score_samples(outside(5)), -fitted.ood_score(outside(5)))


def test_scores_of_the_calibration_rows_have_mean_0_and_std_1(fitted: FeatureDiffusion) -> None:
    """Of each layer, too; fresh in-domain rows are about there."""
    scores = fitted.calibration_.scores
    assert abs(scores.mean()) < 1e-3 and abs(scores.std() - 1) < 1e-3
    rows = inside(400, 0)  # those of fit, of which 80 calibrate
    own = fitted.ood_score(rows)
    held_out = rows[[int(np.argmin(abs(own - score))) for score in scores]]
    layers = fitted.transform(held_out)
    np.testing.assert_allclose(layers.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(layers.std(0), 1, atol=1e-3)

    fresh = inside(300, 1)
    assert abs(fitted.ood_score(fresh).mean()) < 0.5 and 0.5 < fitted.ood_score(fresh).std() < 2
    assert (abs(fitted.transform(fresh).mean(0)) < 0.5).all()


def test_rescaling_changes_no_p_value(fitted: FeatureDiffusion) -> None:
    rows = np.concatenate([inside(100, 1), outside(20)])
    heads = fitted.heads_.heads
    location, scale = (values[0].double().item() for values in (heads.location, heads.scale))
    unscaled = Calibration(fitted.calibration_.scores * scale + location)
    np.testing.assert_array_equal(unscaled.p_values(fitted.ood_score(rows) * scale + location), fitted.p_values(rows))


def test_false_alarms_on_new_rows_come_at_the_rate_asked_for() -> None:
    """Mean over ten fits; its standard deviation is about 0.01."""
    found = [
        np.mean(FeatureDiffusion(recipe={"epochs": 1, "min_steps": 5}, fpr=0.1, random_state=seed)
                .fit(inside(500, seed)).predict(inside(1000, 50 + seed)) == -1)
        for seed in range(10)
    ]  # fmt: skip
    assert 0.06 < np.mean(found) < 0.13


def test_predict_is_the_conformal_rule(fitted: FeatureDiffusion) -> None:
    rows = np.concatenate([inside(200, 1), outside(30)])
    p = fitted.p_values(rows)
    assert np.array_equal(fitted.predict(rows) == -1, p <= 0.05)
    assert 0 < (p <= 0.05).sum() < len(rows)
    n = len(fitted.calibration_)
    assert n == 80 and np.allclose(p * (n + 1), np.round(p * (n + 1)))
    # a tie with the threshold is not an outlier, the next larger score is
    assert -fitted.offset_ in fitted.calibration_.scores


def test_contamination_is_a_share_of_the_training_rows() -> None:
    rows = np.concatenate([inside(180, 0), outside(20)])
    model = FeatureDiffusion(recipe=QUICK, contamination=0.1).fit(rows)
    assert (model.predict(rows) == -1).sum() == 20
    assert model.offset_ == np.percentile(model.score_samples(rows), 10)


def test_scores_do_not_depend_on_the_batch(fitted: FeatureDiffusion) -> None:
    rows = np.concatenate([inside(600, 1), outside(30)])
    whole = fitted.ood_score(rows)
    order = np.random.default_rng(0).permutation(len(rows))
    assert np.abs(fitted.ood_score(rows[order]) - whole[order]).max() < 1e-6
    assert np.abs(np.concatenate([fitted.ood_score(part) for part in np.array_split(rows, 9)]) - whole).max() < 1e-6
    assert np.abs(fitted.ood_score(rows[:1])[0] - whole[0]) < 1e-6


def test_random_state_decides_everything_and_global_generators_are_left_alone() -> None:
    rows, probe = inside(100, 0), inside(20, 1)
    torch.manual_seed(5), np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    same = [FeatureDiffusion(recipe=QUICK, random_state=3).fit(rows).ood_score(probe) for _ in range(2)]
    fresh = [FeatureDiffusion(recipe=QUICK, random_state=None).fit(rows).ood_score(probe) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert np.array_equal(*same)
    assert not np.allclose(*fresh) and not np.allclose(fresh[0], same[0])
    source = np.random.RandomState(3)  # noqa: NPY002
    assert np.array_equal(FeatureDiffusion(recipe=QUICK, random_state=source).fit(rows).ood_score(probe), same[0])


def test_unit_of_the_numbers_does_not_matter() -> None:
    rows, probe = inside(150, 0), np.concatenate([inside(20, 1), outside(20)])
    plain, tiny = (FeatureDiffusion(recipe=QUICK).fit(rows * unit).ood_score(probe * unit) for unit in (1, 2.0**-20))
    assert np.allclose(plain, tiny, atol=1e-4)


def test_level_and_length_of_a_row_are_seen() -> None:
    """What a row's normalisation alone would hide."""
    rng = np.random.default_rng(0)
    rows = 1 + 0.1 * rng.normal(size=(400, 2)) + rng.normal(size=(400, 1)) * [0.1, 0.3]
    model = FeatureDiffusion(recipe={"epochs": 3, "min_steps": 300}).fit(rows)
    assert (model.predict(rows + 4) == -1).mean() > 0.9
    assert (model.predict(4 * rows) == -1).mean() > 0.9
    assert (model.predict(rows) == -1).mean() < 0.12


def test_any_finite_row_has_a_score(fitted: FeatureDiffusion) -> None:
    big = np.float32(3e38)
    rows = np.stack([np.zeros(WIDTH), np.full(WIDTH, big), outside(1)[0] / 10 * big, np.full(WIDTH, 1e-38)])
    assert np.isfinite(fitted.ood_score(rows)).all()
    assert fitted.predict(rows)[2] == -1


def test_copies_count_once() -> None:
    rows = inside(120, 0)
    signed = rows.copy()
    signed[0, 0], rows[0, 0] = -0.0, 0.0
    model = FeatureDiffusion(recipe=QUICK).fit(np.concatenate([rows, signed, rows[:30]]))
    assert (model.n_rows_, model.n_duplicates_) == (120, 150)
    assert np.array_equal(model.calibration_.scores, FeatureDiffusion(recipe=QUICK).fit(rows).calibration_.scores)


# ---- refusals ----


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([slice(0, 8), slice(7, 12)], "share columns"),
        ([slice(0, 8), slice(8, 25)], "columns 0:24"),
        ([slice(4, 4)], "(4:4) must name one or more"),
        ([slice(-4, None)], "columns 0:24"),
        ([slice(0, 8, 2)], "(0:8:2)"),
        ([slice(0.0, 8)], "whole numbers"),
        ([], "list of slices"),
        ([(0, 8)], "list of slices"),
        ("0:8", "list of slices"),
        ({1: slice(0, 8)}, "list of slices"),
    ],
    ids=str,
)
def test_layers_are_checked(layers: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        FeatureDiffusion(layers=layers, recipe=QUICK).fit(inside(30, 0))
    assert words in str(caught.value)


def test_columns_outside_all_layers_are_not_looked_at() -> None:
    rows, probe = inside(120, 0), inside(10, 1)
    model = FeatureDiffusion(layers=[slice(12, 24), slice(0, 6)], recipe=QUICK).fit(rows)
    before = model.ood_score(probe)
    probe[:, 6:12] = 1000
    assert np.array_equal(model.ood_score(probe), before)
    probe[:, 5] = 1000
    assert (model.ood_score(probe) > before).all()


@pytest.mark.parametrize(
    "given",
    [
        {"contamination": 0.6},
        {"contamination": 0},
        {"contamination": "some"},
        {"fpr": 1},
        {"calibration": 0.5},
        {"hidden_max": 0},
        {"blocks": 1.5},
        {"start_times": (100,)},
        {"start_times": 5},
        {"draws": 0},
        {"neighbors": -1},
        {"neighbors": 9, "bank_size": 8},
        {"coreset": "best"},
        {"recipe": {"speed": 3}},
        {"random_state": -1},
        {"random_state": "seven"},
    ],
    ids=str,
)
def test_parameters_are_checked_by_fit(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        FeatureDiffusion(**{"recipe": QUICK, **given}).fit(inside(30, 0))
    assert next(iter(given)) in str(caught.value) or "false-alarm" in str(caught.value) or "bank" in str(caught.value)


def test_rows_must_be_finite_and_different(fitted: FeatureDiffusion) -> None:
    rows = inside(30, 0)
    rows[4, 2] = np.nan
    for call in (FeatureDiffusion(recipe=QUICK).fit, fitted.score_samples):
        with pytest.raises(ValueError, match="NaN"):
            call(rows)
    with pytest.raises(UsageError, match="too few different rows, 2:"):
        FeatureDiffusion(recipe=QUICK).fit(rows[[0, 1, 0, 1, 0]])
    with pytest.raises(NotFittedError):
        FeatureDiffusion().p_values(inside(3, 0))


def test_few_rows_get_the_least_rate_they_support_and_a_warning() -> None:
    with pytest.warns(TooFewRows, match=r"fpr 0\.05 needs about 95 different rows.* 0\.12 or more") as warned:
        model = FeatureDiffusion(recipe=QUICK, calibration=0.2).fit(inside(40, 0))
    assert warned[0].filename == __file__  # the line that called fit
    assert model.fpr_ == 1 / 9
    rows = np.concatenate([inside(100, 1), outside(10)])
    assert np.array_equal(model.predict(rows) == -1, model.p_values(rows) <= 1 / 9)


# ---- save and load ----


def test_saved_and_pickled_models_say_the_same(fitted: FeatureDiffusion, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path / "model")
    rows = np.concatenate([inside(50, 1), outside(10)])
    for other in (FeatureDiffusion.from_pretrained(tmp_path / "model"), pickle.loads(pickle.dumps(fitted))):
        assert np.array_equal(other.decision_function(rows), fitted.decision_function(rows))
        assert np.array_equal(other.p_values(rows), fitted.p_values(rows))
        assert other.layers_ == fitted.layers_ == {"low": slice(0, 8), "high": slice(8, 24)}
        assert (other.n_features_in_, other.n_rows_, other.fpr_) == (24, 400, 0.05)
    other.save_pretrained(tmp_path / "model")  # replaces the first


@pytest.mark.parametrize(
    "given",
    [
        {"contamination": 0.25, "neighbors": 2, "bank_size": 20, "coreset": "random"},
        {"layers": [slice(0, 4), slice(6, 10)], "random_state": np.random.RandomState(1), "fpr": np.float64(0.2)},  # noqa: NPY002
    ],
    ids=["bank", "layers"],
)
def test_all_parameters_can_be_saved(given: dict[str, Any], tmp_path: Path) -> None:
    model = FeatureDiffusion(recipe=QUICK, **given).fit(inside(100, 0))
    model.save_pretrained(tmp_path)
    other, rows = FeatureDiffusion.from_pretrained(tmp_path), inside(30, 1)
    assert np.array_equal(other.decision_function(rows), model.decision_function(rows))
    assert (other.layers, other.contamination, other.fpr) == (model.layers, model.contamination, model.fpr)


def test_names_of_columns_survive(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({f"c{i}": column for i, column in enumerate(inside(100, 0).T)})
    model = FeatureDiffusion(recipe=QUICK).fit(table)
    assert list(model.feature_names_in_) == table.column_names
    model.save_pretrained(tmp_path)
    other = FeatureDiffusion.from_pretrained(tmp_path)
    assert np.array_equal(other.ood_score(table), model.ood_score(table))
    with pytest.raises(ValueError, match="feature names"):
        other.ood_score(table.select(table.column_names[::-1]))


def test_damaged_models_are_refused(fitted: FeatureDiffusion, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    for change in (
        {"width": 20},
        {"width": None},
        {"offset": "low"},
        {"layers": {"low": 8, "high": 15}},
        {"settings": {}},
        {"settings": whole["settings"] | {"wings": 2}},
        {"settings": whole["settings"] | {"layers": {"low": [0, 8], "high": [8]}}},
        {"settings": whole["settings"] | {"hidden_max": 32}},
        {"settings": whole["settings"] | {"layers": 7}},
        {"settings": whole["settings"] | {"fpr": 1}},
        {"images": whole["images"] | {"calibration": 79}},
        {"images": whole["images"] | {"calibration_groups": 0}},
        {"images": whole["images"] | {"different": -1}},
        {"images": whole["images"] | {"bank": -1}},
        {"fpr": 0},
        {"fpr": 1.0},
        {"feature_names": ["one"]},
        {"feature_names": [1] * whole["width"]},
        {"training_seconds": -1},
    ):
        (tmp_path / "config.json").write_text(json.dumps(whole | change))
        reseal(tmp_path)
        with pytest.raises(ModelError, match="damaged"):
            FeatureDiffusion.from_pretrained(tmp_path)


def test_models_of_images_and_of_vectors_are_not_mixed_up(
    fitted: FeatureDiffusion, tiny_model: Path, tmp_path: Path
) -> None:
    fitted.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="trained on vectors.*file of features.*FeatureDiffusion"):
        load_detector(tmp_path)
    with pytest.raises(ModelError, match="trained on images"):
        FeatureDiffusion.from_pretrained(tiny_model)


def test_verdicts_name_what_cannot_be_scored(fitted: FeatureDiffusion) -> None:
    rows = np.concatenate([inside(3, 1), outside(1)])
    rows[1, 3] = np.inf
    scores = fitted.verdicts(rows, ["a", "b", "c", "d"], 0.1)
    assert scores.status == ["ok", "unreadable", "ok", "ok"] and "infinite" in scores.reason[1]
    assert scores.columns[-2:] == ["layer_low", "layer_high"]
    good = [0, 2, 3]
    assert np.array_equal(scores.ood_score[good], fitted.ood_score(rows[good]))
    assert np.array_equal(scores.is_ood[good], fitted.p_values(rows[good]) <= 0.1)
    assert scores.is_ood[3] and np.isnan(scores.p_value[1]) and not scores.is_ood[1]
    with pytest.raises(UsageError, match="at least 999"):
        fitted.verdicts(rows, ["a", "b", "c", "d"], 0.001)
    with pytest.raises(UsageError, match="5 columns, and 24"):
        fitted.verdicts(rows[:, :5], ["a", "b", "c", "d"])
    assert fitted.verdicts(rows[1:2], ["b"]).status == ["unreadable"]
