"""The rows of a long run -> what a page shows of them: the strangest, and counts of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..exceptions import UsageError
from ..verdicts.calibration import ROUNDING
from ..verdicts.results import ERROR, OK, UNREADABLE, Row, Scores, strangest_first

#: Rows that a page lists; of more, the strangest.
MOST_ROWS = 10_000
#: Unreadable images that it lists.
MOST_UNREADABLE = 1_000
# Rows of a file that become a part of the run at once.
_AT_ONCE = 4_096
_LAYER = "layer_"
_P_VALUE = "p_value_"


@dataclass(frozen=True)
class Levels:
    """The p-values of a run, so that verdicts can be counted at any false-alarm rate.

    Attributes
    ----------
    p_value : (L,) float
        Each that occurs, ascending.
    count : (L,) int
        How many valid scores have it.
    top : (L,) float
        The largest ``ood_score`` among these.
    """

    p_value: np.ndarray
    count: np.ndarray
    top: np.ndarray


class ReportRows:
    """Takes the parts of a run in order, and keeps what a page shows.

    Of each image it keeps one number, and whole rows of the strangest only.

    Parameters
    ----------
    most : int, default 10,000
        How many rows are kept.

    Attributes
    ----------
    total, unreadable, failed : int
        How many rows there were, and how many of them have no valid score.
    unreadable_rows : list of Row
        The first 1,000 unreadable images.

    Examples
    --------
    >>> import numpy as np
    >>> from featdiff import Scores
    >>> from featdiff.report.rows import ReportRows
    >>> rows = ReportRows(most=1)
    >>> rows.add(
    ...     Scores(
    ...         path=["cat.png", "sign.png"],
    ...         status=["ok", "ok"],
    ...         reason=["", ""],
    ...         ood_score=np.array([0.2, 7.5]),
    ...         p_value=np.array([0.4, 0.01]),
    ...         is_ood=np.array([False, True]),
    ...         layers={},
    ...     )
    ... )
    >>> strangest, positions = rows.strangest()
    >>> strangest.path, positions.tolist(), rows.total
    (['sign.png'], [1], 2)
    """

    def __init__(self, most: int = MOST_ROWS) -> None:
        self.most = most
        self.total = 0
        self.unreadable = 0
        self.failed = 0
        self.unreadable_rows: list[Row] = []
        self._kept: list[Scores] = []
        self._positions: list[np.ndarray] = []
        self._levels: dict[float, tuple[int, float]] = {}
        self._scores: list[np.ndarray] = []
        self._written: list[Mapping[str, Any]] = []
        self._written_levels = np.empty(0)

    def add_written(self, row: Mapping[str, Any]) -> None:
        """The next row of the run, as :meth:`featdiff.Scores.rows` gives it or as a file of rows holds it."""
        self._written.append(row)
        if len(self._written) >= _AT_ONCE:
            self._read_written()

    def _read_written(self) -> None:
        if self._written:
            part = _scores_of(self._written)
            self._written = []
            self.add(part)
            self._written_levels = np.union1d(self._written_levels, part.p_value[np.isfinite(part.p_value)])

    def add(self, part: Scores) -> None:
        """The next rows of the run."""
        self._read_written()
        part = replace(part, p_value=self._as_written(part.p_value))
        status = np.array(part.status)
        readable = status != UNREADABLE
        positions = self.total + np.arange(len(part))

        for i in np.flatnonzero(~readable)[: MOST_UNREADABLE - len(self.unreadable_rows)]:
            self.unreadable_rows.append(part[int(i)])
        self.total += len(part)
        self.unreadable += int((~readable).sum())
        self.failed += int((status == ERROR).sum())

        self._kept.append(part[readable])
        self._positions.append(positions[readable])
        valid = status == OK
        self._scores.append(part.ood_score[valid].astype(np.float32))
        self._count(part.p_value[valid], part.ood_score[valid])
        if sum(map(len, self._kept)) > 2 * self.most:
            self._drop()

    def _as_written(self, p_value: np.ndarray) -> np.ndarray:
        """P-values as rows of before have them, in seven digits, lest there be two of each."""
        levels = np.append(self._written_levels, np.inf)
        level = levels[np.searchsorted(self._written_levels, p_value - ROUNDING)]
        return np.where(np.abs(p_value - level) < ROUNDING, level, p_value)

    def _count(self, p_value: np.ndarray, ood_score: np.ndarray) -> None:
        values, index, counts = np.unique(p_value, return_inverse=True, return_counts=True)
        tops = np.full(len(values), -np.inf)
        np.maximum.at(tops, index, ood_score)
        for value, count, top in zip(values.tolist(), counts.tolist(), tops.tolist(), strict=True):
            before = self._levels.get(value, (0, -np.inf))
            self._levels[value] = (before[0] + count, max(before[1], top))

    def _drop(self) -> None:
        """Keep the strangest rows only."""
        rows = Scores.concatenate(self._kept)
        positions = np.concatenate(self._positions)
        unreadable = np.zeros(len(rows), dtype=bool)
        order = strangest_first(rows.ood_score, rows.p_value, unreadable)[: self.most]
        self._kept = [rows[order]]
        self._positions = [positions[order]]

    def strangest(self) -> tuple[Scores, np.ndarray]:
        """Rows (strangest first, without unreadable ones) and their positions in the run.

        Raises
        ------
        UsageError
            There were no rows.
        """
        self._read_written()
        if not self._kept:
            raise UsageError("there were no images to score")
        self._drop()
        return self._kept[0], self._positions[0]

    @property
    def scores(self) -> np.ndarray:
        """Every valid ``ood_score`` (n,) float32, in the order of the run."""
        return np.concatenate(self._scores) if self._scores else np.empty(0, np.float32)

    @property
    def levels(self) -> Levels:
        """The p-values of all valid scores."""
        ordered = sorted(self._levels)
        counts = [self._levels[value][0] for value in ordered]
        tops = [self._levels[value][1] for value in ordered]
        return Levels(np.array(ordered), np.array(counts, dtype=int), np.array(tops))


def _scores_of(rows: Sequence[Mapping[str, Any]]) -> Scores:
    """Rows as they are written -> a part of a run. Numbers may be text; those that are missing are None or empty."""

    def numbers(name: str) -> np.ndarray:
        return np.array([np.nan if row[name] in (None, "") else float(row[name]) for row in rows])

    return Scores(
        path=[str(row["path"]) for row in rows],
        status=[str(row["status"]) for row in rows],
        reason=[str(row["reason"]) for row in rows],
        ood_score=numbers("ood_score"),
        p_value=numbers("p_value"),
        is_ood=np.array([bool(row["is_ood"]) for row in rows]),
        layers={name.removeprefix(_LAYER): numbers(name) for name in rows[0] if name.startswith(_LAYER)},
        p_values={name.removeprefix(_P_VALUE): numbers(name) for name in rows[0] if name.startswith(_P_VALUE)},
    )
