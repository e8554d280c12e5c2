"""``featdiff update``: what it says, what it refuses, and that the old model is never touched."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from defect_pictures import SIDE, plates
from helpers import FEATDIFF, fails, model_of_vectors, typed
from pages import UPDATED, blocks_at, commands_at
from PIL import Image

from featdiff import Detector

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def place(
    sample_folders: dict[str, Path], tiny_arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """``model``, fitted on 240 tiles of ``old``, and 60 others in ``new`` with a broken file and one of the old."""
    place = tmp_path_factory.mktemp("update")
    files = sorted(sample_folders["train"].iterdir())
    chosen = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:300]]
    for name, some in (("old", chosen[:240]), ("new", [*chosen[239:]])):
        (place / name).mkdir()
        for file in some:
            shutil.copy(file, place / name)
    (place / "new" / "broken.png").write_bytes(b"no picture")
    (place / "noise").mkdir()
    for i, picture in enumerate(np.random.default_rng(1).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(picture).save(place / "noise" / f"{i}.png")
    Detector(**tiny_arguments, size=32).fit(place / "old").save_pretrained(place / "model")
    return place


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def untouched(place: Path) -> Any:
    before = content(place / "model")
    yield
    assert content(place / "model") == before


@pytest.mark.usefixtures("untouched")
def test_what_is_said(featdiff_cli: Cli, place: Path) -> None:
    weights = ["--weights", Detector.from_pretrained(place / "model").settings.weights]
    result = featdiff_cli("update", place / "model", place / "new", *weights)
    assert result.exit_code == 3, result.stderr
    assert result.stdout == ""
    said = result.stderr
    assert "60 new images, 1 known to the model left out, 1 unreadable" in said
    assert "240 old images; their features are in the cache" in said
    assert "held out: 48 old images, 12 new ones" in said
    assert re.search(r"threshold at fpr 0\.05: \d\.\d{3} -> \d\.\d{3}", said)
    assert re.search(r"false alarms among held-out images: old \d\.\d% -> \d\.\d%, new \d+\.\d% -> \d+\.\d%", said)
    assert f"{place / 'model'} is as it was" in said and "broken.png" in said

    updated = Detector.from_pretrained(place / "model-updated")
    assert updated.n_images_ == 300 and len(updated.calibration_) == 60
    fails(featdiff_cli("update", place / "model", place / "new", *weights), 2, "a model is already at", "--force")
    again = featdiff_cli("update", place / "model", place / "new", *weights, "--force", "-q")
    assert (again.exit_code, again.stdout) == (3, "")


@pytest.mark.usefixtures("untouched")
def test_what_is_refused(featdiff_cli: Cli, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = place / "model"
    strange = featdiff_cli("update", model, place / "noise", "-o", out)
    fails(strange, 2, "Error: --accept: 100% of the 30 new images are out-of-distribution to the model (at fpr 0.05)")
    known = featdiff_cli("update", model, place / "old", "-o", out)
    fails(known, 2, "at least 20 new images that can be read, not 0, besides 240")
    for more in ([], ["--force"]):
        for there in (model, model / "inside"):
            over = featdiff_cli("update", model, place / "new", "-o", there, *more)
            fails(over, 2, f"Error: --output: {there} is the old model, which is kept")
    fails(featdiff_cli("update", "org/name", place / "new"), 2, "Error: --output: org/name is no folder here")
    assert not out.exists()


def test_models_that_cannot_be_updated(featdiff_cli: Cli, place: Path, tmp_path: Path) -> None:
    model_of_vectors(tmp_path)
    for folder in ("exported", "hardened/student", "hardened/guard"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "exported" / "model.onnx").write_bytes(b"")
    for name, why in (
        ("model", "trained on vectors"),
        ("exported", "exported model"),
        ("hardened", "hardened student"),
    ):
        refused = featdiff_cli("update", tmp_path / name, place / "new", "-o", tmp_path / "out")
        fails(refused, 2, f"{tmp_path / name} ", why)
    fails(
        featdiff_cli("update", tmp_path / "nothing", place / "new", "-o", tmp_path / "out"), 1, "no featdiff model at"
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, with a local score, of 80 plates in ``old``; 30 others in ``new``, and 30 with a defect in ``bad``."""
    folder = tmp_path_factory.mktemp("parts")
    for name, count, seed in (("old", 80, 0), ("new", 30, 1), ("bad", 30, 2)):
        (folder / name).mkdir()
        for i, picture in enumerate(plates(count, seed, defect=name == "bad")):
            picture.save(folder / name / f"{i:02}.png")
    quick: dict[str, Any] = {"recipe": {"epochs": 1, "min_steps": 10}, "hidden_max": 32}
    detector = Detector(size=SIDE, calibration=0.3, fpr=0.1, local=True, **quick).fit(folder / "old")
    detector.save_pretrained(folder / "model")
    return folder


