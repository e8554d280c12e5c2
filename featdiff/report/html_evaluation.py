"""The result of an evaluation -> one HTML file: verdicts, ROC curves, histograms, a table, and the hardest images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..files.atomic import write_output
from ..files.text import for_terminal
from .cards import PICTURE_SIDE, Names
from .charts import HEIGHT, WIDTH, Histogram, histogram, roc_path
from .evaluations import (
    COLUMNS,
    EXPLANATION,
    OWN,
    Evaluated,
    Pair,
    Section,
    best_baseline,
    in_words,
    merged,
    sections,
    verdicts,
)
from .page import json_in_html, picture_uri, render

# Images of either kind that are shown for each OOD set.
_HARDEST = 6
_ROC_SIDE = 300.0


#: References to images (each has a ``path``) -> their pictures, None for one that cannot be read any more.
Pictures = Callable[[Sequence[Any]], Iterable[Image.Image | None]]


@dataclass(frozen=True)
class Case:
    """An image that was hard to tell."""

    name: str
    score: float
    flagged: bool
    picture: str


@dataclass(frozen=True)
class Curve:
    """A ROC curve and its name."""

    path: str
    name: str
    auroc: float


@dataclass(frozen=True)
class SetSection:
    """The part of the page that is about one OOD set under one protocol."""

    ood: str
    protocol: str
    found: str
    comparison: str
    curves: list[Curve]
    chart: Histogram
    threshold: float
    n_id: int
    n_ood: int
    strange_id: list[Case]
    ordinary_ood: list[Case]


@dataclass(frozen=True)
class ModelSection:
    """The part of the page that is about one detector."""

    title: str
    in_domain: str
    accuracy: float | None
    sets: list[SetSection]
    table: list[Section]


def save_evaluation(
    file: str | os.PathLike[str],
    evaluated: Sequence[Evaluated],
    facts: Mapping[str, str] | None = None,
    unreadable: Mapping[str, str] | None = None,
    pictures: Pictures | None = None,
) -> None:
    """Write a self-contained HTML page on an evaluation.

    Parameters
    ----------
    file : str or Path
        An older file is replaced when the new one is whole.
    evaluated : sequence of Evaluated
        One for each detector, at least one.
    facts : mapping of str to str, optional
        What the page says of the run.
    unreadable : mapping of str to str, optional
        Why images were left out, by path.
    pictures : callable, optional
        From references to pictures, for the hardest images.

    Raises
    ------
    FeatdiffError
        The file cannot be written.
    """
    page = render(
        "evaluation.html",
        json_in_html(None),
        models=[_model(item, pictures) for item in evaluated],
        facts=facts or {},
        unreadable=sorted((unreadable or {}).items()),
        columns=COLUMNS,
        explanation=EXPLANATION,
        plot=(WIDTH, HEIGHT),
        side=_ROC_SIDE,
        own=OWN,
    )
    write_output(file, page)


def _model(item: Evaluated, pictures: Pictures | None) -> ModelSection:
    flagged = [(int(pair.id_flags.sum()), int(pair.ood_flags.sum())) for pair in item.pairs]
    words = verdicts(item.result, flagged, item.calibration, item.fpr)
    sets = []
    for (i, protocol), (found, comparison) in zip(merged(item.result["pairs"]), words, strict=True):
        sets.append(_set(item, i, protocol, found, comparison, pictures))
    return ModelSection(
        title=str(item.result.get("folder", "")),
        in_domain=str(item.result["id"]),
        accuracy=item.result.get("accuracy"),
        sets=sets,
        table=sections(item.result, all_heads=True),
    )


def _set(item: Evaluated, i: int, protocol: str, found: str, comparison: str, pictures: Pictures | None) -> SetSection:
    pair = item.pairs[i]
    measured = item.result["pairs"][i]
    id_scores, ood_scores = pair.id_scores[OWN], pair.ood_scores[OWN]
    chart = histogram(ood_scores, id_scores)
    return SetSection(
        ood=measured["ood"],
        protocol=protocol,
        found=found.removeprefix(f"{measured['ood']}, {protocol}: "),  # they are the title
        comparison=comparison,
        curves=list(_curves(pair, measured["heads"])),
        chart=chart,
        threshold=chart.x(item.calibration.threshold(item.fpr)),
        n_id=len(id_scores),
        n_ood=len(ood_scores),
        strange_id=_cases(pair.id_refs, id_scores, pair.id_flags, np.argsort(-id_scores, kind="stable"), pictures),
        ordinary_ood=_cases(pair.ood_refs, ood_scores, pair.ood_flags, np.argsort(ood_scores, kind="stable"), pictures),
    )


def _curves(pair: Pair, heads: Mapping[str, Mapping[str, Any]]) -> Iterator[Curve]:
    """featdiff, and the best baseline if there is one."""
    best = best_baseline(heads)
    for name in (OWN, best):
        if name is None:
            continue
        path = roc_path(pair.id_scores[name], pair.ood_scores[name], _ROC_SIDE)
        yield Curve(path, name if name == OWN else in_words(name), heads[name]["auroc"])


def _cases(
    refs: Sequence[Any], scores: np.ndarray, flags: np.ndarray, order: np.ndarray, pictures: Pictures | None
) -> list[Case]:
    """The first images of an order, with their pictures."""
    chosen = [int(i) for i in order[:_HARDEST]]
    names = Names.of([ref.path for ref in refs])
    shown: list[Image.Image | None] = [None] * len(chosen)
    if pictures is not None:
        shown = list(pictures([refs[i] for i in chosen]))

    cases = []
    for i, picture in zip(chosen, shown, strict=True):
        uri = "" if picture is None else picture_uri(picture, PICTURE_SIDE)
        cases.append(Case(names.short(for_terminal(refs[i].path)), float(scores[i]), bool(flags[i]), uri))
    return cases
