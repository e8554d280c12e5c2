"""``featdiff recalibrate``: what it writes and says, what it refuses, and that the old model stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from helpers import fails, model_of_vectors
from PIL import Image, ImageEnhance

from featdiff import Detector, FeatureDiffusion
from featdiff.verdicts.shares import interval_of_share, range_of_rate

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def site(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 65 tiles of a darker place to calibrate with in ``new``, and 65 to score in ``test``."""
    folder = tmp_path_factory.mktemp("site")
    for i, file in enumerate(sorted(sample_folders["test"].iterdir())):
        place = folder / ("test" if i % 2 else "new")
        place.mkdir(exist_ok=True)
        ImageEnhance.Brightness(Image.open(file).convert("RGB")).enhance(0.6).save(place / file.name)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def lines(result: Result) -> dict[str, str]:
    """What follows the first colon of each line on standard error, by what comes before it."""
    return {name: text for name, _, text in (line.partition(": ") for line in result.stderr.splitlines())}


def test_old_and_new_rates(featdiff_cli: Cli, tiny_model: Path, site: Path, tmp_path: Path) -> None:
    before = contents(tiny_model)
    new = tmp_path / "new"
    result = featdiff_cli("recalibrate", tiny_model, site / "new", "-o", new, "--fpr", "0.1", "--groups", "none")
    assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    assert contents(tiny_model) == before

    old = Detector.from_pretrained(tiny_model)
    scores = old.score(site / "new", fpr=0.1)
    share = scores.flagged / 65
    assert share > 0.2
    low, high = interval_of_share(share, 65)
    told = lines(result)
    assert told["old calibration"] == (
        f"flags {share:.1%} of these images ({scores.flagged}; 95 % interval {low:.1%} to {high:.1%}), "
        f"threshold {old.calibration_.threshold(0.1):.2f}"
    )
    loaded = Detector.from_pretrained(new)
    assert (loaded.fpr, len(loaded.calibration_)) == (0.1, 65)
    low, high = range_of_rate(0.1, 65)
    threshold = float(np.sort(scores.ood_score)[-6])  # one that 5 others exceed is p = 6/66, and one that 6 do 7/66
    assert (
        told["new calibration"]
        == f"will flag {low:.1%} to {high:.1%} of further ones (95 %), threshold {threshold:.2f}"
    )
    assert told["calibrated on 65 held-out images"] == "--fpr from 0.016 up"
    assert loaded.score(site / "new").flagged == 5  # each is one of the held-out ones itself

    told = lines(featdiff_cli("score", site / "test", "-m", new, "-o", tmp_path / "scores.csv"))
    flags = [row.split(",")[5] for row in (tmp_path / "scores.csv").read_text().splitlines()[1:]]
    assert flags.count("true") <= 14  # 6.5 are expected
    info = featdiff_cli("info", new).stdout
    assert f"made anew   65 images; fpr 0.1: threshold {threshold:.2f}, before" in info


