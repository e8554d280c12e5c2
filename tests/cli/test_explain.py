"""``featdiff explain``: a picture and a JSON file for each image, whatever the images and the model are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from helpers import fails
from PIL import Image

Cli = Callable[..., Result]


@pytest.fixture
def why(featdiff_cli: Cli, tiny_model: Path, seeded_backbone: Path, tmp_path: Path) -> Callable[..., Result]:
    """``featdiff explain`` with the tiny model, into ``tmp_path / "why"``."""

    def run(*images: object, model: Path = tiny_model, output: Path = tmp_path / "why") -> Result:
        return featdiff_cli("explain", *images, "-m", model, "--weights", seeded_backbone, "-o", output)

    return run


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_an_image_becomes_a_picture_and_facts(
    why: Callable[..., Result], sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    image = sorted(sample_folders["digits"].iterdir())[0]
    result = why(image)
    assert result.exit_code == 0, result.output
    stem = f"{image.stem}-explained"
    assert names(tmp_path / "why") == [f"{stem}.json", f"{stem}.png"]

    facts = json.loads((tmp_path / "why" / f"{stem}.json").read_text(encoding="utf-8"))
    assert facts["path"] == str(image)
    assert sum(head["amount"] for head in facts["heads"]) == pytest.approx(facts["ood_score"], abs=1e-4)
    assert [Path(other["path"]).parent for other in facts["nearest"]] == [sample_folders["train"]] * 5
    assert Image.open(tmp_path / "why" / f"{stem}.png").width == 1300

    lines = result.stdout.splitlines()
    assert lines[0] == f"{'OOD' if facts['is_ood'] else 'normal'}, p = {facts['p_value']:.3g}: {image}"
    assert [line.strip() for line in lines[1:-1]] == facts["reasons"]
    assert lines[-1] == f"  -> {tmp_path / 'why' / stem}.png"
    assert "1 image explained in" in result.stderr


def test_a_display_that_is_not_there_does_not_matter(
    tiny_model: Path, seeded_backbone: Path, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    image = sorted(sample_folders["digits"].iterdir())[0]
    command = [sys.executable, "-m", "featdiff_cli", "explain", image, "-m", tiny_model, "--weights", seeded_backbone]
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    for backend in ("tkagg", "a_backend_that_was_removed"):
        done = subprocess.run(
            [*command, "-o", tmp_path / backend],
            env=environment | {"MPLBACKEND": backend},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(names(tmp_path / backend)) == 2


def test_names_do_not_collide_and_no_image_is_replaced(
    why: Callable[..., Result], sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = sorted(sample_folders["test"].iterdir())
    folder = tmp_path / "why"
    for number, name in enumerate(("a/x.png", "b/x.png", "b/X.jpg", "x-explained.png", "Zürich 日本.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(source[number]).save(folder / name, format="PNG")
    before = (folder / "x-explained.png").read_bytes()

    result = why(*(folder / name for name in ("a/x.png", "b/x.png", "b/X.jpg", "x-explained.png", "Zürich 日本.png")))
    assert result.exit_code == 0, result.output
    assert (folder / "x-explained.png").read_bytes() == before
    images = {"x-explained.png", "Zürich 日本.png"}
    pictures = {name for name in names(folder) if name.endswith(".png")} - images
    assert pictures == {
        "x-explained-2.png",
        "x-explained-3.png",
        "X-explained-4.png",
        "x-explained-explained.png",
        "Zürich_日本-explained.png",
    }
    again = why(*(folder / name for name in ("a/x.png", "b/x.png")))  # files of an earlier run are replaced
    assert again.exit_code == 0
    assert {name for name in names(folder) if name.endswith(".png")} == pictures | images


def test_bad_images_are_told_and_the_others_explained(
    why: Callable[..., Result], sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    Image.fromarray(np.zeros((200, 1, 3), dtype=np.uint8)).save(tmp_path / "thin.png")
    good = sorted(sample_folders["test"].iterdir())[0]
    result = why(tmp_path / "torn.png", tmp_path / "gone.png", tmp_path / "thin.png", good)
    assert result.exit_code == 3
    assert f"unreadable: {tmp_path / 'gone.png'}: no such file or folder" in result.stdout
    assert "4 images explained" in result.stderr and "2 without a score" in result.stderr
    assert [name for name in names(tmp_path / "why") if name.endswith(".png")] == [
        f"{good.stem}-explained.png",
        "thin-explained.png",
    ]
    assert len(names(tmp_path / "why")) == 6


def test_a_model_whose_images_have_moved(
    featdiff_cli: Cli,
    why: Callable[..., Result],
    sample_folders: dict[str, Path],
    tmp_path: Path,
    seeded_backbone: Path,
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for file in sorted(sample_folders["train"].iterdir())[:40]:
        shutil.copy(file, photos)
    options = ["--backbone", "test_resnet", "--weights", seeded_backbone, "--layers", "layer1,layer4"]
    image = sorted(sample_folders["test"].iterdir())[0]

    def train(name: str, *more: str) -> Path:
        result = featdiff_cli("train", photos, "-o", tmp_path / name, *options, *more)
        assert result.exit_code == 0, result.output
        return tmp_path / name

    models = {name: train(name, *more) for name, more in (("kept", ["--thumbnails"]), ("none", ["--no-paths"]))}
    models["paths"] = train("paths")
    shutil.rmtree(photos)

    told = {name: why(image, model=model).stderr for name, model in models.items()}
    assert "no picture of them" not in told["kept"] and "numbers only" not in told["kept"]
    assert "similar images have numbers only: this model was trained with --no-paths" in told["none"]
    assert "this model keeps no picture of them: train with --thumbnails" in told["paths"]

    held = {name: featdiff_cli("info", model).stdout for name, model in models.items()}
    assert "paths of 40 training images (0.0 MB), small pictures of them (0.0 MB)" in held["kept"]
    assert "digests of 40 training images, no paths and no pictures" in held["none"]
    assert "paths of 40 training images (0.0 MB), no pictures" in held["paths"]


def test_a_model_without_a_bank(
    featdiff_cli: Cli,
    why: Callable[..., Result],
    sample_folders: dict[str, Path],
    tmp_path: Path,
    seeded_backbone: Path,
) -> None:
    (tmp_path / "alone.toml").write_text(
        '[detector]\nbackbone = "test_resnet"\nlayers = ["layer1", "layer4"]\nneighbors = 0\n'
    )
    result = featdiff_cli(
        "train", sample_folders["test"], "--config", tmp_path / "alone.toml", "--weights", seeded_backbone,
        "-o", tmp_path / "alone",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = why(sorted(sample_folders["digits"].iterdir())[0], model=tmp_path / "alone")
    assert told.exit_code == 0
    assert "no similar images: this model compares with none" in told.stderr


def test_what_makes_no_sense(
    featdiff_cli: Cli,
    why: Callable[..., Result],
    sample_folders: dict[str, Path],
    tmp_path: Path,
    seeded_backbone: Path,
) -> None:
    image = sorted(sample_folders["digits"].iterdir())[0]
    (tmp_path / "file").write_text("mine")
    fails(why(image, output=tmp_path / "file"), 2, str(tmp_path / "file"), "-o", "is a file")
    fails(why(image, model=tmp_path / "nowhere"), 1, "no featdiff model at")
    fails(why(tmp_path / "nothing.png"), 2, "no such file or folder")
    fails(featdiff_cli("train", image, "--mode", "pixel", "--no-paths", "-o", tmp_path / "m"), 2, "--no-paths")
    both = ["train", sample_folders["test"], "--weights", seeded_backbone, "--no-paths", "--thumbnails"]
    fails(featdiff_cli(*both, "-o", tmp_path / "m"), 2, "--thumbnails", "--no-paths")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk(
    why: Callable[..., Result],
    sample_folders: dict[str, Path],
    tmp_path: Path,
    mounted: Callable[[Path, str], Path],
) -> None:
    disk = mounted(tmp_path / "disk", "16k")
    result = why(sorted(sample_folders["digits"].iterdir())[0], output=disk)
    fails(result, 1, "cannot be written: No space left on device")
    assert list(disk.iterdir()) == []
