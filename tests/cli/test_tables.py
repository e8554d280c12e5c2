"""Tables for people: whole names and whole numbers, whatever the width."""

from __future__ import annotations

import pytest

from featdiff.report.tables import Grid
from featdiff_cli.tables import print_grid, print_text

SETS = ("tiny_imagenet", "gtsrb", "fashion_mnist", "a_set_with_a_long_name")
METHODS = ("featdiff", "baseline_mahalanobis_all", "neighbors")


def grid() -> Grid:
    lines = []
    for row, method in enumerate(METHODS):
        cells = [f"9{row}.{column} [88.0, 91.0] / 1{row}.{column}" for column in range(len(SETS))]
        lines.append([method, *cells, f"9{row}.55 / 1{row}.66", "41.2", "99.3"])
    return Grid("cifar10, matched", ["method", *SETS, "mean", "images/s", "train"], lines)


@pytest.mark.parametrize(("width", "tables"), [(80, 5), (120, 2), (200, 1)])
def test_a_grid_is_split_where_it_is_too_wide(width: int, tables: int, capsys: pytest.CaptureFixture[str]) -> None:
    print_grid(grid(), width)
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= width
    headings = [line for line in printed if "method" in line]
    assert len(headings) == tables
    for name in (*SETS, "mean", "images/s", "train"):
        assert sum(name in line for line in headings) == 1, name

    for method, *cells in grid().lines:
        rows = [line for line in printed if method in line]
        assert len(rows) == tables
        for cell in cells:
            assert any(cell in line for line in rows), cell
    assert sum("cifar10, matched" in line for line in printed) == 1


def test_text_is_broken_between_words_but_not_before_a_percent_sign(capsys: pytest.CaptureFixture[str]) -> None:
    print_text("featdiff finds 93.0 % of the OOD images", 20, rest="  ")
    assert capsys.readouterr().out.splitlines() == ["featdiff finds", "  93.0 % of the OOD", "  images"]
