"""Two models on the same images -> one HTML file: what differs, ROC curves, and the images whose verdict changed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..files.atomic import write_output
from ..files.text import for_terminal
from ..verdicts.results import Scores
from .cards import PICTURE_SIDE, Names
from .charts import roc_path
from .comparisons import EXPLANATION, grid, set_words
from .html_evaluation import Pictures
from .page import json_in_html, picture_uri, render

# Images of either kind that are shown for each set.
_SHOWN = 12
_ROC_SIDE = 300.0


class PairedSet(Protocol):
    """A set that both models scored; :class:`featdiff.evaluation.comparison.ComparedSet` is such."""

    @property
    def name(self) -> str: ...
    @property
    def refs(self) -> Sequence[Any]: ...
    @property
    def scores(self) -> tuple[Scores, Scores]: ...
    def only(self, which: int) -> np.ndarray: ...


@dataclass(frozen=True)
class ChangedCase:
    """An image whose verdict changed: its picture, and by A and by B whether it is flagged, and the p-value."""

    name: str
    picture: str
    verdicts: list[tuple[str, bool, float]]


@dataclass(frozen=True)
class ChangedGroup:
    """Images that only one of the models flags, and how many more there are."""

    title: str
    cases: list[ChangedCase]
    more: int


@dataclass(frozen=True)
class SetSection:
    """The part of the page that is about one set; ``curves``: path and AUROC by A and by B, of an OOD set."""

    name: str
    words: list[str]
    curves: list[tuple[str, float]]
    changed: list[ChangedGroup]


def save_comparison(
    file: str | os.PathLike[str],
    sets: Sequence[PairedSet],
    result: Mapping[str, Any],
    facts: Mapping[str, str] | None = None,
    pictures: Pictures | None = None,
) -> None:
    """Write a self-contained HTML page on a comparison.

    Parameters
    ----------
    file : str or Path
        An older file is replaced when the new one is whole.
    sets : sequence of PairedSet
        The in-domain set, then the OOD sets.
    result : mapping
        As in :class:`featdiff.evaluation.comparison.Comparison`.
    facts : mapping of str to str, optional
        What the page says of the run.
    pictures : callable, optional
        From references to pictures, for images whose verdict changed.

    Raises
    ------
    FeatdiffError
        The file cannot be written.
    """
    words = set_words(result)
    page = render(
        "comparison.html",
        json_in_html(None),
        models=result["models"],
        sets=[_section(sets, i, words[i], result, pictures) for i in range(len(sets))],
        facts=facts or {},
        table=grid(result),
        left_out=sorted(result["left_out"].items()),
        explanation=EXPLANATION,
        side=_ROC_SIDE,
    )
    write_output(file, page)


def _section(
    sets: Sequence[PairedSet], i: int, words: list[str], result: Mapping[str, Any], pictures: Pictures | None
) -> SetSection:
    images = sets[i]
    curves = []
    if i:
        metric = result["pairs"][i - 1]["auroc"]
        for normal, strange, area in zip(sets[0].scores, images.scores, metric["values"], strict=True):
            curves.append((roc_path(normal.ood_score, strange.ood_score, _ROC_SIDE), area))
    changed = [_changed(images, which, pictures) for which in (1, 0)]
    first = words[0].partition(": ")[2]  # the rest is the title
    return SetSection(images.name, [first, *words[1:]], curves, [group for group in changed if group.cases])


def _changed(images: PairedSet, which: int, pictures: Pictures | None) -> ChangedGroup:
    """Images that only A (0) or only B (1) flags, those first whose p-values differ most."""
    positions = images.only(which)
    chosen = [int(i) for i in positions[:_SHOWN]]
    shown = list(pictures([images.refs[i] for i in chosen])) if pictures else [None] * len(chosen)
    names = Names.of([ref.path for ref in images.refs])

    cases = []
    for i, picture in zip(chosen, shown, strict=True):
        uri = "" if picture is None else picture_uri(picture, PICTURE_SIDE)
        by = [(letter, scores[i].is_ood, scores[i].p_value) for letter, scores in zip("AB", images.scores, strict=True)]
        cases.append(ChangedCase(names.short(for_terminal(images.refs[i].path)), uri, by))
    return ChangedGroup(f"Flagged by {'AB'[which]} alone", cases, len(positions) - len(cases))
