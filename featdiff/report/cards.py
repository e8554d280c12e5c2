"""The strangest images of a run -> cards of a page: picture, verdict, reasons, heat map and the nearest images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ..files.text import for_terminal
from ..verdicts.explanation import Explanation
from ..verdicts.results import Row, Scores
from .heatmaps import overlay
from .page import picture_uri

#: The strangest images that are explained: an explanation costs as much as a score, so few of a few ...
EXPLAINED = 24
_LEAST_EXPLAINED = 8
# ... and at most this share of the images.
_SHARE_EXPLAINED = 0.1
#: Longest side of a picture, in pixels.
PICTURE_SIDE = 224
_NEAREST_SIDE = 96
_NEAREST = 3
# Where the bar of a layer ends at the least, in standard deviations of normal images.
_BAR_END = 8.0
# The column of an audit that names the nearest image of the same run.
_NEAREST_COLUMN = "nearest"

#: Positions of images in the run, ascending -> their pictures in this order, None for one that cannot be read any more.
Pictures = Callable[[list[int]], Iterable[Image.Image | None]]
#: The same -> why they were judged so.
Explanations = Callable[[list[int]], Iterable[Explanation]]


@dataclass(frozen=True)
class Names:
    """Paths without the folder that they share.

    Parameters
    ----------
    root : str
        That folder with a slash at its end, or empty.
    """

    root: str

    @classmethod
    def of(cls, paths: list[str]) -> Names:
        folders = [path.rpartition("/")[0] + "/" for path in paths if "/" in path]
        if not folders or len(folders) < len(paths):
            return cls("")
        return cls(os.path.commonprefix(folders).rpartition("/")[0] + "/")

    def short(self, path: str) -> str:
        """A path as it is shown."""
        return for_terminal(path.removeprefix(self.root))


@dataclass(frozen=True)
class Card:
    """An image with its picture, as the page shows it."""

    index: int
    name: str
    row: Row
    picture: str
    heat: str
    reasons: list[str]
    layers: list[tuple[str, str, float]]
    nearest: list[tuple[str, str]]
    further: list[tuple[str, str]]

    @property
    def size(self) -> int:
        """Bytes of its pictures in the page."""
        return len(self.picture) + len(self.heat) + sum(len(uri) for _, uri in self.nearest)


@dataclass(frozen=True)
class Gallery:
    """The cards of a page.

    Parameters
    ----------
    cards : list of Card
        Strangest first.
    normal_root : str, default ""
        The folder that the nearest normal images share, which their names leave out.
    """

    cards: list[Card] = field(default_factory=list)
    normal_root: str = ""

    @property
    def has_heat(self) -> bool:
        """Whether there is a heat map."""
        return any(card.heat for card in self.cards)


def gallery_of(
    rows: Scores,
    positions: np.ndarray,
    names: Names,
    count: int,
    room: int | None,
    pictures: Pictures | None,
    explain: Explanations | None,
) -> Gallery:
    """The strangest images that can still be read, as many as there is room for.

    Parameters
    ----------
    rows : Scores
        Strangest first.
    positions : ndarray of shape (N,)
        Of the rows in the run.
    names : Names
        How their paths are shown.
    count : int
        The most images with a picture.
    room : int, optional
        Bytes that the pictures may take up; None: as many as they need.
    pictures, explain : callable, optional
        See :func:`featdiff.report.html.save_report`.

    Returns
    -------
    Gallery
    """
    chosen = positions[:count].tolist()
    most = min(EXPLAINED, max(_LEAST_EXPLAINED, int(_SHARE_EXPLAINED * len(rows))))
    explained = _explained(sorted(chosen[:most]), explain)
    shown = _pictures(chosen, explained, pictures)

    normal = Names.of([other.path for found in explained.values() for other in found.nearest[:_NEAREST]])
    nearest = {position: _nearest(explanation, normal) for position, explanation in explained.items()}
    if not explained:
        nearest = _nearest_of_run(rows, positions, chosen[:most], names, pictures)

    cards: list[Card] = []
    taken = 0
    for i, position in enumerate(chosen):
        if position not in shown:
            continue
        card = _card(i, rows[i], names, shown[position], explained.get(position), nearest.get(position, []))
        taken += card.size
        if room is not None and taken > room:
            break
        cards.append(card)
    return Gallery(cards, normal.root)


def _explained(chosen: list[int], explain: Explanations | None) -> dict[int, Explanation]:
    """Explanations by position, of those that can still be read."""
    if explain is None or not chosen:
        return {}
    found = zip(chosen, explain(chosen), strict=True)
    return {position: explanation for position, explanation in found if explanation.picture is not None}


def _pictures(chosen: list[int], explained: Mapping[int, Explanation], pictures: Pictures | None) -> dict[int, str]:
    """Small pictures by position, as addresses; those of an explanation are not decoded again."""
    shown = {}
    for position, explanation in explained.items():
        if explanation.picture is not None:
            shown[position] = picture_uri(explanation.picture, PICTURE_SIDE)
    return shown | _decoded(set(chosen) - set(shown), PICTURE_SIDE, pictures)


def _decoded(positions: Iterable[int], side: int, pictures: Pictures | None) -> dict[int, str]:
    """Pictures of images of the run, as addresses, by position; without those that cannot be read any more."""
    wanted = sorted(positions)
    if pictures is None or not wanted:
        return {}
    found = zip(wanted, pictures(wanted), strict=True)
    return {position: picture_uri(picture, side) for position, picture in found if picture is not None}


def _nearest(explanation: Explanation, names: Names) -> list[tuple[str, str]]:
    """Path and picture, or an empty text, of the nearest normal images."""
    found = []
    for neighbor in explanation.nearest[:_NEAREST]:
        uri = picture_uri(neighbor.thumbnail, _NEAREST_SIDE) if neighbor.thumbnail else ""
        found.append((names.short(neighbor.path), uri))
    return found


def _nearest_of_run(
    rows: Scores, positions: np.ndarray, chosen: Sequence[int], names: Names, pictures: Pictures | None
) -> dict[int, list[tuple[str, str]]]:
    """The same for an audit, whose images are compared with each other: one image each, by position."""
    if _NEAREST_COLUMN not in rows.extra:
        return {}
    places = dict(zip(rows.path, positions.tolist(), strict=True))
    paths = dict(zip(chosen, rows.extra[_NEAREST_COLUMN], strict=False))
    wanted = {places[path] for path in paths.values() if path in places}
    shown = _decoded(wanted, _NEAREST_SIDE, pictures)
    return {
        position: [(names.short(path), shown.get(places.get(path, -1), ""))] for position, path in paths.items() if path
    }


def _card(
    index: int,
    row: Row,
    names: Names,
    picture: str,
    explanation: Explanation | None,
    nearest: list[tuple[str, str]],
) -> Card:
    end = max(_BAR_END, *(score for score in row.layers.values() if np.isfinite(score)), 0.0)
    layers = [(label(name), f"{score:z.1f}", _bar(score, end)) for name, score in row.layers.items()]

    further = [(f"p {name}", f"{value:.4f}") for name, value in row.p_values.items()]
    for name, text in row.extra.items():
        if text and not (nearest and name == _NEAREST_COLUMN):
            further.append((label(name), names.short(text)))

    heat = None if explanation is None else overlay(explanation)
    return Card(
        index=index,
        name=names.short(row.path),
        row=row,
        picture=picture,
        heat="" if heat is None else picture_uri(heat, PICTURE_SIDE),
        reasons=list(explanation.reasons) if explanation else [],
        layers=layers,
        nearest=nearest,
        further=further,
    )


def label(column: str) -> str:
    """The name of a column for people."""
    return for_terminal(column.removeprefix("layer_").replace("_", " ").replace("p value", "p"))


def _bar(score: float, end: float) -> float:
    """The length of a layer's bar in percent."""
    return round(100 * float(np.clip(np.nan_to_num(score) / end, 0, 1)), 1)
