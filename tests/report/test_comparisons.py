"""A comparison of two models in words, as a table, and as a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from report_pages import HOSTILE, compared, hostile_comparison, metric, paired

from featdiff.report.comparisons import grid, set_words


@pytest.mark.parametrize(
    ("area", "rate", "words"),
    [
        (metric(0.9, 0.95, 0.02, 0.08), metric(0.3, 0.1, -0.3, -0.1), ("B is better", "B is better")),
        (metric(0.95, 0.9, -0.08, -0.02), metric(0.1, 0.3, 0.1, 0.3), ("A is better", "A is better")),
        (metric(0.9, 0.91, -0.01, 0.03), metric(0.3, 0.3, 0, 0), ("no difference shown", "no difference shown")),
    ],
)
def test_which_is_better(area: dict[str, Any], rate: dict[str, Any], words: tuple[str, str]) -> None:
    """Of AUROC more is better, of FPR95 less; an interval that holds 0 shows nothing."""
    pair = {"ood": "signs", "auroc": area, "fpr95": rate, **paired(50, (40, 45), (1, 6), 0.125)}
    first, second, found, changed = set_words(compared(pair))[1]
    assert first.startswith(f"signs (50 images): AUROC {100 * area['values'][0]:.1f} by A")
    assert first.endswith(f": {words[0]}")
    assert second.endswith(f": {words[1]}")
    assert found == "A finds 40, 80.0 % (10.0 to 25.0); B finds 45, 90.0 % (20.0 to 40.0)"
    assert changed == (
        "7 verdicts differ: 1 flagged by A alone, 6 by B alone (McNemar p 0.12): no difference shown in how many"
    )


def test_false_alarms() -> None:
    ((alarms, changed),) = set_words(compared())
    assert alarms == (
        "in-domain (200 images): A flags 30, 15.0 % (10.0 to 25.0); B flags 60, 30.0 % (20.0 to 40.0), "
        "where 5 % were asked for"
    )
    assert changed == "30 verdicts differ: 0 flagged by A alone, 30 by B alone (McNemar p 1e-09): B flags more"
    assert set_words(compared(rates=(0.05, 0.1)))[0][0].endswith("where 5 % by A and 10 % by B were asked for")


def test_the_table_has_a_line_for_each_set() -> None:
    pair = {"ood": "signs", "auroc": metric(0.9, 0.95, 0.02, 0.08), "fpr95": metric(0.3, 0.1, -0.3, -0.1)}
    table = grid(compared({**pair, **paired(50, (40, 45), (1, 6))}))
    assert all(len(line) == len(table.header) for line in table.lines)
    cells = [
        "signs",
        "90.0",
        "95.0",
        "+5.0 [+2.0, +8.0]",
        "30.0",
        "10.0",
        "-20.0 [-30.0, -10.0]",
        "80.0",
        "90.0",
        "1 / 6",
    ]
    assert table.lines[1] == cells
    assert grid(compared()).lines == [["in-domain", "15.0", "30.0", "0 / 30"]]


def test_the_page_runs_nothing_from_names(tmp_path: Path) -> None:
    text = hostile_comparison(tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<script", text)) == 2  # its data, and its own
    assert "<img src=x" not in text
    assert "\u202e" not in text
    assert text.count('<div class="shot"><img src="data:image/webp') == 2 * len(HOSTILE)
    assert text.count("A: flagged") == text.count("B: not flagged") == 2 * len(HOSTILE[::2])
    assert "http" not in re.sub(r"http-equiv", "", text)
