"""Features and a plan of who trains and who calibrates -> fitted scores, and what calibrates them.

What the detectors' fit leaves to others, be it on images or on rows of numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..data.splits import Plan, Split
from ..diffusion.training import Recipe, TrainingState
from ..features.store import Features, Rows
from ..runtime.progress import part_of
from ..scores.coreset import coreset
from ..scores.fused import Heads, Measured
from ..scores.registry import Context
from .soundness import SAMPLE, check_sensitive, check_spread

# Choosing among many more rows than are kept needs memory and time, and gains nothing.
_CANDIDATES = 20
# Training on takes this share of the steps of a training anew, at this share of its learning rate. Set once, on
# CIFAR-10 (tests/benchmarks/RESULTS.md).
_STEPS = 0.125
_RATE = 0.5
# So often the held-out loss is measured.
_CHECKS = 4


@dataclass(frozen=True)
class Bank:
    """Which of the rows that train are kept, to look up neighbours in.

    Parameters
    ----------
    size : int
        How many, at most.
    method : str
        See :func:`featdiff.scores.coreset.coreset`.
    seed : int
    """

    size: int
    method: str
    seed: int


@dataclass(frozen=True)
class Fitted:
    """What came of a fit.

    Attributes
    ----------
    heads : Heads
        Fitted, with the scale of its scores.
    bank : ndarray of int
        Rows that the scores keep.
    calibration : ndarray of shape (n,)
        Scores of the rows that calibrate, higher = more OOD.
    layers : dict of str to ndarray of shape (n,)
        Their scores of each layer.
    validation_loss, seconds : float
        Of the training of the denoisers that are kept; time of all trainings.
    """

    heads: Heads
    bank: np.ndarray
    calibration: np.ndarray
    layers: dict[str, np.ndarray]
    validation_loss: float
    seconds: float


def fit_heads(
    features: Features,
    plan: Plan,
    bank: Bank,
    new_heads: Callable[[int], Heads],
    context_of: Callable[[Split], Context],
    measure: Callable[[Heads, Features], Measured] = Heads.measure_all,
) -> Fitted:
    """Fit scores, and calibrate them on rows that they have not seen.

    With folds, each row is measured by scores that were fitted without it and its group. Those measurements set the
    statistics of the final scores, which are fitted on all rows, and calibrate them (as in cross-conformal prediction,
    Vovk 2015, arXiv 1208.0806, but with one final model). The final scores have seen a quarter more rows than those of
    a fold, so that p-values err towards too large, if at all.

    Parameters
    ----------
    features : Features
        Rows (N, D) of different contents.
    plan : Plan
    bank : Bank
    new_heads : callable
        Number of rows in the bank -> unfitted scores.
    context_of : callable
        Split -> how to train on it.
    measure : callable, optional
        Fitted scores and features -> what they measure.

    Returns
    -------
    Fitted

    Raises
    ------
    FeatdiffError
        What was fitted cannot tell strange rows from ordinary ones.
    """
    count = len(plan.folds) + 1
    parts = []
    seconds = 0.0
    for number, fold in enumerate(plan.folds):
        context = _part_of(context_of(fold), number, count)
        heads, _, state = _fit(features, fold.training, bank, new_heads, context)
        parts.append(measure(heads, features.select(fold.calibration)))
        seconds += state.seconds

    final = plan.final
    candidates = np.sort(np.concatenate([final.training, final.validation])) if plan.folds else final.training
    context = _part_of(context_of(final), count - 1, count)
    heads, kept, state = _fit(features, candidates, bank, new_heads, context)
    if plan.folds:
        measured = Measured.concatenate(parts)
        heads.fit_statistics(measured)
    else:
        measured = measure(heads, features.select(final.calibration))

    scores, layers = calibrated(heads, measured, features[final.training[:SAMPLE]], measure)
    return Fitted(heads, kept, scores, layers, state.best_loss, seconds + state.seconds)


def calibrated(
    heads: Heads,
    measured: Measured,
    some: Tensor,
    measure: Callable[[Heads, Features], Measured] = Heads.measure_all,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The end of every fit: the scale of the scores, from the rows that calibrate, and a check of what was fitted.

    Parameters
    ----------
    heads : Heads
    measured : Measured
        Of the rows that calibrate.
    some : Tensor of shape (B, D)
        Rows that train.
    measure : callable, optional
        As for :func:`fit_heads`.

    Returns
    -------
    scores : ndarray of shape (n,)
        Of the rows that calibrate.
    layers : dict of str to ndarray of shape (n,)
        Their scores of each layer.

    Raises
    ------
    FeatdiffError
        What was fitted cannot tell strange rows from ordinary ones.
    """
    unscaled = heads.combined(measured)
    heads.fit_scale(unscaled)
    scores, *layers = heads.rescaled(unscaled).T.double().cpu().numpy()

    def score(rows: Tensor) -> np.ndarray:
        return heads.rescaled(heads.combined(measure(heads, Rows(rows))))[:, 0].double().cpu().numpy()

    check_spread(scores)
    own = heads.scores.get(heads.head)
    if own is None or not own.reads_logits:
        check_sensitive(some, heads.layout, score, scores)
    return scores, dict(zip(heads.layers, layers, strict=True))


def _fit(
    features: Features, candidates: np.ndarray, bank: Bank, new_heads: Callable[[int], Heads], context: Context
) -> tuple[Heads, np.ndarray, TrainingState]:
    """Fitted scores, the rows that they keep of the candidates, and what came of training."""
    size = min(bank.size, len(candidates))
    heads = new_heads(size)
    kept = choose_bank(features, candidates, size, bank.method, bank.seed, heads.diffusion.stages)
    return heads, kept, heads.fit(features.select(kept), context)


def _part_of(context: Context, number: int, count: int) -> Context:
    """The context of one of several trainings, which reports its progress as a part of all."""
    return replace(context, progress=part_of(context.progress, number, count))


def choose_bank(
    features: Features, training: np.ndarray, size: int, method: str, seed: int, view: Callable[[Tensor], Tensor]
) -> np.ndarray:
    """At most ``size`` of the training rows, to look up neighbours in.

    Parameters
    ----------
    features : Features
    training : ndarray of int
        Rows that train.
    size : int
    method : str
        See :func:`featdiff.scores.coreset.coreset`.
    seed : int
    view : callable
        Rows of features (n, D) -> the vectors among which to choose.

    Returns
    -------
    ndarray of int
        Ascending.
    """
    order = np.random.default_rng(seed).permutation(training)
    most = size if method == "random" else _CANDIDATES * size
    rows = np.sort(order[:most])
    if len(rows) > size:
        rows = rows[coreset(view(features[rows]), size, method, seed)]
    return rows


def further(recipe: Recipe, count: int) -> Recipe:
    """How to train on from where a training of ``count`` samples has ended."""
    epochs, per_epoch = recipe.plan(count)
    steps = max(1, round(_STEPS * epochs * per_epoch))
    return replace(
        recipe,
        epochs=1,
        learning_rate=_RATE * recipe.learning_rate,
        min_steps=steps,
        max_steps=steps,
        epoch_steps=max(1, steps // _CHECKS),
    )


def as_digests(digests: list[bytes], rows: np.ndarray) -> np.ndarray:
    """Digests of these rows as an array (n, 16) of bytes."""
    return np.frombuffer(bytearray().join(digests[i] for i in rows), dtype=np.uint8).reshape(-1, 16)
