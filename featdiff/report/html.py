"""Rows of results -> one HTML file that people look at: how many, how strange, which images, and why."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..files.atomic import write_output
from ..files.text import for_terminal
from ..verdicts.calibration import ROUNDING, Calibration
from ..verdicts.results import COLUMNS, ERROR, OK, Row, Scores
from .cards import Explanations, Names, Pictures, gallery_of, label
from .charts import HEIGHT, WIDTH, histogram
from .heatmaps import stops
from .page import json_in_html, render
from .rows import Levels, ReportRows

#: Images with a picture, unless another number is asked for.
IMAGES = 100
# What their pictures may take up, unless a number is asked for, and what of the page they leave for rows, in bytes:
# 10,000 rows stay below 3 MB.
_PICTURE_BYTES = 1_000_000
_LEAST_PICTURE_BYTES = 200_000
_PAGE_BYTES = 2_900_000
# A card without its pictures takes up so much, about, and this for each column beyond those that all rows have.
_CARD_BYTES = 800
_COLUMN_BYTES = 220
# Rates beyond this are of no use to anybody; the page has no counts for them.
_LARGEST_RATE = 0.5
_KNOWN = set(COLUMNS)

#: Verdict, p-value, score and path, as the table that needs no script shows them.
PlainRow = tuple[str, str, str, str]


def save_report(
    file: str | os.PathLike[str],
    rows: ReportRows,
    fpr: float,
    calibration: Calibration | None = None,
    facts: Mapping[str, str] | None = None,
    images: int | None = None,
    pictures: Pictures | None = None,
    explain: Explanations | None = None,
) -> None:
    """Write a self-contained HTML page on a run.

    Parameters
    ----------
    file : str or Path
        An older file is replaced when the new one is whole.
    rows : ReportRows
        All rows of the run, at least one.
    fpr : float
        The false-alarm rate behind the verdicts.
    calibration : Calibration, optional
        Scores of normal images, that p-values compare with. Default: the images were compared with each other.
    facts : mapping of str to str, optional
        What the page says of the run: model, backbone, date ...
    images : int, optional
        How many of the strangest get a picture; 0: none. Default: 100, or fewer if they would take up more than 1 MB.
    pictures : callable, optional
        From positions of images in the run, ascending, to their pictures; None for one that cannot be read any more.
    explain : callable, optional
        From positions, ascending, to explanations; asked for the strangest, at most 24.

    Raises
    ------
    UsageError
        There are no rows.
    FeatdiffError
        The file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from featdiff import Scores
    >>> from featdiff.report.html import save_report
    >>> from featdiff.report.rows import ReportRows
    >>> rows = ReportRows()
    >>> rows.add(
    ...     Scores(
    ...         path=["cat.png", "sign.png"],
    ...         status=["ok", "ok"],
    ...         reason=["", ""],
    ...         ood_score=np.array([0.2, 7.5]),
    ...         p_value=np.array([0.5, 0.05]),
    ...         is_ood=np.array([False, True]),
    ...         layers={},
    ...     )
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_report(Path(folder) / "report.html", rows, fpr=0.05)
    ...     "1</strong> of 2 images" in (Path(folder) / "report.html").read_text()
    True
    """
    strangest, positions = rows.strangest()
    names = Names.of([*strangest.path, *(row.path for row in rows.unreadable_rows)])
    chart = histogram(rows.scores, None if calibration is None else calibration.scores)
    levels = rows.levels
    largest = max(_LARGEST_RATE, fpr)

    columns = _columns(strangest, levels, names)
    data = {
        "rows": columns,
        "levels": _counts(levels, largest, float(np.nanmax(strangest.p_value, initial=0))),
        "calibration": _calibration(calibration),
        "rate": fpr,
        "rounding": ROUNDING,
        "smallest": calibration.smallest_fpr if calibration else 1 / max(len(rows.scores), 1),
        "largest": largest,
        "valid": len(rows.scores),
        "failed": rows.failed,
        "axis": [chart.low, chart.high, WIDTH],
    }
    script_data = json_in_html(data)
    count = IMAGES if images is None else images
    free = (
        _PAGE_BYTES
        - len(script_data)
        - min(count, len(strangest)) * (_CARD_BYTES + len(columns["more"]) * _COLUMN_BYTES)
    )
    table = _fitting([_plain(row, names) for row in strangest], free - _LEAST_PICTURE_BYTES)
    room = _room(free, table) if images is None else None
    page = render(
        "scores.html",
        script_data,
        rows=rows,
        flagged=_flagged(levels, fpr),
        fpr=fpr,
        compared=calibration is None,
        calibrated=0 if calibration is None else len(calibration),
        facts=facts or {},
        root=for_terminal(names.root),
        gallery=gallery_of(strangest, positions, names, count, room, pictures, explain),
        heat_stops=stops(),
        table=table,
        listed=len(strangest),
        unreadable=[(names.short(row.path), row.reason) for row in rows.unreadable_rows],
        chart=chart,
        threshold=chart.x(_threshold(calibration, levels, fpr)),
        plot=(WIDTH, HEIGHT),
    )
    write_output(file, page)


def _flagged(levels: Levels, fpr: float) -> int:
    return int(levels.count[levels.p_value <= fpr + ROUNDING].sum())


def _threshold(calibration: Calibration | None, levels: Levels, fpr: float) -> float:
    """The largest score that is not flagged; beyond every score if all are."""
    if calibration is not None:
        return calibration.threshold(fpr)
    ordinary = levels.top[levels.p_value > fpr + ROUNDING]
    return float(ordinary.max()) if len(ordinary) else -np.inf


# ---- what the script reads ----


def _columns(rows: Scores, levels: Levels, names: Names) -> dict[str, Any]:
    """The rows, column by column: less to write and to read than names of columns in each row."""
    short = [names.short(path) for path in rows.path]
    folders = {name.rpartition("/")[0]: 0 for name in short}
    for i, folder in enumerate(sorted(folders)):
        folders[folder] = i

    return {
        "folders": list(sorted(folders)),
        "folder": [folders[name.rpartition("/")[0]] for name in short],
        "name": [name.rpartition("/")[2] for name in short],
        "status": [status == OK for status in rows.status],
        "reason": {i: reason for i, reason in enumerate(map(for_terminal, rows.reason)) if reason},
        "p": np.searchsorted(levels.p_value, rows.p_value).tolist(),
        "score": [_number(score) for score in rows.ood_score],
        "more": _further(rows, names),
    }


def _further(rows: Scores, names: Names) -> list[dict[str, Any]]:
    """All columns beyond those that every row has: texts, layers and p-values of parts."""
    columns: dict[str, list[Any]] = {name: [] for name in rows.columns if name not in _KNOWN}
    for row in rows.rows():
        for name, values in columns.items():
            values.append(row[name])

    further = []
    for name, values in columns.items():
        text = any(isinstance(value, str) for value in values)
        shown = [names.short(value) if text else _number(value) for value in values]
        if any(value not in ("", None) for value in shown):
            further.append({"label": label(name), "text": text, "values": shown})
    return further


def _number(value: float | None) -> float | None:
    """In four digits; None if it is not finite."""
    if value is None or not np.isfinite(value):
        return None
    return float(f"{value:.4g}")


def _counts(levels: Levels, largest: float, listed: float) -> dict[str, list[float]]:
    """Levels as far as a rate may go, and p-values of listed rows, exact: verdicts hang on their last bits."""
    count = int(np.searchsorted(levels.p_value, largest + ROUNDING, side="right")) + 1
    return {
        "p": levels.p_value[: max(count, int(np.searchsorted(levels.p_value, listed)) + 1)].tolist(),
        "count": levels.count[:count].tolist(),
        "top": [float(f"{top:.5g}") for top in levels.top[:count]],
    }


def _calibration(calibration: Calibration | None) -> dict[str, Any] | None:
    """What a threshold needs."""
    if calibration is None:
        return None
    scores = [float(f"{score:.5g}") for score in calibration.scores[::-1]]
    return {"scores": scores, "groups": calibration.groups}


# ---- what the template reads ----


def _room(free: int, table: Sequence[PlainRow]) -> int:
    """Bytes that pictures may take up, of those that the table may share with them."""
    return min(_PICTURE_BYTES, max(_LEAST_PICTURE_BYTES, free - sum(map(_size, table))))


def _fitting(table: Sequence[PlainRow], room: int) -> Sequence[PlainRow]:
    """The first rows of the table that needs no script, as many as fit into so many bytes, and one at least."""
    taken = np.cumsum([_size(row) for row in table])
    return table[: max(1, int(np.searchsorted(taken, room, side="right")))]


def _size(row: PlainRow) -> int:
    """Bytes of a row of that table, about."""
    return sum(len(cell.encode("utf-8", "replace")) + 5 for cell in row)


def _plain(row: Row, names: Names) -> PlainRow:
    """A row of the table that needs no script."""
    verdict = "error" if row.status == ERROR else "OOD" if row.is_ood else ""
    return verdict, f"{row.p_value:.4f}", f"{row.ood_score:z.2f}", names.short(row.path)
