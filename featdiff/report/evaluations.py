"""The result of an evaluation -> a verdict in words, and rows of a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..verdicts.calibration import Calibration
from ..verdicts.results import counted

#: Name of the detector's own score among the heads of a result.
OWN = "featdiff"
#: How the names of baselines begin.
BASELINE = "baseline_"
#: Columns of :class:`Section`, after the name of the score.
COLUMNS = ("AUROC", "95 % interval", "FPR95", "AUPR-in", "AUPR-out")
#: What they mean.
EXPLANATION = (
    "All in percent. AUROC, and AUPR with in-domain or OOD images as positives: higher is better. FPR95 is the share "
    "of OOD images that pass at the threshold that 95 % of the in-domain images pass: lower is better."
)
# Baselines whose names are not plain words.
_IN_WORDS = {
    "knn": "kNN",
    "pca": "PCA residual",
    "mahalanobis": "Mahalanobis",
    "mahalanobis_all": "Mahalanobis on all stages",
}
# With a smaller chance, a share of false alarms is called larger than chance explains.
_UNLIKELY = 0.01


class Pair(Protocol):
    """What the metrics of an OOD set are made of; :class:`featdiff.evaluation.protocols.ScoredPair` is such."""

    @property
    def ood(self) -> str: ...
    @property
    def protocol(self) -> str: ...
    @property
    def id_scores(self) -> Mapping[str, np.ndarray]: ...
    @property
    def ood_scores(self) -> Mapping[str, np.ndarray]: ...
    @property
    def id_flags(self) -> np.ndarray: ...
    @property
    def ood_flags(self) -> np.ndarray: ...
    @property
    def id_refs(self) -> Sequence[Any]: ...
    @property
    def ood_refs(self) -> Sequence[Any]: ...
    @property
    def id_contributions(self) -> Mapping[str, np.ndarray]: ...
    @property
    def ood_contributions(self) -> Mapping[str, np.ndarray]: ...
    @property
    def labels(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Evaluated:
    """What is known of one evaluated detector.

    Parameters
    ----------
    result : mapping
        As from :func:`featdiff.evaluation.protocols.evaluate_detector`.
    pairs : sequence of Pair
        One for each pair of the result.
    calibration : Calibration
        Of the detector.
    fpr : float
        Its false-alarm rate.
    """

    result: Mapping[str, Any]
    pairs: Sequence[Pair]
    calibration: Calibration
    fpr: float


@dataclass(frozen=True)
class Section:
    """The part of a table that is about one OOD set.

    Attributes
    ----------
    title : str
        The set, its number of images, and the protocol.
    rows : list of list of str
        The name of a score, and a cell for each of ``COLUMNS``.
    """

    title: str
    rows: list[list[str]]


def baselines_of(heads: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The baselines among the heads of a pair, those of single layers included."""
    return {name: metrics for name, metrics in heads.items() if name.startswith(BASELINE)}


