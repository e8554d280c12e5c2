"""Made-up runs for the tests of reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from featdiff import Scores
from featdiff.report.html import save_report
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
