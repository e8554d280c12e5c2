"""``--groups`` of ``train`` and ``eval``, and what is said about near-copies and about too few groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from click.testing import Result
from helpers import fails
from PIL import Image

from featdiff import Detector, FeatureDiffusion

Cli = Callable[..., Result]
CONFIG = """
[detector]
backbone = "test_resnet"
weights = "{weights}"
layers = "layer1,layer2"
hidden_max = 64
blocks = 1
fpr = {fpr}
recipe = {{ batch_size = 16, epochs = 2, min_steps = 1 }}
size = 32
{more}
"""


@pytest.fixture(scope="module")
def bursts(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 tiles, each five times with a little noise: ``cam0/`` .. ``cam5/``, four bursts each, numbered with gaps."""
    folder = tmp_path_factory.mktemp("bursts") / "photos"
    rng = np.random.default_rng(0)
    for i, file in enumerate(sorted(sample_folders["train"].iterdir())[::16][:24]):
        tile = np.asarray(Image.open(file).convert("RGB")).astype(int)
        (folder / f"cam{i // 4}").mkdir(parents=True, exist_ok=True)
        for j in range(5):
            noisy = np.clip(tile + rng.integers(-3, 4, tile.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"cam{i // 4}" / f"IMG_{100 * (i % 4) + j:04d}.png")
    return folder


@pytest.fixture
def quick(tmp_path: Path, seeded_backbone: Path) -> Path:
    file = tmp_path / "quick.toml"
    file.write_text(CONFIG.format(weights=seeded_backbone, fpr=0.2, more=""))
    return file


def calibrated(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("calibrated on ")]
    return line


# ---- train ----


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("folder", "calibrated on 120 held-out images in 6 groups (folder): --fpr from 0.15 up"),
        ("gap:50", "calibrated on 120 held-out images in 24 groups (gap:50): --fpr from 0.04 up"),
        (r"cam(\d)", r"calibrated on 120 held-out images in 6 groups (cam(\d)): --fpr from 0.15 up"),
        ("none", "calibrated on 120 held-out images: --fpr from 0.0083 up"),
    ],
)
def test_images_that_belong_together(
    featdiff_cli: Cli, bursts: Path, quick: Path, tmp_path: Path, groups: str, expected: str
) -> None:
    result = featdiff_cli("train", bursts, "--config", quick, "--groups", groups, "-o", tmp_path / "model")
    assert calibrated(result) == expected
    assert "near-copies" not in result.stderr
    count = Detector.from_pretrained(tmp_path / "model").calibration_.groups
    assert count == {"folder": 6, "gap:50": 24, "none": 120}.get(groups, 6)


def test_a_table_of_groups(featdiff_cli: Cli, bursts: Path, quick: Path, tmp_path: Path) -> None:
    lines = [f"{file},{file.parent.name}" for file in sorted(bursts.rglob("*.png"))]
    table = tmp_path / "groups.csv"
    table.write_text("\n".join(["path,group", *lines]))
    result = featdiff_cli("train", bursts, "--config", quick, "--groups", table, "-o", tmp_path / "model")
    assert calibrated(result).startswith("calibrated on 120 held-out images in 6 groups")
    table.write_text("\n".join(["path,group", *lines[1:]]))
    result = featdiff_cli("train", bursts, "--config", quick, "--groups", table, "-o", tmp_path / "other")
    fails(result, 2, "--groups", "give no label for", "IMG_0000.png")


def test_near_copies_are_groups_and_said_in_one_line(
    featdiff_cli: Cli, bursts: Path, quick: Path, tmp_path: Path
) -> None:
    result = featdiff_cli("train", bursts, "--config", quick, "-o", tmp_path / "model")
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("WARNING: ")]
    assert "100% of the images have near-copies among the others" in warning
    assert "as with --groups auto" in warning
    assert warning.endswith("or --groups none")
    assert "groups=" not in warning
    assert " (auto): --fpr from " in calibrated(result)
    assert result.stdout == ""

    asked = featdiff_cli("train", bursts, "--config", quick, "--groups", "auto", "-o", tmp_path / "asked")
    assert "WARNING" not in asked.stderr
    assert calibrated(asked) == calibrated(result)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "asked")]
    assert models[0] == models[1]

    quiet = featdiff_cli("train", bursts, "--config", quick, "-q", "-o", tmp_path / "quiet")
    assert (quiet.exit_code, quiet.stderr) == (0, "")


def test_groups_of_a_config(featdiff_cli: Cli, bursts: Path, seeded_backbone: Path, tmp_path: Path) -> None:
    """Tables count from the file's folder, and the command line goes first."""
    config = tmp_path / "run.toml"
    more = f'[data]\nimages = ["{bursts}"]\ngroups = "folder"'
    config.write_text(CONFIG.format(weights=seeded_backbone, fpr=0.2, more=more))
    result = featdiff_cli("train", "--config", config, "-o", tmp_path / "a")
    assert "in 6 groups (folder)" in calibrated(result)
    result = featdiff_cli("train", "--config", config, "--groups", "gap:50", "-o", tmp_path / "b")
    assert "in 24 groups (gap:50)" in calibrated(result)

    lines = [f"{file},{file.parent.name}" for file in sorted(bursts.rglob("*.png"))]
    (tmp_path / "own.csv").write_text("\n".join(["path,group", *lines]))
    config.write_text(config.read_text().replace('"folder"', '"own.csv"'))
    assert "in 6 groups" in calibrated(featdiff_cli("train", "--config", config, "-o", tmp_path / "c"))

    config.write_text(config.read_text().replace('"own.csv"', "5"))
    fails(featdiff_cli("train", "--config", config, "-o", tmp_path / "d"), 2, "run.toml: groups must be text, not 5")


