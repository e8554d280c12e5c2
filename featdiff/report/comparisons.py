"""The result of comparing two models -> what it means in words, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..verdicts.results import counted
from .tables import Grid

#: What the words and the table mean.
EXPLANATION = (
    "AUROC, FPR95 and flagged images in percent; differences are B - A in points, with a 95 % interval for each set on "
    "its own: AUROC by DeLong, FPR95 by resampling. Where an interval holds 0, no difference is shown. That does not "
    "mean that there is none: more images make it narrower."
)
_NONE_SHOWN = "no difference shown"
# With a smaller chance, changed verdicts count as a difference.
_UNLIKELY = 0.05


def set_words(result: Mapping[str, Any]) -> list[list[str]]:
    """For the in-domain set and each OOD set, sentences on it; the first one begins with its name.

    Parameters
    ----------
    result : mapping
        As in :class:`featdiff.evaluation.comparison.Comparison`.
    """
    rates = [f"{100 * model['fpr']:g} %" for model in result["models"]]
    asked = rates[0] if rates[0] == rates[1] else f"{rates[0]} by A and {rates[1]} by B"
    normal = result["id"]
    texts = [[f"in-domain ({counted(normal['n'])}): {_flagged(normal, 'flags')}, where {asked} were asked for"]]
    texts[0].append(_changed(normal))
    for pair in result["pairs"]:
        area = _difference("AUROC", pair["auroc"], higher_is_better=True)
        rate = _difference("FPR95", pair["fpr95"], higher_is_better=False)
        found = [f"{pair['ood']} ({counted(pair['n'])}): {area}", rate, _flagged(pair, "finds"), _changed(pair)]
        texts.append(found)
    return texts


def grid(result: Mapping[str, Any]) -> Grid:
    """One line for each set."""
    normal = result["id"]
    share = ["flagged A", "B", "only A / B"]
    metrics = ["AUROC A", "B", "B - A", "FPR95 A", "B", "B - A"]
    lines = [["in-domain", *[""] * len(metrics) * bool(result["pairs"]), *_shares(normal)]]
    for pair in result["pairs"]:
        cells = [cell for name in ("auroc", "fpr95") for cell in _cells(pair[name])]
        lines.append([pair["ood"], *cells, *_shares(pair)])
    return Grid("", ["set", *metrics * bool(result["pairs"]), *share], lines)


def _shares(part: Mapping[str, Any]) -> list[str]:
    """Flagged by each, and by one alone."""
    changed = f"{len(part['only_a']):,} / {len(part['only_b']):,}"
    return [*(f"{100 * count / part['n']:.1f}" for count in part["flagged"]), changed]


def _cells(metric: Mapping[str, Any]) -> list[str]:
    return [*(f"{100 * value:.1f}" for value in metric["values"]), _interval(metric)]


def _interval(metric: Mapping[str, Any]) -> str:
    low, high = metric["difference_ci"]
    return f"{100 * metric['difference']:+z.1f} [{100 * low:+z.1f}, {100 * high:+z.1f}]"


def _difference(name: str, metric: Mapping[str, Any], higher_is_better: bool) -> str:
    """Both values, and which model is better, if that is shown."""
    a, b = (f"{100 * value:.1f}" for value in metric["values"])
    low, high = (f"{100 * end:+z.1f}" for end in metric["difference_ci"])
    verdict = _NONE_SHOWN
    if metric["is_shown"]:
        verdict = "B is better" if (metric["difference"] > 0) == higher_is_better else "A is better"
    return f"{name} {a} by A, {b} by B, {100 * metric['difference']:+z.1f} points ({low} to {high}): {verdict}"


def _flagged(part: Mapping[str, Any], verb: str) -> str:
    texts = []
    for name, count, (low, high) in zip("AB", part["flagged"], part["flagged_ci"], strict=True):
        texts.append(f"{name} {verb} {count:,}, {100 * count / part['n']:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
    return "; ".join(texts)


def _changed(part: Mapping[str, Any]) -> str:
    """How many verdicts differ, and whether one side has more of them than chance gives."""
    only_a, only_b = len(part["only_a"]), len(part["only_b"])
    if not only_a + only_b:
        return "no verdict differs"
    text = f"{only_a + only_b:,} verdicts differ: {only_a:,} flagged by A alone, {only_b:,} by B alone"
    p = part["mcnemar_p"]
    if p is None:
        return text
    more = f"{'A' if only_a > only_b else 'B'} flags more" if p < _UNLIKELY else f"{_NONE_SHOWN} in how many"
    return f"{text} (McNemar p {p:.2g}): {more}"
