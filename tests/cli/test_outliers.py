"""``featdiff outliers``, and the self-check that ``featdiff train`` prints."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from helpers import fails
from PIL import Image

from featdiff import Detector
from featdiff.outliers.outlier_file import load_outliers
from featdiff.outliers.synthesis import self_check

Cli = Callable[..., Result]


@pytest.fixture
def photos(sample_folders: dict[str, Path], tmp_path: Path) -> Path:
    """12 tiles each of the two photographs, in a folder each."""
    for name in ("china", "flower"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for file in sorted(sample_folders["train"].glob(f"{name}*"))[:12]:
            shutil.copy(file, tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.mark.parametrize("method", ["diffusion", "boundary"])
def test_a_file_a_picture_and_a_table(featdiff_cli: Cli, tiny_model: Path, photos: Path, method: str) -> None:
    file = photos.parent / "out.safetensors"
    result = featdiff_cli("outliers", photos, "-m", tiny_model, "-n", 20, "-o", file, "--method", method)
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    outliers = load_outliers(file)
    assert (len(outliers), outliers.method, outliers.classes) == (20, method, ["china", "flower"])
    with Image.open(photos.parent / "out.png") as picture:
        colours = {tuple(pixel) for pixel in np.asarray(picture.convert("RGB")).reshape(-1, 3)}
    assert len(colours) > 20
    found = re.findall(r"^(in-domain|boundary|outliers) +([\d.]+) +([\d.]+)%$", result.stderr, re.MULTILINE)
    assert [name for name, _, _ in found] == ["in-domain", "boundary", "outliers"]
    distances = [float(distance) for _, distance, _ in found]
    assert distances[2] > distances[0] > 0
    detector = Detector.from_pretrained(tiny_model)
    scores = detector.score_features(outliers.vectors)
    p = [(1 + (detector.calibration_.scores >= score).sum()) / (len(detector.calibration_) + 1) for score in scores]
    assert float(found[2][2]) == pytest.approx(100 * np.mean([value <= 0.05 for value in p]), abs=0.06)
    assert f"20 outliers of 2 classes: {file}" in result.stderr


def test_options_reach_the_outliers(featdiff_cli: Cli, tiny_model: Path, photos: Path) -> None:
    def made(name: str, *options: object) -> np.ndarray:
        file = photos.parent / name
        result = featdiff_cli("outliers", photos, "-m", tiny_model, "-n", 4, "-q", "-o", file, *options)
        assert (result.exit_code, result.output) == (0, "")
        vectors: np.ndarray = load_outliers(file).vectors.numpy()
        return vectors

    plain = made("a", "--picture", photos.parent / "a.svg")
    assert (photos.parent / "a.svg").read_bytes().startswith(b"<?xml")
    assert np.array_equal(made("b", "--strength", 0.5, "--k", 7), plain)
    for name, option in (("c", ["--strength", 2]), ("d", ["--seed", 1]), ("e", ["--k", 1]), ("f", ["--one-class"])):
        assert not np.allclose(made(name, *option), plain, atol=1e-3), option
    assert load_outliers(photos.parent / "f").classes == ["in-domain"]
    near, far = (made(f"g{sigma:.0e}", "--method", "boundary", "--sigma", sigma) for sigma in (0.001, 0.1))
    assert np.abs(near - far).max() > 0.01


def test_files_that_are_there_are_replaced_only_with_force(featdiff_cli: Cli, tiny_model: Path, photos: Path) -> None:
    file, picture = photos.parent / "out.safetensors", photos.parent / "out.png"
    command = ("outliers", photos, "-m", tiny_model, "-n", 2, "-o", file)
    for there in (file, picture):
        there.write_text("mine")
        fails(featdiff_cli(*command), 2, f"{there} is already there: add --force")
        assert there.read_text() == "mine"
        there.unlink()
    assert not list(photos.parent.glob("out*"))
    file.write_text("mine")
    assert featdiff_cli(*command, "--force").exit_code == 0
    assert len(load_outliers(file)) == 2


def test_unreadable_images_are_listed(featdiff_cli: Cli, tiny_model: Path, photos: Path) -> None:
    (photos / "china" / "broken.png").write_bytes(b"")
    result = featdiff_cli("outliers", photos, "-m", tiny_model, "-n", 2, "-o", photos.parent / "out")
    assert result.exit_code == 3, result.output
    assert f"left out: {photos / 'china' / 'broken.png'}: empty file" in result.stderr
    assert len(load_outliers(photos.parent / "out")) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strength", "0"], ["strength must be a number above 0, not 0"]),
        (["--sigma", "0.1"], ["--sigma belongs to --method boundary"]),
        (["--steps", "5"], ["--steps belongs to --method stable-diffusion"]),
        (["--method", "boundary", "--strength", "1"], ["--strength belongs to --method diffusion"]),
        (["--k", "12"], ["class 'china' has 12 different readable images", "k = 11 or less"]),
        (["--k", "0"], ["--k"]),
        (["-n", "0"], ["-n"]),
        (["--method", "magic"], ["magic"]),
        (["--picture", "out.txt"], ["--picture out.txt", ".png, .svg or .pdf"]),
        (["-o", "out.png"], ["-o out.png", "another file than the picture"]),
        (["-o", "out.csv"], ["-o out.csv", "must end in .safetensors"]),
        (["-o", "gone/out.safetensors"], ["no folder gone for out.safetensors"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_requests_that_make_no_sense(
    featdiff_cli: Cli,
    tiny_model: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(photos.parent)
    fails(featdiff_cli("outliers", photos, "-m", tiny_model, "-n", "2", *options), 2, *words)
    assert [file.name for file in photos.parent.iterdir()] == ["photos"]


def test_images_and_models_that_do_not_do(featdiff_cli: Cli, tiny_model: Path, photos: Path) -> None:
    for file in sorted((photos / "flower").iterdir())[2:]:
        file.unlink()
    command = ("outliers", "-m", tiny_model, "-o", photos.parent / "out")
    fails(
        featdiff_cli(*command, photos), 2, "class 'flower' has 2 different readable images, and at least 3 are needed"
    )
    fails(featdiff_cli(*command, photos.parent / "gone"), 2, "gone: no such file or folder")
    fails(featdiff_cli(*command), 2, "Missing argument 'IMAGES...'")
    fails(featdiff_cli("outliers", photos, "-m", photos.parent / "none"), 1, "no featdiff model at")


def test_training_ends_with_a_self_check(
    featdiff_cli: Cli, sample_folders: dict[str, Path], seeded_backbone: Path, tmp_path: Path
) -> None:
    recipe = {"epochs": 2, "min_steps": 20, "batch_size": 64}
    config = tmp_path / "run.toml"
    settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in recipe.items())
    backbone = f'backbone = "test_resnet"\nweights = {json.dumps(str(seeded_backbone))}\n'
    backbone += 'layers = "layer1,layer2,layer4"\ncalibration = 0.2\n'
    config.write_text(f"[detector]\n{backbone}[detector.recipe]\n{settings}")
    result = featdiff_cli("train", sample_folders["train"], "--config", config, "-o", tmp_path / "model")
    assert result.exit_code == 0, result.output
    found = re.findall(
        r"^self-check: flags (\d+)% of near synthetic outliers at fpr 0.05 ", result.stderr, re.MULTILINE
    )
    layers = "layer1,layer2,layer4"
    detector = Detector("test_resnet", weights=seeded_backbone, layers=layers, recipe=recipe, calibration=0.2)
    share = self_check(detector.fit(sample_folders["train"]))
    assert [int(value) for value in found] == [round(100 * share)]
    assert share > 0.1
    few = featdiff_cli(
        "train", *sorted(sample_folders["test"].iterdir())[:9], "--config", config, "--fpr", 0.4, "-o", tmp_path / "few"
    )
    assert few.exit_code == 0, few.output
    assert "self-check: left out: a self-check needs at least 3 held-out images, and there are 2" in few.stderr
