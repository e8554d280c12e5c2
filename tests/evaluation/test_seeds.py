"""Runs with several seeds as one result: means, spreads and paired differences, compared with explicit resamples."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from featdiff.evaluation import seeds as module
from featdiff.evaluation.metrics import evaluate, fpr_at_tpr
from featdiff.evaluation.paired import auroc_difference
from featdiff.evaluation.seeds import PairScores, Run, merge_runs

N_ID = 80
SETS = {"a": 60, "b": 90}
METRICS = ("auroc", "fpr95")


def as_run(scores: list[dict[str, PairScores]], protocols: tuple[str, ...] = ("matched", "matched")) -> Run:
    pairs = []
    for ood, protocol, by_method in zip(SETS, protocols, scores, strict=False):
        heads = {method: evaluate(*each, resamples=50).to_dict() for method, each in by_method.items()}
        pairs.append({"ood": ood, "protocol": protocol, "n_id": N_ID, "n_ood": SETS[ood], "heads": heads})
    costs = {"images_per_second": 1.0, "training_seconds": 1.0, "megabytes": 1.0}
    return Run(9, 8, {method: dict(costs) for method in scores[0]}, pairs, scores)


def drawn(seed: int, **better: float) -> list[dict[str, PairScores]]:
    """Scores of methods that see much the same in the images, and OOD images so much better; noise by the seed."""
    images, noise = np.random.default_rng(7), np.random.default_rng(seed)
    normal = images.normal(size=N_ID)
    sets = [images.normal(1, 1, count) for count in SETS.values()]
    of_id = {method: normal + 0.5 * noise.normal(size=N_ID) for method in better}
    return [
        {method: (of_id[method], strange + by + 0.5 * noise.normal(size=len(strange))) for method, by in better.items()}
        for strange in sets
    ]


def head(task: dict[str, Any], method: str, pair: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = task["pairs"][pair]["heads"][method]
    return found


def measured(normal: np.ndarray, strange: np.ndarray) -> np.ndarray:
    area = roc_auc_score(np.repeat([0, 1], [len(normal), len(strange)]), np.concatenate([normal, strange]))
    return np.array([area, fpr_at_tpr(normal, strange)])


def explicit(runs: list[list[dict[str, PairScores]]], method: str, resamples: int) -> np.ndarray:
    """The method - featdiff, (resamples, sets, metrics): images and seeds drawn one by one."""
    seeds = np.random.default_rng(0).integers(len(runs), size=(max(len(runs) - 1, 1), resamples))
    id_rng = np.random.default_rng([0, N_ID])
    ood_rngs = [np.random.default_rng([number, count]) for number, count in enumerate(SETS.values(), 1)]
    found = np.zeros((resamples, len(SETS), len(METRICS)))
    for i in range(resamples):
        inside = id_rng.integers(N_ID, size=N_ID)
        for k, (rng, count) in enumerate(zip(ood_rngs, SETS.values(), strict=True)):
            outside = rng.integers(count, size=count)
            for seed in seeds[:, i]:
                by_method = runs[seed][k]
                values = [measured(by_method[m][0][inside], by_method[m][1][outside]) for m in (method, "featdiff")]
                found[i, k] += (values[0] - values[1]) / len(seeds)
    return found


@pytest.mark.parametrize("count", [1, 3])
def test_intervals_are_those_of_explicit_resamples(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RESAMPLES", 100)
    runs = [drawn(seed, featdiff=0.3, other=0.0) for seed in range(count)]
    task = merge_runs("t", [as_run(scores) for scores in runs], "featdiff")
    differences = explicit(runs, "other", 100)
    for k in range(len(SETS)):
        for m, metric in enumerate(METRICS):
            found = head(task, "other", k)
            assert found[f"{metric}_difference"] == pytest.approx(
                found[metric] - head(task, "featdiff", k)[metric], abs=1e-12
            )
            expected = np.quantile(differences[:, k, m], [0.025, 0.975])
            assert found[f"{metric}_difference_ci"] == pytest.approx(list(expected), abs=1e-12)

    (means,) = task["means"]
    assert (means["protocol"], means["ood"]) == ("matched", ["a", "b"])
    for m, metric in enumerate(METRICS):
        both = [head(task, "other", k)[metric] for k in range(len(SETS))]
        assert means["heads"]["other"][metric] == pytest.approx(np.mean(both), abs=1e-12)
        expected = np.quantile(differences[:, :, m].mean(1), [0.025, 0.975])
        assert means["heads"]["other"][f"{metric}_difference_ci"] == pytest.approx(list(expected), abs=1e-12)


def test_the_interval_is_about_that_of_delong() -> None:
    scores = drawn(0, featdiff=0.3, other=0.0)
    found = head(merge_runs("t", [as_run(scores)], "featdiff"), "other")
    (own_id, own_ood), (id_scores, ood_scores) = scores[0]["featdiff"], scores[0]["other"]
    expected = auroc_difference((own_id, id_scores), (own_ood, ood_scores))
    assert found["auroc_difference"] == pytest.approx(expected.difference, abs=1e-12)
    assert found["auroc_difference_ci"] == pytest.approx(list(expected.interval), abs=0.01)


@pytest.mark.parametrize("count", [1, 2])
def test_the_same_scores_do_not_differ(count: int) -> None:
    runs = []
    for seed in range(count):
        scores = drawn(seed, featdiff=0.3)
        runs.append(as_run([by_method | {"twin": by_method["featdiff"]} for by_method in scores]))
    task = merge_runs("t", runs, "featdiff")
    for found in (head(task, "twin"), head(task, "featdiff"), task["means"][0]["heads"]["twin"]):
        for metric in METRICS:
            assert (found[f"{metric}_difference"], found[f"{metric}_difference_ci"]) == (0, [0, 0])


def test_one_seed_leaves_all_as_it_was_measured() -> None:
    run = as_run(drawn(0, featdiff=0.3, other=0.0))
    task = merge_runs("t", [run], "featdiff")
    assert (task["name"], task["n_train"], task["n_bank"], task["methods"]) == ("t", 9, 8, run.methods)
    for pair, before in zip(task["pairs"], run.pairs, strict=True):
        for method, metrics in before["heads"].items():
            assert {key: pair["heads"][method][key] for key in metrics} == metrics
            assert pair["heads"][method]["auroc_std"] is None
    assert json.loads(json.dumps(task)) == task


def test_means_and_spreads_over_seeds() -> None:
    runs = [as_run(drawn(seed, featdiff=0.3, other=0.0)) for seed in range(4)]
    task = merge_runs("t", runs, "featdiff")
    found, by_seed = head(task, "other"), [run.pairs[0]["heads"]["other"] for run in runs]
    for key in ("auroc", "fpr95", "aupr_in", "aupr_out"):
        assert found[key] == pytest.approx(np.mean([each[key] for each in by_seed]), abs=1e-12)
    for metric in METRICS:
        values = [each[metric] for each in by_seed]
        assert found[f"{metric}_std"] == pytest.approx(np.std(values, ddof=1), abs=1e-12) and np.ptp(values) > 0
        over_sets = [np.mean([pair["heads"]["other"][metric] for pair in run.pairs]) for run in runs]
        assert task["means"][0]["heads"]["other"][f"{metric}_std"] == pytest.approx(np.std(over_sets, ddof=1))
    low, high = found["auroc_ci"]
    assert low < found["auroc"] < high


def test_seeds_that_disagree_widen_the_interval() -> None:
    """Two methods whose order hangs on the seed are within noise, however sure each seed alone is of it."""
    first, second = drawn(0, featdiff=0.0, other=1.5), drawn(0, featdiff=1.5, other=0.0)
    alone = head(merge_runs("t", [as_run(first)], "featdiff"), "other")["auroc_difference_ci"]
    both = head(merge_runs("t", [as_run(first), as_run(second)], "featdiff"), "other")["auroc_difference_ci"]
    assert alone[0] > 0
    assert both[0] < 0 < both[1]


@pytest.mark.parametrize("count", [2, 5])
def test_seeds_vary_as_the_mean_of_so_many_does(count: int) -> None:
    values = np.random.default_rng(0).normal(size=count)
    means = values @ module._seed_weights(count)
    assert means.std() == pytest.approx(np.std(values, ddof=1) / np.sqrt(count), rel=0.1)
    assert means.mean() == pytest.approx(values.mean(), abs=0.1 * values.std())


def test_protocols_have_means_of_their_own() -> None:
    run = as_run(drawn(0, featdiff=0.3, other=0.0), ("matched", "as-published"))
    task = merge_runs("t", [run], "featdiff")
    assert [(each["protocol"], each["ood"]) for each in task["means"]] == [("matched", ["a"]), ("as-published", ["b"])]
    for pair, means in zip(task["pairs"], task["means"], strict=True):
        found = means["heads"]["other"]
        assert found == {key: pair["heads"]["other"][key] for key in found}


def test_a_method_that_fails_on_an_image_is_still_compared() -> None:
    scores = drawn(0, featdiff=0.3, other=0.3)
    fewer = [by_method | {"other": (by_method["other"][0][1:], by_method["other"][1])} for by_method in scores]
    whole, found = (head(merge_runs("t", [as_run(each)], "featdiff"), "other") for each in (scores, fewer))
    widths = [np.ptp(each["auroc_difference_ci"]) for each in (whole, found)]
    assert widths[1] > widths[0] > 0  # in-domain images are not paired


def test_costs_are_of_the_first_seed_and_accuracies_are_means() -> None:
    runs = [as_run(drawn(seed, featdiff=0.3)) for seed in (0, 1)]
    for run, accuracy in zip(runs, (0.8, 0.9), strict=True):
        run.methods["featdiff"] |= {"accuracy": accuracy, "megabytes": accuracy}
    costs = merge_runs("t", runs, "featdiff")["methods"]["featdiff"]
    assert (costs["accuracy"], costs["megabytes"]) == (pytest.approx(0.85), 0.8)