def test_too_few_groups_name_the_options(featdiff_cli: Cli, bursts: Path, quick: Path, tmp_path: Path) -> None:
    command = ("train", bursts, "--config", quick, "--fpr", 0.05, "-o", tmp_path / "model")
    result = featdiff_cli(*command, "--groups", "folder")
    fails(
        result,
        2,
        "--fpr 0.05 needs about 19 groups of images that belong together, and there are 6: give more, or ask for "
        "fpr 0.15 or more",
        "--groups none takes each image for a group",
    )
    assert not (tmp_path / "model").exists()
    fails(featdiff_cli(*command, "--groups", "shot"), 2, "--groups 'shot' has no brackets")
    fails(featdiff_cli(*command, "--groups", "gap:many"), 2, "--groups 'gap:many': a whole number must follow")


def test_too_few_images_name_the_option(featdiff_cli: Cli, few_images: Path, quick: Path, tmp_path: Path) -> None:
    result = featdiff_cli("train", few_images, "--config", quick, "--fpr", 0.05, "-o", tmp_path / "model")
    fails(result, 2, "--fpr 0.05 needs about 19 images, and there are 6: give more, or ask for")
    assert calibrated(featdiff_cli("train", few_images, "--config", quick, "-o", tmp_path / "model")) == (
        "calibrated on 6 held-out images: --fpr from 0.15 up"
    )


def test_pixel_mode_refuses_auto(featdiff_cli: Cli, bursts: Path, tmp_path: Path) -> None:
    result = featdiff_cli("train", bursts, "--mode", "pixel", "--groups", "auto", "-o", tmp_path / "model")
    fails(result, 2, "--groups", "needs the feature mode")


# ---- train on vectors ----


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 bursts of four rows, named after patients."""
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.normal(size=(30, 10)), 4, axis=0) + 0.05 * rng.normal(size=(120, 10))
    table = pandas.DataFrame({f"f{i}": rows[:, i] for i in range(10)})
    table.insert(0, "path", [f"p{i // 4:02d}/shot{i % 4}.png" for i in range(120)])
    file = tmp_path_factory.mktemp("vectors") / "rows.parquet"
    table.to_parquet(file)
    return file


def test_rows_that_belong_together(featdiff_cli: Cli, vectors: Path, tmp_path: Path) -> None:
    result = featdiff_cli("train", "--features", vectors, "--groups", "folder", "-o", tmp_path / "model")
    assert calibrated(result) == "calibrated on 120 held-out rows in 30 groups (labels): --fpr from 0.033 up"
    assert "WARNING" not in result.stderr
    assert FeatureDiffusion.from_pretrained(tmp_path / "model").calibration_.groups == 30


def test_near_copies_among_rows_are_said(featdiff_cli: Cli, vectors: Path, tmp_path: Path) -> None:
    result = featdiff_cli("train", "--features", vectors, "-o", tmp_path / "model")
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("WARNING: ")]
    assert "near-copies" in warning and "--groups auto" in warning
    assert "(auto)" in calibrated(result)


def test_too_few_groups_of_rows(featdiff_cli: Cli, vectors: Path, tmp_path: Path) -> None:
    command = ("train", "--features", vectors, "--groups", r"p(\d)", "-o", tmp_path / "model")
    fails(featdiff_cli(*command), 2, "--fpr 0.05 needs about 19 different rows or groups", "fpr 0.25 or more")


# ---- eval ----


def width(document: dict[str, Any]) -> float:
    low, high = document["pairs"][0]["heads"]["featdiff"]["auroc_ci"]
    return float(high - low)


def test_intervals_of_bursts_are_wider(
    featdiff_cli: Cli, bursts: Path, tiny_model: Path, sample_folders: dict[str, Path]
) -> None:
    stranger = sorted(sample_folders["test"].iterdir())[70]
    command = ("eval", "-m", tiny_model, "--id", bursts, "--ood", f"one={stranger}")
    command = (*command, "--protocol", "as-published", "--json")
    documents = {}
    for name, groups in (("none", []), ("gap", ["gap:50"]), ("auto", ["auto"]), ("again", ["auto"])):
        result = featdiff_cli(*command, *(["--groups", *groups] if groups else []))
        assert result.exit_code == 0, result.stderr
        documents[name] = json.loads(result.stdout)
    assert documents["auto"] == documents["again"]
    for name in ("gap", "auto"):
        for metric in ("auroc", "fpr95"):
            found = documents[name]["pairs"][0]["heads"]["featdiff"][metric]
            assert found == documents["none"]["pairs"][0]["heads"]["featdiff"][metric]
        assert width(documents[name]) > 1.4 * width(documents["none"])


def test_wrong_groups_are_refused(featdiff_cli: Cli, bursts: Path, tiny_model: Path) -> None:
    command = ("eval", "-m", tiny_model, "--id", bursts, "--ood", f"x={bursts}", "--groups")
    fails(featdiff_cli(*command, "shot"), 2, "--groups 'shot' has no brackets")
    fails(featdiff_cli(*command, r"dog(\d)"), 2, "is not found in the path")


def test_sets_of_one_to_four_images(featdiff_cli: Cli, bursts: Path, tiny_model: Path) -> None:
    """Too few to compare with each other are no reason to fail."""
    files = sorted(bursts.rglob("*.png"))[::7]
    for count in range(1, 5):
        given = [value for file in files[:count] for value in ("--id", file)]
        result = featdiff_cli("eval", "-m", tiny_model, *given, "--ood", f"x={files[9]}", "--groups", "auto", "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["pairs"][0]["n_id"] == count