def test_a_model_with_a_local_score(featdiff_cli: Cli, parts: Path, tmp_path: Path) -> None:
    before = content(parts / "model")
    given = ("update", parts / "model", parts / "new", "-o", tmp_path / "out")
    fails(featdiff_cli(*given), 2, "Error: the model has a local score", "(--old IMAGES)")
    bad = featdiff_cli("update", parts / "model", parts / "bad", "--old", parts / "old", "-o", tmp_path / "out")
    fails(bad, 2, "--accept", "of the 30 new images are out-of-distribution")
    assert not (tmp_path / "out").exists()

    result = featdiff_cli(*given, "--old", parts / "old")
    assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    assert re.search(r"^local score trained on: \d+ s$", result.stderr, re.M)
    assert "80 old images; their features are computed again where they were gone" in result.stderr
    assert content(parts / "model") == before
    scored = featdiff_cli("score", parts / "bad", "-m", tmp_path / "out", "--format", "jsonl", "-q")
    rows = [json.loads(row) for row in scored.stdout.splitlines()]
    assert len(rows) == 30 and np.mean([row["p_value_local"] <= 0.1 and row["is_ood"] for row in rows]) >= 0.9


@pytest.mark.usefixtures("untouched")
def test_accepted_images_are_ordinary_afterwards(featdiff_cli: Cli, place: Path, tmp_path: Path) -> None:
    arguments = ("update", place / "model", place / "noise", "-o", tmp_path / "out", "--accept", "--groups", "none")
    result = featdiff_cli(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "of all new images, 100.0% were flagged before" in result.stderr
    fresh = np.random.default_rng(2).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    assert Detector.from_pretrained(tmp_path / "out").score(fresh).is_ood.mean() < 0.5


@pytest.mark.usefixtures("untouched")
def test_without_the_cache(featdiff_cli: Cli, place: Path, tmp_path: Path) -> None:
    arguments = ("update", place / "model", place / "new", "--cache", tmp_path / "cache", "-o", tmp_path / "out")
    result = featdiff_cli(*arguments)
    assert result.exit_code == 3
    assert "240 old images; their features are kept in the model" in result.stderr  # so few: all of them
    result = featdiff_cli(*arguments, "--old", place / "old", "--force")
    assert "240 old images; their features are computed again where they were gone" in result.stderr


@pytest.mark.usefixtures("untouched")
@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_a_killed_update_leaves_no_half_of_a_new_model(featdiff_cli: Cli, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["update", place / "model", place / "new", "-o", out, "-q"]
    process = subprocess.Popen([FEATDIFF, *map(str, arguments)], stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 300
    while time.monotonic() < limit and process.poll() is None and not any(tmp_path.glob(".*.tmp")):
        time.sleep(0.0002)
    process.kill()  # as the new model is being written
    assert process.wait() in (-signal.SIGKILL, 3)  # it may have been quicker
    assert not out.exists() or Detector.from_pretrained(out).n_images_ == 300
    assert featdiff_cli(*arguments, "--force").exit_code == 3
    assert Detector.from_pretrained(out).n_images_ == 300


def test_what_the_pages_show(place: Path, tmp_path: Path) -> None:
    for name, source in (("my-model", "model"), ("new-photos", "new"), ("photos", "old")):
        shutil.copytree(place / source, tmp_path / name)
    (tmp_path / "new-photos" / "broken.png").unlink()
    commands = commands_at(UPDATED)
    assert len(commands) == 2
    for command in commands:
        done = typed(command, tmp_path)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    updated = [Detector.from_pretrained(tmp_path / name) for name in ("my-model-updated", "my-model-2")]
    assert [each.n_images_ for each in updated] == [300, 300]

    (block,) = blocks_at(UPDATED, language="python")
    with contextlib.chdir(tmp_path):
        exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
    assert Detector.from_pretrained(tmp_path / "my-model-2").n_images_ == 300
