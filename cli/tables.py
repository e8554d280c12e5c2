"""Results of evaluations and benchmarks for people: verdicts in words, and tables that fit 80 columns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .speech import show

if TYPE_CHECKING:
    from featdiff.report.evaluations import Section
    from featdiff.report.tables import Grid
    from featdiff.verdicts.calibration import Calibration

# Columns where the output is not a terminal.
_WIDTH = 120
# Width of the columns of numbers, and of the space in front of each.
_NUMBERS = (5, 13, 5, 7, 8)
_GAP = 2
# In tables with borders: the widest column of methods, and what a column takes beside its text.
_METHOD = 30
_BORDER = 3


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
    from featdiff.verdicts.results import counted

    width = output_width(_WIDTH)
    first = result["pairs"][0]
    if "folder" in result:
        print_text(f"{result['folder']}:", width)
    for found, comparison in verdicts(result, flagged, calibration, fpr):
        print_text(found, width, rest=" " * _GAP)
        print_text(comparison, width, first=" " * _GAP, rest=" " * _GAP)

    show("")
    print_text(f"backbone {result['model']}; in-domain: {result['id']} ({counted(first['n_id'])})", width)
    if result.get("accuracy") is not None:
        print_text(f"accuracy of the classifier: {100 * result['accuracy']:.1f} %", width)
    for line in table_lines(sections(result, all_heads), width):
        show(line)

    show("")
    if not all_heads and len(first["heads"]) > 2:
        print_text(f"{EXPLANATION} With --all: all {len(first['heads'])} scores.", width)
    else:
        print_text(EXPLANATION, width)


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


def print_text(text: str, width: int, first: str = "", rest: str = "") -> None:
    """A paragraph, broken between words, but not between a number and its percent sign; two indents."""
    from featdiff.files.text import for_terminal

    glued = re.sub(r"(?<=\d) %", "\u00a0%", for_terminal(text))
    for line in textwrap.wrap(glued, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False):
        show(line.replace("\u00a0%", " %"))


def output_width(otherwise: int) -> int:
    """Columns of the terminal; ``otherwise``, where standard output is none."""
    from rich.console import Console

    console = Console()
    return console.width if console.is_terminal else otherwise


def print_grid(grid: Grid, width: int) -> None:
    """Print a table with borders; columns that do not fit are printed below the others, beside the methods again."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from featdiff.files.text import for_terminal

    def plain(text: str) -> str:
        return escape(for_terminal(text))

    console = Console(width=width)
    for i, columns in enumerate(_parts(grid, width)):
        table = Table(title=plain(grid.title) if i == 0 else None)
        table.add_column(grid.header[0], overflow="fold", max_width=_METHOD)
        for column in columns:
            table.add_column(plain(grid.header[column]), justify="right", no_wrap=True, overflow="fold")
        for line in grid.lines:
            table.add_row(plain(line[0]), *(plain(line[column]) for column in columns))
        console.print(table)


def _parts(grid: Grid, width: int) -> list[list[int]]:
    """Columns of a grid, but for that of the methods, in tables that fit into ``width``."""
    from rich.cells import cell_len

    from featdiff.files.text import for_terminal

    widths = []
    for cells in zip(grid.header, *grid.lines, strict=True):
        widths.append(max(cell_len(for_terminal(cell)) for cell in cells) + _BORDER)

    first = min(widths[0], _METHOD + _BORDER) + 1
    parts: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        used = first + sum(widths[i] for i in parts[-1])
        if parts[-1] and used + widths[column] > width:
            parts.append([])
        parts[-1].append(column)
    return parts
