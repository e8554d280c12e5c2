"""A comparison of two models in words, as a table, and as a page."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_pages import HOSTILE

from featdiff import Scores
from featdiff.report.comparisons import grid, set_words
from featdiff.report.html_comparison import save_comparison


def metric(a: float, b: float, low: float, high: float) -> dict[str, Any]:
    shown = low > 0 or high < 0
    return {"values": [a, b], "difference": b - a, "difference_ci": [low, high], "is_shown": shown}


def part(n: int, flagged: tuple[int, int], only: tuple[int, int], p: float | None = 0.5) -> dict[str, Any]:
    names = [[f"{side}{i}.png" for i in range(count)] for side, count in zip("ab", only, strict=True)]
    return {
        "n": n,
        "flagged": list(flagged),
        "flagged_ci": [[0.1, 0.25], [0.2, 0.4]],
        "only_a": names[0],
        "only_b": names[1],
        "mcnemar_p": p,
    }


def result(*pairs: dict[str, Any], rates: tuple[float, float] = (0.05, 0.05)) -> dict[str, Any]:
    models = [
        {"name": name, "fpr": rate, "calibration": 400, "known": 0} for name, rate in zip("ab", rates, strict=True)
    ]
    normal = part(200, (30, 60), (0, 30), 1e-9)
    return {"models": models, "id": {"images": "photos", **normal}, "pairs": list(pairs), "left_out": {}}


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
    pair = {"ood": "signs", "auroc": area, "fpr95": rate, **part(50, (40, 45), (1, 6), 0.125)}
    first, second, found, changed = set_words(result(pair))[1]
    assert first.startswith(f"signs (50 images): AUROC {100 * area['values'][0]:.1f} by A")
    assert first.endswith(f": {words[0]}")
    assert second.endswith(f": {words[1]}")
    assert found == "A finds 40, 80.0 % (10.0 to 25.0); B finds 45, 90.0 % (20.0 to 40.0)"
    assert changed == (
        "7 verdicts differ: 1 flagged by A alone, 6 by B alone (McNemar p 0.12): no difference shown in how many"
    )


def test_false_alarms() -> None:
    ((alarms, changed),) = set_words(result())
    assert alarms == (
        "in-domain (200 images): A flags 30, 15.0 % (10.0 to 25.0); B flags 60, 30.0 % (20.0 to 40.0), "
        "where 5 % were asked for"
    )
    assert changed == "30 verdicts differ: 0 flagged by A alone, 30 by B alone (McNemar p 1e-09): B flags more"
    assert set_words(result(rates=(0.05, 0.1)))[0][0].endswith("where 5 % by A and 10 % by B were asked for")


def test_the_table_has_a_line_for_each_set() -> None:
    pair = {"ood": "signs", "auroc": metric(0.9, 0.95, 0.02, 0.08), "fpr95": metric(0.3, 0.1, -0.3, -0.1)}
    table = grid(result({**pair, **part(50, (40, 45), (1, 6))}))
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
    assert grid(result()).lines == [["in-domain", "15.0", "30.0", "0 / 30"]]


class Made:
    """A set whose images all have hostile names; A flags the even ones, B the odd ones."""

    def __init__(self, name: str) -> None:
        count = len(HOSTILE)
        self.name = name
        self.refs = [SimpleNamespace(path=path) for path in HOSTILE]
        flags = np.arange(count) % 2 == 0
        p_value = np.where(flags, 0.01, 0.5)
        self.scores = tuple(
            Scores(list(HOSTILE), ["ok"] * count, [""] * count, np.arange(count) / 9.0, p, f, {})
            for p, f in ((p_value, flags), (0.51 - p_value, ~flags))
        )

    def only(self, which: int) -> np.ndarray:
        return np.arange(which, len(HOSTILE), 2)


def hostile_page(file: Path) -> Path:
    pair = {"ood": HOSTILE[0], "auroc": metric(0.9, 0.95, 0.02, 0.08), "fpr95": metric(0.3, 0.1, -0.3, -0.1)}
    found = result({**pair, **part(len(HOSTILE), (5, 4), (5, 4))})
    found["models"][0]["name"] = HOSTILE[1]
    found["left_out"] = {HOSTILE[2]: HOSTILE[3]}
    sets: Any = [Made("in-domain"), Made(HOSTILE[0])]
    facts = {"In-domain": HOSTILE[4]}
    save_comparison(file, sets, found, facts, lambda refs: (Image.new("RGB", (20, 20)) for _ in refs))
    return file


def test_the_page_runs_nothing_from_names(tmp_path: Path) -> None:
    text = hostile_page(tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<script", text)) == 2  # its data, and its own
    assert "<img src=x" not in text
    assert "\u202e" not in text
    assert text.count('<div class="shot"><img src="data:image/webp') == 2 * len(HOSTILE)
    assert text.count("A: flagged") == text.count("B: not flagged") == 2 * len(HOSTILE[::2])
    assert "http" not in re.sub(r"http-equiv", "", text)
