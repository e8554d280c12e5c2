"""Scores of layers and heads -> plain sentences about what is unusual in an image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from ..scores.fused import Heads
from ..scores.joint import GLOBAL, LOCAL
from ..scores.nearest import NearestNeighbors
from ..verdicts.explanation import Contribution, Neighbor
from ..verdicts.results import ERROR, OK, Row

#: Standard deviations from which on something counts as unusual.
UNUSUAL = 2.0
_VERY = 5.0
# A p-value from which on something counts as ordinary.
_ORDINARY = 0.2
# The share of a picture that counts as nearly all of it.
_EVERYWHERE = 0.9
# The hottest place is named if it stands out by so many standard deviations.
_STANDS_OUT = 1.0
# How many things are named.
_MOST = 3
# Early layers of a network see textures, middle ones parts of things, the last ones what is shown.
_TEXTURE = "fine texture and colour"
_PARTS = "shapes and parts"
_CONTENT = "overall content"
# What a distance to the nearest normal images looks at.
_FAR = "distance from normal images"
_SLASH = r"[/\\]"
_ANSWER = "the classifier's answer"


def labels(heads: Heads) -> dict[str, str]:
    """What each contribution to a detector's own score looks at, by name, in plain words."""
    words = {f"layer_{name}": label for name, label in layer_labels(heads.layout.stage_names).items()}
    for name, score in heads.scores.items():
        if isinstance(score, NearestNeighbors):
            words[name] = _FAR
        elif score.reads_logits:
            words[name] = _ANSWER
    return words


def layer_labels(names: Sequence[str]) -> dict[str, str]:
    """What each layer of a network sees, by its place among them, early ones first.

    Examples
    --------
    >>> layer_labels(["stem", "stage1", "stage2", "stage3"])["stem"]
    'fine texture and colour'
    >>> layer_labels(["stem", "stage1", "stage2", "stage3"])["stage3"]
    'overall content'
    """
    words = {}
    for i, name in enumerate(names):
        depth = i / (len(names) - 1) if len(names) > 1 else 1.0
        words[name] = _TEXTURE if depth <= 1 / 3 else _PARTS if depth < 0.9 else _CONTENT
    return words


def sentences(
    row: Row,
    heads: Sequence[Contribution],
    nearest: Sequence[Neighbor],
    known: bool,
    heat: np.ndarray | None,
    heat_threshold: float,
) -> tuple[str, ...]:
    """Why an image was judged as it was, the most important first.

    Parameters
    ----------
    row : Row
        Its verdict.
    heads : sequence of Contribution
    nearest : sequence of Neighbor
        The nearest normal images.
    known : bool
        Whether it is one of the training images.
    heat : ndarray of shape (H, W), optional
        NaN where nothing was seen.
    heat_threshold : float

    Returns
    -------
    tuple of str
    """
    if row.status == ERROR:
        return ("The model fails on this image: its score is not finite.",)
    if row.status != OK:
        return ()
    about_places = [] if heat is None else _about_places(heat, heat_threshold)
    is_local = row.p_values.get(LOCAL, 1.0) < row.p_values.get(GLOBAL, 0.0)
    if is_local and row.is_ood:
        about_places.insert(0, "Places in the picture are stranger than the picture as a whole.")
    about_parts = _about_parts(row, heads, nearest, LOCAL in row.p_values)
    found = [_verdict(row), *(about_places + about_parts if is_local else about_parts + about_places)]
    if known:
        found.append("It was among the training images, so it looks more ordinary than it would otherwise.")
    return tuple(found)


def _verdict(row: Row) -> str:
    share = _percent(row.p_value)
    if row.is_ood:
        return f"Flagged: at most {share} of normal images look as strange as this one."
    return f"Not flagged: about {share} of normal images look at least as strange as this one."


def _about_parts(row: Row, heads: Sequence[Contribution], nearest: Sequence[Neighbor], has_local: bool) -> list[str]:
    """What stands out; of several scores with one label, the highest counts."""
    highest = _highest(heads or _of_layers(row.layers))
    unusual = {label: score for label, score in highest.items() if score >= UNUSUAL}
    if unusual:
        return [_about(label, score, nearest) for label, score in list(unusual.items())[:_MOST]]
    if not row.is_ood:
        return ["Nothing about it stands out."]
    if has_local and row.p_values[GLOBAL] > row.p_values[LOCAL]:
        if row.p_values[GLOBAL] >= _ORDINARY:
            return ["As a whole, the picture looks ordinary."]
        return ["As a whole, it is a little unusual too; both together are rare."]
    if not highest:
        return []
    return [f"No single thing stands out; most unusual is the {next(iter(highest))}.".replace("the the", "the")]


def _of_layers(layers: Mapping[str, float]) -> list[Contribution]:
    """Scores of layers as they would be named among contributions, where the own score is not a sum."""
    words = layer_labels(list(layers))
    return [Contribution(name, words[name], score, score) for name, score in layers.items()]


def _highest(heads: Sequence[Contribution]) -> dict[str, float]:
    """The highest score of each label, those with the largest amount first."""
    scores: dict[str, float] = {}
    amounts: dict[str, float] = {}
    for head in heads:
        scores[head.label] = max(head.score, scores.get(head.label, -np.inf))
        amounts[head.label] = head.amount + amounts.get(head.label, 0.0)
    order = sorted(scores, key=lambda label: -amounts[label])
    return {label: scores[label] for label in order}


def _about(label: str, score: float, nearest: Sequence[Neighbor]) -> str:
    very = "very " if score >= _VERY else ""
    if label == _FAR:
        among = f"; the nearest is {re.split(_SLASH, nearest[0].path)[-1]}" if nearest else ""
        return f"It is {very}unlike every normal image that the model knows{among}."
    verb = "are" if label in (_PARTS, _TEXTURE) else "is"
    return f"{label[0].upper()}{label[1:]} {verb} {very}unusual."


def _about_places(heat: np.ndarray, threshold: float) -> list[str]:
    seen = ~np.isnan(heat)
    if not seen.any():
        return []
    found = []
    strange = heat > threshold  # False where it is NaN
    if strange.any():
        row, column = np.unravel_index(int(np.nanargmax(heat)), heat.shape)
        share = float(strange.sum() / seen.sum())
        text = f"Places that cover {_percent(share)} of the picture are stranger than normal"
        if share > _EVERYWHERE:
            text = "The picture is stranger than normal nearly everywhere"
        if np.nanmax(heat) - np.nanmedian(heat) >= _STANDS_OUT:
            text += f", most of all {_place(float(row) / heat.shape[0], float(column) / heat.shape[1])}"
        found.append(f"{text}.")
    else:
        found.append("No place in the picture is strange by itself.")
    if not seen.all():
        found.append(f"The network did not see {_percent(float(1 - seen.mean()))} of the picture.")
    return found


def _place(down: float, across: float) -> str:
    """Shares of height and width -> a ninth of the picture."""
    rows = ("upper", "", "lower")
    columns = ("left", "", "right")
    words = [rows[min(2, int(3 * down))], columns[min(2, int(3 * across))]]
    named = [word for word in words if word]
    if not named:
        return "in the middle"
    if len(named) == 1 and named[0] in ("left", "right"):
        return f"on the {named[0]}"
    return "in the " + (" ".join(named) if len(named) == 2 else f"{named[0]} part")


def _percent(share: float) -> str:
    """A share in percent, with two digits below 10 %."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.2g} %"
