"""Results of an evaluation for people: a verdict in words, and a table that fits a terminal of 80 columns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .speech import show

if TYPE_CHECKING:
    from featdiff.report.evaluations import Section
    from featdiff.verdicts.calibration import Calibration

# Columns where the output is not a terminal.
_WIDTH = 120
# Width of the columns of numbers, and of the space in front of each.
_NUMBERS = (5, 13, 5, 7, 8)
_GAP = 2


def print_evaluation(
    result: dict[str, Any],
    flagged: Sequence[tuple[int, int]],
    calibration: Calibration,
    fpr: float,
    all_heads: bool = False,
) -> None:
    """Print the verdict of each OOD set, then the table, on standard output.

    ``flagged`` has, for each pair of the result, how many in-domain and how many OOD images are flagged at ``fpr``.
    """
    from featdiff.report.evaluations import EXPLANATION, sections, verdicts

    width = _width()
    folder = f"{result['folder']}: " if "folder" in result else ""
    first = result["pairs"][0]
    _print_text(f"{folder}backbone {result['model']}; in-domain: {result['id']} ({first['n_id']:,} images)", width)
    if result.get("accuracy") is not None:
        _print_text(f"accuracy of the classifier: {100 * result['accuracy']:.1f} %", width)

    show("")
    for found, comparison in verdicts(result, flagged, calibration, fpr):
        _print_text(found, width, rest=" " * _GAP)
        _print_text(comparison, width, first=" " * _GAP, rest=" " * _GAP)

    show("")
    for line in table_lines(sections(result, all_heads), width):
        show(line)

    show("")
    if not all_heads and len(first["heads"]) > 2:
        _print_text(f"{EXPLANATION} With --all: all {len(first['heads'])} scores.", width)
    else:
        _print_text(EXPLANATION, width)


def table_lines(table: Sequence[Section], width: int) -> Iterator[str]:
    """A line of headings, and the sections; a name that leaves no room for the numbers gets a line of its own."""
    from rich.cells import cell_len

    from featdiff.report.evaluations import COLUMNS

    numbers = sum(_NUMBERS) + _GAP * len(_NUMBERS)
    names = [cell_len(row[0]) + _GAP for section in table for row in section.rows]
    room = min(max(names), max(width - numbers, 0))

    yield " " * room + _in_columns(COLUMNS)
    for section in table:
        yield section.title
        for name, *cells in section.rows:
            name = " " * _GAP + name
            if cell_len(name) > room:
                yield name
                name = ""
            yield name + " " * (room - cell_len(name)) + _in_columns(cells)


def _in_columns(cells: Sequence[str]) -> str:
    return "".join(" " * _GAP + cell.rjust(width) for cell, width in zip(cells, _NUMBERS, strict=True))


def _print_text(text: str, width: int, first: str = "", rest: str = "") -> None:
    """A paragraph, broken between words, but not between a number and its percent sign; two indents."""
    from featdiff.files.text import for_terminal

    glued = re.sub(r"(?<=\d) %", "\u00a0%", for_terminal(text))
    for line in textwrap.wrap(glued, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False):
        show(line.replace("\u00a0%", " %"))


def _width() -> int:
    """Columns of the terminal, or of a page."""
    from rich.console import Console

    console = Console()
    return console.width if console.is_terminal else _WIDTH