def best_baseline(heads: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The baseline with the highest AUROC (the first, if several have it); None if none was measured."""
    baselines = baselines_of(heads)
    return max(baselines, key=lambda name: baselines[name]["auroc"], default=None)


def in_words(baseline: str) -> str:
    """What people call a baseline: ``baseline_knn`` is ``kNN``."""
    name = baseline.removeprefix(BASELINE)
    if name in _IN_WORDS:
        return _IN_WORDS[name]
    if name.startswith("mahalanobis_"):
        return f"Mahalanobis on {name.removeprefix('mahalanobis_')}"
    return name


def merged(pairs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    """Position of each pair, and its protocol; protocols with the same result for a set are one, named after both.

    They are where no image has to be shrunk.

    Parameters
    ----------
    pairs : sequence of mappings
        As in the result of :func:`featdiff.evaluation.protocols.evaluate_detector`.

    Yields
    ------
    (int, str)
    """
    protocols: dict[tuple[str, str], list[str]] = {}
    first: dict[tuple[str, str], int] = {}
    for i, pair in enumerate(pairs):
        key = (pair["ood"], json.dumps(pair["heads"]))
        first.setdefault(key, i)
        protocols.setdefault(key, []).append(pair["protocol"])

    for key, i in first.items():
        yield i, " and ".join(protocols[key])


def verdicts(
    result: Mapping[str, Any], flagged: Sequence[tuple[int, int]], calibration: Calibration, fpr: float
) -> list[tuple[str, str]]:
    """What a result means, for each OOD set; protocols with the same result are one.

    Parameters
    ----------
    result : mapping
        As from :func:`featdiff.evaluation.protocols.evaluate_detector`.
    flagged : sequence of (int, int)
        For each pair of the result, how many of its in-domain and of its OOD images are flagged.
    calibration : Calibration
        Of the detector.
    fpr : float
        The false-alarm rate that was asked for.

    Returns
    -------
    list of (str, str)
        What is found and what is flagged by mistake; and how featdiff stands to the best baseline.
    """
    texts = []
    for i, protocol in merged(result["pairs"]):
        pair = result["pairs"][i]
        id_flagged, ood_flagged = flagged[i]

        found = f"featdiff finds {_percent(ood_flagged, pair['n_ood'])} of the OOD images"
        found += f" ({ood_flagged:,} of {pair['n_ood']:,})"
        alarms = f"{_percent(id_flagged, pair['n_id'])} of the in-domain images are flagged"
        alarms += f" ({id_flagged:,} of {pair['n_id']:,}), where {100 * fpr:g} % were asked for"
        if chance_of_alarms(id_flagged, pair["n_id"], calibration, fpr) < _UNLIKELY:
            alarms += ": more than chance explains"

        texts.append((f"{pair['ood']}, {protocol}: {found}; {alarms}.", _comparison(pair["heads"])))
    return texts


def chance_of_alarms(flagged: int, n: int, calibration: Calibration, fpr: float) -> float:
    """The chance that so many or more of ``n`` images are flagged, if they are like those that calibrate.

    With G independent calibration images, the rate that a threshold really has is Beta(a, G + 1 - a)-distributed about
    fpr, where a = floor(fpr (G + 1)) (Vovk 2012, arXiv 1209.2673), so the count is beta-binomial.

    Parameters
    ----------
    flagged, n : int
    calibration : Calibration
    fpr : float
        Not below ``calibration.smallest_fpr``.

    Returns
    -------
    float
        In [0, 1].
    """
    from scipy.stats import betabinom  # type: ignore[import-untyped]

    ranks = calibration.groups + 1
    below = max(1, int(fpr * ranks + 1e-9))
    if flagged == 0 or below >= ranks:
        return 1.0
    return float(betabinom.sf(flagged - 1, n, below, ranks - below))


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %"


def _comparison(heads: Mapping[str, Mapping[str, Any]]) -> str:
    """AUROC of featdiff, and how it stands to the best baseline."""
    own = heads[OWN]
    text = f"AUROC {100 * own['auroc']:.1f}"
    name = best_baseline(heads)
    if name is None:
        return f"{text}."

    best = heads[name]
    count = len(baselines_of(heads))
    which = f"the best of {count} baselines" if count > 1 else "the only baseline"
    theirs = f"{in_words(name)}: {100 * best['auroc']:.1f}"

    points = round(100 * own["auroc"], 1) - round(100 * best["auroc"], 1)
    if abs(points) < 0.05:
        return f"{text}, level with {which} ({theirs})."
    if max(own["auroc_ci"][0], best["auroc_ci"][0]) <= min(own["auroc_ci"][1], best["auroc_ci"][1]):
        theirs += "; the intervals overlap"
    return f"{text}, {'ahead of' if points > 0 else 'behind'} {which} by {abs(points):.1f} points ({theirs})."


def sections(result: Mapping[str, Any], all_heads: bool = False) -> list[Section]:
    """The table of a result.

    Parameters
    ----------
    result : mapping
        As from :func:`featdiff.evaluation.protocols.evaluate_detector`.
    all_heads : bool, default False
        Every score that was measured, in place of featdiff and the best baseline.

    Returns
    -------
    list of Section
        One for each OOD set and protocol; protocols with the same result are one.
    """
    table = []
    for i, protocol in merged(result["pairs"]):
        pair = result["pairs"][i]
        heads = pair["heads"]
        names = list(heads) if all_heads else _shown(heads)
        title = f"{pair['ood']} ({counted(pair['n_ood'])}), {protocol}"
        table.append(Section(title, [[name, *_cells(heads[name])] for name in names]))
    return table


def _shown(heads: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """featdiff and the best baseline."""
    best = best_baseline(heads)
    return [OWN] if best is None else [OWN, best]


def _cells(metrics: Mapping[str, Any]) -> list[str]:
    """Metrics of a head in percent."""
    low, high = metrics["auroc_ci"]
    cells = [f"{100 * metrics['auroc']:.1f}", f"{100 * low:.1f} - {100 * high:.1f}"]
    for key in ("fpr95", "aupr_in", "aupr_out"):
        cells.append(f"{100 * metrics[key]:.1f}")
    return cells
