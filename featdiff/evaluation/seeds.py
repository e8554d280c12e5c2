"""A task run with one seed or several -> means, spreads, and how far each method is from featdiff's own score.

A resample draws images and seeds anew, the same ones for every method: in-domain images once for all sets of the task,
OOD images for each set. So differences are paired, and those of means over sets as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.progress import Progress
from .resamples import draw_counts, percentiles, resampled_aurocs, resampled_fprs

#: Scores of a method: of the in-domain images (n_id,) and of the OOD images (n_ood,) of a pair.
PairScores = tuple[np.ndarray, np.ndarray]

_RESAMPLES = 1000
_COMPARED = {"auroc": resampled_aurocs, "fpr95": resampled_fprs}
_AVERAGED = ("auroc", "aupr_in", "aupr_out", "fpr95")


@dataclass(frozen=True)
class Run:
    """What a task gave with one seed.

    Parameters
    ----------
    n_train, n_bank : int
        Images to train, and those of them that baselines are fitted on.
    methods : dict of dict
        What each method costs; with later seeds only what depends on them.
    pairs : list of dict
        As from :func:`featdiff.evaluation.protocols.evaluate_detector`, with the heads of all detectors.
    scores : list of dict
        For each pair the scores of the same heads.
    """

    n_train: int
    n_bank: int
    methods: dict[str, dict[str, float]]
    pairs: list[dict[str, Any]]
    scores: list[dict[str, PairScores]]


@dataclass(frozen=True)
class _Sampled:
    """A number of a method with each seed (S,), and in each resample of images and seeds (R,)."""

    by_seed: np.ndarray
    resampled: np.ndarray

    @classmethod
    def mean(cls, parts: Sequence[_Sampled]) -> _Sampled:
        by_seed = np.mean([part.by_seed for part in parts], axis=0)
        return cls(by_seed, np.mean([part.resampled for part in parts], axis=0))


_Numbers = Mapping[str, _Sampled]  # by name of the metric


def merge_runs(name: str, runs: Sequence[Run], own: str, progress: Progress | None = None) -> dict[str, Any]:
    """The runs of a task as one part of a result, with comparisons.

    Parameters
    ----------
    name : str
        Of the task.
    runs : sequence of Run
        One a seed, of the same images.
    own : str
        The method that the others are compared with.
    progress : callable (stage, done, total), optional

    Returns
    -------
    dict
        A task of :func:`featdiff.evaluation.benchmark.run_suite`.
    """
    first = runs[0]
    weights = _seed_weights(len(runs))
    id_counts: dict[int, np.ndarray] = {}
    numbers: list[dict[str, _Numbers]] = []
    pairs = []
    for i, pair in enumerate(first.pairs):
        numbers.append(_sample_pair(runs, i, id_counts, weights, progress))
        heads = {method: _merged(runs, i, method, numbers[i], own) for method in pair["heads"]}
        pairs.append(pair | {"heads": heads})

    return {
        "name": name,
        "n_train": first.n_train,
        "n_bank": first.n_bank,
        "methods": _merged_costs(runs),
        "pairs": pairs,
        "means": _means(pairs, numbers, own),
    }


def _seed_weights(seeds: int) -> np.ndarray:
    """What share each seed has in each resample (S, R).

    All but one are drawn, with replacement: the mean of so many varies as much as that of S other seeds would. (The
    mean of S drawn ones varies less, by (S - 1) / S.)
    """
    rng = np.random.default_rng(0)
    drawn = rng.integers(seeds, size=(max(seeds - 1, 1), _RESAMPLES))
    weights: np.ndarray = (drawn == np.arange(seeds)[:, None, None]).mean(1)
    return weights


def _sample_pair(
    runs: Sequence[Run], i: int, id_counts: dict[int, np.ndarray], weights: np.ndarray, progress: Progress | None
) -> dict[str, _Numbers]:
    """The numbers of every method for a pair; counts of in-domain images are kept for the next pair.

    Methods have the same images, and thus share counts, unless a backbone has failed on one.
    """
    ood_counts: dict[int, np.ndarray] = {}
    found: dict[str, _Numbers] = {}
    methods = runs[0].scores[i]
    for method, (normal, strange) in methods.items():
        counts = _counts(id_counts, len(normal), 0), _counts(ood_counts, len(strange), i + 1)
        scores = [run.scores[i][method] for run in runs]
        sampled = {}
        for metric, measure in _COMPARED.items():
            by_seed = np.array([run.pairs[i]["heads"][method][metric] for run in runs])
            resampled = np.array([measure(*each, *counts) for each in scores])
            sampled[metric] = _Sampled(by_seed, (weights * resampled).sum(0))
        found[method] = sampled
        if progress:
            progress("differences", len(found), len(methods))
    return found


def _counts(known: dict[int, np.ndarray], size: int, number: int) -> np.ndarray:
    """How often each image of a set is drawn in each resample (n, R); ``number`` tells one set from another."""
    if size not in known:
        (known[size],) = draw_counts([size], _RESAMPLES, [number, size])
    return known[size]


def _merged(runs: Sequence[Run], i: int, method: str, numbers: Mapping[str, _Numbers], own: str) -> dict[str, Any]:
    """Metrics of a method for a pair: means over seeds, spreads, differences."""
    by_seed = [run.pairs[i]["heads"][method] for run in runs]
    metrics: dict[str, Any] = dict(by_seed[0])
    if len(runs) > 1:
        metrics |= {key: float(np.mean([each[key] for each in by_seed])) for key in _AVERAGED}
        metrics["auroc_ci"] = list(percentiles(numbers[method]["auroc"].resampled))
    return metrics | _compared(numbers[method], numbers[own])


def _compared(found: _Numbers, own: _Numbers) -> dict[str, Any]:
    """Spreads over seeds, and differences from the own score with their intervals."""
    row: dict[str, Any] = {}
    for metric, number in found.items():
        several = len(number.by_seed) > 1
        row[f"{metric}_std"] = float(np.std(number.by_seed, ddof=1)) if several else None
        row[f"{metric}_difference"] = float(number.by_seed.mean() - own[metric].by_seed.mean())
        row[f"{metric}_difference_ci"] = list(percentiles(number.resampled - own[metric].resampled))
    return row


def _means(pairs: Sequence[dict[str, Any]], numbers: Sequence[dict[str, _Numbers]], own: str) -> list[dict[str, Any]]:
    """For each protocol the means over its sets."""
    means = []
    for protocol in _unique(pair["protocol"] for pair in pairs):
        chosen = [i for i, pair in enumerate(pairs) if pair["protocol"] == protocol]
        over_sets = {
            method: {metric: _Sampled.mean([numbers[i][method][metric] for i in chosen]) for metric in _COMPARED}
            for method in numbers[chosen[0]]
        }
        heads = {}
        for method, number in over_sets.items():
            values = {metric: float(number[metric].by_seed.mean()) for metric in _COMPARED}
            heads[method] = values | _compared(number, over_sets[own])
        means.append({"protocol": protocol, "ood": [pairs[i]["ood"] for i in chosen], "heads": heads})
    return means


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _merged_costs(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Those of the first seed; the accuracy of a classifier is a mean."""
    costs = {method: dict(cost) for method, cost in runs[0].methods.items()}
    for method, cost in costs.items():
        if "accuracy" in cost:
            cost["accuracy"] = float(np.mean([run.methods[method]["accuracy"] for run in runs]))
    return costs