def test_where_the_old_one_would_do(
    featdiff_cli: Cli, tiny_model: Path, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ("--groups", "none", "-o", tmp_path / "new")
    result = featdiff_cli("recalibrate", tiny_model, sample_folders["test"], *arguments)
    assert result.exit_code == 0, result.stderr
    assert lines(result)["old calibration"].endswith(": it would do here, too")


def test_broken_files_are_left_out(featdiff_cli: Cli, tiny_model: Path, site: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    result = featdiff_cli("recalibrate", tiny_model, site / "new", tmp_path / "torn.png", "-o", tmp_path / "new")
    assert result.exit_code == 3
    assert "65 images, 1 unreadable; fpr 0.05" in result.stderr
    assert "left out: " in result.stderr
    assert len(Detector.from_pretrained(tmp_path / "new").calibration_) == 65


def test_only_broken_files(featdiff_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    result = featdiff_cli("recalibrate", tiny_model, tmp_path / "torn.png", "-o", tmp_path / "new")
    fails(result, 2, "none of the images could be read", "torn.png")
    assert not (tmp_path / "new").exists()


def test_a_large_shift_is_told(featdiff_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "noise" / f"{i}.png")
    result = featdiff_cli("recalibrate", tiny_model, tmp_path / "noise", "--groups", "none", "-o", tmp_path / "new")
    assert result.exit_code == 0
    assert "WARNING: 100% of these images are strange to the old calibration" in result.stderr


# ---- refused ----


def test_the_old_folder_is_no_place_for_the_new_model(
    featdiff_cli: Cli, tiny_detector: Detector, site: Path, tmp_path: Path
) -> None:
    tiny_detector.save_pretrained(tmp_path / "model")
    tiny_detector.save_pretrained(tmp_path / "other")
    before = contents(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for place in ("model", "link"):
        for force in ((), ("--force",)):
            arguments = (tmp_path / "model", site / "new", "-o", tmp_path / place, *force)
            fails(featdiff_cli("recalibrate", *arguments), 2, "is the old model, which is kept", "--output")
    arguments = (tmp_path / "model", site / "new", "-o", tmp_path / "other")
    fails(featdiff_cli("recalibrate", *arguments), 2, "a model is already at", "--force")
    assert featdiff_cli("recalibrate", *arguments, "--force").exit_code == 0
    fails(featdiff_cli("recalibrate", tmp_path / "model", site / "new", "-o", site), 2, "is not a featdiff model")
    assert contents(tmp_path / "model") == before
    assert len(json.loads((tmp_path / "other" / "config.json").read_text())["recalibrations"]) == 1


def test_images_that_cannot_calibrate(
    featdiff_cli: Cli, tiny_model: Path, site: Path, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    new = tmp_path / "new"
    fails(
        featdiff_cli("recalibrate", tiny_model, sample_folders["train"], "-o", new), 2, "in training", "leave them out"
    )
    result = featdiff_cli("recalibrate", tiny_model, site / "new", "--fpr", "0.001", "-o", new)
    fails(result, 2, "--fpr 0.001 needs at least 999 images, and there are 65: give more, or ask for fpr 0.016 or more")
    result = featdiff_cli("recalibrate", tiny_model, site / "new", "--groups", "nothing", "-o", new)
    fails(result, 2, "--groups", "no brackets")
    assert not new.exists()


def test_models_that_cannot_be_recalibrated(featdiff_cli: Cli, site: Path, tmp_path: Path) -> None:
    arguments = (site / "new", "-o", tmp_path / "new")
    fails(featdiff_cli("recalibrate", tmp_path / "missing", *arguments), 1, "no featdiff model at")
    model_of_vectors(tmp_path)
    fails(featdiff_cli("recalibrate", tmp_path / "model", *arguments), 2, "--features", "trained on vectors, not on")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "model.onnx").write_bytes(b"")
    fails(featdiff_cli("recalibrate", tmp_path / "exported", *arguments), 2, "is an exported model", "made of")


# ---- vectors ----


def test_a_model_of_vectors(featdiff_cli: Cli, tmp_path: Path) -> None:
    model_of_vectors(tmp_path)
    model, site = tmp_path / "model", tmp_path / "site.npy"
    rng = np.random.default_rng(3)
    rows = 1.6 * rng.normal(size=(100, 6)).astype(np.float32)
    rows[7] = np.nan
    np.save(site, np.concatenate([rows, rows[:1]]))
    before = contents(model)
    result = featdiff_cli("recalibrate", model, "--features", site, "-o", tmp_path / "new", "--fpr", "0.1")
    assert (result.exit_code, result.stdout) == (3, ""), result.stderr
    assert contents(model) == before

    old, new = (FeatureDiffusion.from_pretrained(each) for each in (model, tmp_path / "new"))
    good = np.delete(rows, 7, axis=0)
    scores = old.ood_score(good)
    assert np.array_equal(new.ood_score(good), scores)  # only the threshold is another
    flagged = int(old.calibration_.flags(scores, 0.1)[1].sum())
    assert flagged > 20
    said = lines(result)
    assert "99 rows, 1 duplicate left out, 1 unreadable; fpr 0.1" in result.stderr
    assert said["old calibration"].startswith(f"flags {flagged / 99:.1%} of these rows ({flagged}; 95 % interval ")
    np.testing.assert_array_equal(new.calibration_.scores, np.sort(scores))
    assert new.fpr_ == 0.1 and new.recalibrations_[0]["old_flagged"] == flagged
    assert (new.predict(1.6 * rng.normal(size=(200, 6))) == -1).mean() < 0.25
    assert "made anew   99 images" not in (info := featdiff_cli("info", tmp_path / "new").stdout)
    assert "made anew   99 rows; fpr 0.1: threshold " in info

    scored = featdiff_cli("score", "--features", site, "-m", tmp_path / "new", "--format", "csv", "-q")
    flags = [row.split(",")[5] for row in scored.stdout.splitlines()[1:]]
    assert flags.count("true") in (9, 10)  # of the 99 that calibrate, and a copy of one


def test_vectors_that_cannot_calibrate(featdiff_cli: Cli, tiny_model: Path, site: Path, tmp_path: Path) -> None:
    model_of_vectors(tmp_path)
    new = tmp_path / "out"
    np.save(tmp_path / "few.npy", np.random.default_rng(0).normal(size=(15, 6)).astype(np.float32))
    np.save(tmp_path / "wide.npy", np.zeros((40, 7), np.float32))
    given = ("recalibrate", tmp_path / "model", "-o", new, "--features")
    fails(featdiff_cli(*given, tmp_path / "few.npy"), 2, "--fpr 0.05 needs at least 19 rows, and there are 15")
    fails(featdiff_cli(*given, tmp_path / "wide.npy"), 2, "has 7 columns", "trained on 6")
    fails(featdiff_cli(*given, tmp_path / "new.npy", site / "new"), 2, "IMAGES cannot go with --features")
    of_images = featdiff_cli("recalibrate", tiny_model, "--features", tmp_path / "new.npy", "-o", new)
    fails(of_images, 1, "of mode feature, not vectors")
    fails(featdiff_cli("recalibrate", tiny_model, "-o", new), 2, "name IMAGES to calibrate with")
    assert not new.exists()
