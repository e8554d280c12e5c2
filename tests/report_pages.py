"""Made-up runs for the tests of reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from featdiff import Scores
from featdiff.report.html import save_report
from featdiff.report.html_comparison import save_comparison
from featdiff.report.rows import ReportRows
from featdiff.verdicts.calibration import Calibration

#: Names that would do harm in a careless page.
HOSTILE = [
    "<script>alert(1)</script>.png",
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(1)</script>.png",
    "<!--<script>.png",
    "' onmouseover='alert(1).png",
    "{{ 7 * 7 }}.png",
    "&lt;b&gt;.png",
    "\u202egnp.exe",
    "${alert(1)}.png",
]
#: 200 held-out normal images.
CALIBRATION = Calibration(np.random.default_rng(5).normal(size=200))
FPR = 0.05


def made_up(count: int, names: list[str] | None = None, seed: int = 0) -> Scores:
    """A run of ``count`` images in seven folders, every fifth of them strange, the first ones unreadable."""
    rng = np.random.default_rng(seed)
    score = rng.normal(size=count) + 3 * (np.arange(count) % 5 == 0)
    p_value, is_ood = CALIBRATION.flags(score, FPR)
    path = [f"/data/photos/day-{i % 7}/picture_{i:05d}.jpg" for i in range(count)]
    status, reason = ["ok"] * count, [""] * count

    for i, name in enumerate(names or []):
        path[-1 - i] = f"/data/photos/{name}"
    for i in range(0, count // 50):
        status[i], reason[i] = "unreadable", "empty file (0 bytes)"
        score[i] = p_value[i] = np.nan
        is_ood[i] = False

    layers = {"stage1": score / 2, "stage4": score}
    return Scores(path, status, reason, score, p_value, is_ood, layers, FPR)


def pictures(positions: list[int]) -> Iterator[Image.Image | None]:
    """A grey picture for each image, of its own shade; every tenth cannot be read any more."""
    for at in positions:
        yield None if at % 10 == 9 else Image.new("RGB", (40, 30), (at % 256,) * 3)


def write_page(file: Path, scores: Scores, images: int | None = None, facts: dict[str, str] | None = None) -> Path:
    """The page of a made-up run."""
    rows = ReportRows()
    rows.add(scores)
    save_report(file, rows, FPR, CALIBRATION, facts or {"Model": "my-model"}, images, pictures)
    return file


def metric(a: float, b: float, low: float, high: float) -> dict[str, Any]:
    """A number of two models, and the interval of B - A."""
    shown = low > 0 or high < 0
    return {"values": [a, b], "difference": b - a, "difference_ci": [low, high], "is_shown": shown}


def paired(n: int, flagged: tuple[int, int], only: tuple[int, int], p: float | None = 0.5) -> dict[str, Any]:
    """What a comparison says of the verdicts on a set."""
    names = [[f"{side}{i}.png" for i in range(count)] for side, count in zip("ab", only, strict=True)]
    return {
        "n": n,
        "flagged": list(flagged),
        "flagged_ci": [[0.1, 0.25], [0.2, 0.4]],
        "only_a": names[0],
        "only_b": names[1],
        "mcnemar_p": p,
    }


def compared(*pairs: dict[str, Any], rates: tuple[float, float] = (0.05, 0.05)) -> dict[str, Any]:
    """The result of a comparison."""
    models = [
        {"name": name, "fpr": rate, "calibration": 400, "known": 0} for name, rate in zip("ab", rates, strict=True)
    ]
    normal = paired(200, (30, 60), (0, 30), 1e-9)
    return {"models": models, "id": {"images": "photos", **normal}, "pairs": list(pairs), "left_out": {}}


class MadeUpSet:
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


def hostile_comparison(file: Path) -> Path:
    """The page of a comparison in which every name is hostile."""
    pair = {"ood": HOSTILE[0], "auroc": metric(0.9, 0.95, 0.02, 0.08), "fpr95": metric(0.3, 0.1, -0.3, -0.1)}
    found = compared({**pair, **paired(len(HOSTILE), (5, 4), (5, 4))})
    found["models"][0]["name"] = HOSTILE[1]
    found["left_out"] = {HOSTILE[2]: HOSTILE[3]}
    sets: Any = [MadeUpSet("in-domain"), MadeUpSet(HOSTILE[0])]
    facts = {"In-domain": HOSTILE[4]}
    save_comparison(file, sets, found, facts, lambda refs: (Image.new("RGB", (20, 20)) for _ in refs))
    return file
