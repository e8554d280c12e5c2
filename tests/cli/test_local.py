"""The local score on the command line: what train says, what score, info and explain show."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from defect_pictures import SIDE, plates
from helpers import fails

pytestmark = pytest.mark.usefixtures("decided_locally")
Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``good`` and ``bad``: 60 plates, and 6 with a defect; ``few.toml`` trains shortly on the good ones."""
    found = tmp_path_factory.mktemp("plates")
    for name, pictures in (("good", plates(60, seed=0)), ("bad", plates(6, seed=1, defect=True))):
        (found / name).mkdir()
        for i, picture in enumerate(pictures):
            picture.save(found / name / f"{i:02}.png")
    recipe = "[detector.recipe]\nepochs = 2\nmin_steps = 50\n"
    (found / "few.toml").write_text(f"[detector]\nsize = {SIDE}\ncalibration = 0.4\nfpr = 0.1\n{recipe}")
    return found


def test_train_decides_and_says_so_and_the_others_show_it(featdiff_cli: Cli, folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    trained = featdiff_cli("train", folder / "good", "--config", folder / "few.toml", "-o", model)
    assert trained.exit_code == 0, trained.stderr
    (line,) = [line for line in trained.stderr.splitlines() if line.startswith("local score")]
    assert line.startswith("local score: on, the images are alike (variety 0.")
    assert line.endswith(" MB, trained on at most 268 MB of places")

    scored = featdiff_cli("score", folder / "bad", "-m", model, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(scored.stdout)))
    assert list(rows[0])[5:8] == ["is_ood", "p_value_global", "p_value_local"]
    assert all(float(row["p_value_local"]) <= 0.1 and row["is_ood"] == "true" for row in rows)

    info = featdiff_cli("info", model).stdout
    assert "local score places in blocks.4, blocks.5, blocks.6 (0." in info

    explained = featdiff_cli("explain", folder / "bad" / "00.png", "-m", model, "-o", tmp_path / "why")
    assert explained.exit_code == 0, explained.stderr
    facts = json.loads(next((tmp_path / "why").glob("*.json")).read_text())
    assert facts["heat"]["max"] > facts["heat"]["threshold"]
    assert facts["p_values"]["local"] <= 0.1

    page = tmp_path / "report.html"
    assert featdiff_cli("score", folder / "bad", "-m", model, "-o", tmp_path / "s.csv", "--report", page).exit_code == 0
    assert "p local" in page.read_text()


def test_it_can_be_turned_off(featdiff_cli: Cli, folder: Path, tmp_path: Path) -> None:
    options = ["--config", folder / "few.toml", "--no-local", "-o", tmp_path / "model"]
    trained = featdiff_cli("train", folder / "good", *options)
    assert "local score: off, as asked" in trained.stderr.splitlines()
    scored = featdiff_cli("score", folder / "bad" / "00.png", "-m", tmp_path / "model", "--format", "csv")
    assert "p_value_local" not in scored.stdout
    assert "local score none" in featdiff_cli("info", tmp_path / "model").stdout


def test_pixel_mode_has_none(featdiff_cli: Cli, folder: Path) -> None:
    fails(featdiff_cli("train", folder / "good", "--mode", "pixel", "--local"), 2, "--local", "pixel mode")
