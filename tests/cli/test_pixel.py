"""``--mode pixel`` through the command line: train, score, eval, info, bench, several processes, Ctrl-C."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from helpers import fails, noise_pictures, stopped
from PIL import Image

from featdiff.files.model_folder import load
from featdiff.report.tables import grids

Cli = Callable[..., Result]
CONFIG = """
[detector]
mode = "pixel"
size = 16
width = 8
multipliers = [1, 2]
attention = []
mask_blocks = 4
repetitions = 2
steps = 4
distances = ["mse", "ssim"]
fpr = 0.2
recipe = { batch_size = 16, epochs = 2, min_steps = 0 }
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 small pictures of noise."""
    return noise_pictures(tmp_path_factory.mktemp("photos"), 60, 16)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "lmd.toml"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def model(featdiff_cli: Cli, photos: Path, config: Path, tmp_path: Path) -> Path:
    result = featdiff_cli("train", photos, "--config", config, "-q", "-o", tmp_path / "model")
    assert (result.exit_code, result.output) == (0, "")
    return tmp_path / "model"


def test_train_says_where_to_look_and_leaves_a_model(
    featdiff_cli: Cli, photos: Path, config: Path, tmp_path: Path
) -> None:
    command = ("train", "--mode", "pixel", photos, "--config", config, "--cache", tmp_path / "cache")
    result = featdiff_cli(*command, "-o", tmp_path / "model")
    assert (result.exit_code, result.stdout) == (0, "")
    said = result.stderr.splitlines()
    assert said[0].startswith("loss and samples, as training goes: ")
    seen = Path(said[0].partition(": ")[2])
    assert (seen / "loss.csv").is_file() and list(seen.glob("samples-*.png"))
    assert "60 images; reading" in said[1] and "trained" in said[2]
    assert said[-1].endswith(f"featdiff score IMAGES -m {tmp_path / 'model'}")
    files = sorted(file.name for file in (tmp_path / "model").iterdir())
    assert files == ["config.json", "inpaintings.png", "model.safetensors"]
    assert Image.open(tmp_path / "model" / "inpaintings.png").size[0] > 400
    assert load(tmp_path / "model")[0]["mode"] == "pixel"
    again = featdiff_cli(*command, "-o", tmp_path / "second")
    assert "training found complete in the cache" in again.stderr


def test_score_prints_rows_and_draws(featdiff_cli: Cli, model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("broken")
    result = featdiff_cli(
        "score", photos, tmp_path / "broken.png", "-m", model, "--figure", tmp_path / "seen.png", "--fpr", "0.5"
    )
    assert result.exit_code == 3, result.output
    rows = list(csv.DictReader(result.stdout.splitlines()))
    assert len(rows) == 61 and list(rows[0]) == ["path", "status", "reason", "ood_score", "p_value", "is_ood"]
    assert rows[-1]["status"] == "unreadable"
    assert 10 <= sum(row["is_ood"] == "true" for row in rows) <= 50
    width, height = Image.open(tmp_path / "seen.png").size
    assert height > 1.5 * width  # eight lines of four pictures


def test_eval_and_info(featdiff_cli: Cli, model: Path, photos: Path) -> None:
    result = featdiff_cli("eval", "--id", photos, "--ood", f"self={photos}", "-m", model, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["model"] == "U-Net at 16 px"
    assert list(found["pairs"][0]["heads"]) == ["featdiff", "mse", "ssim"]
    assert found["pairs"][0]["heads"]["featdiff"]["auroc"] == pytest.approx(0.5)
    fails(
        featdiff_cli("eval", "--id", photos, "--ood", f"a={photos}", "-m", model, "--baselines"), 2, "baselines look at"
    )
    lines = {line.split()[0]: line for line in featdiff_cli("info", model).stdout.splitlines()}
    assert "16 x 16 pixels, 3 channels" in lines["images"]
    assert "0.042 M parameters, trained here" in lines["U-Net"]
    assert "mask checkerboard_alt, ddpm in 4 steps, 2 repetitions" in lines["inpainting"]
    assert "median of mse" in lines["score"]
    assert "12 held-out images" in lines["calibrated"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--distances", "lpip"], ["did you mean lpips"]),
        (["--pretrained", "nowhere"], ["no pipeline at nowhere: there is no such folder"]),
        (["--layers", "layer1"], ["--layers", "pixel mode"]),
        (["--view", "crop"], ["--view", "pixel mode"]),
        (["--no-pretrained"], ["--no-pretrained", "pixel mode"]),
    ],
)
def test_wrong_requests(
    featdiff_cli: Cli, photos: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    result = featdiff_cli("train", "--mode", "pixel", photos, "-o", tmp_path / "model", *arguments)
    fails(result, 1 if "nowhere" in arguments else 2, *words)
    assert not (tmp_path / "model").exists()


def test_modes_do_not_mix(featdiff_cli: Cli, photos: Path, config: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "model")
    fails(
        featdiff_cli("train", "--mode", "feature", photos, "--config", config, *output), 2, "of mode pixel, not feature"
    )
    fails(featdiff_cli("train", photos, "--pretrained", "x/y", *output), 2, "need --mode pixel")
    fails(
        featdiff_cli("score", photos, "-m", tiny_model, "--figure", tmp_path / "f.png"),
        2,
        "train one with --mode pixel",
    )
    other = tmp_path / "other.toml"
    other.write_text('[detector]\nmode = "pixels"\n')
    fails(featdiff_cli("train", photos, "--config", other, *output), 2, "did you mean pixel")
    other.write_text('[detector]\nmode = "pixel"\nbank_size = 3\n')
    fails(featdiff_cli("train", photos, "--config", other, *output), 2, "unknown key 'bank_size'")


def test_weights_that_cannot_be_had_are_said_before_any_work(
    featdiff_cli: Cli, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    result = featdiff_cli("train", "--mode", "pixel", photos, "--cache", tmp_path / "cache", "-o", tmp_path / "model")
    assert (result.exit_code, result.stdout) == (1, "")
    downloading, error = result.stderr.splitlines()
    assert downloading.startswith("Downloading") and error.startswith("Error: ")
    for words in ("squeezenet1_1", "--weights", "--distances mse,ssim"):
        assert words in error
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("figure", "words"), [("seen.jpeg", "must end in .png, .svg or .pdf"), ("nowhere/seen.png", "no folder")]
)
def test_a_figure_that_cannot_be_is_refused_before_the_work(
    featdiff_cli: Cli, model: Path, photos: Path, tmp_path: Path, figure: str, words: str
) -> None:
    fails(featdiff_cli("score", photos, "-m", model, "--figure", tmp_path / figure), 2, words)


def test_bench_prints_lmd_as_rows_and_how_much_slower_it_is(
    featdiff_cli: Cli, sample_folders: dict[str, Path], config: Path, seeded_backbone: Path, tmp_path: Path
) -> None:
    suite = tmp_path / "suite.toml"
    suite.write_text(
        """
[sources.all]
path = "tiles"
[[tasks]]
name = "tiles"
train = "all"
test = "all"
ood = "all"
"""
    )
    (tmp_path / "tiles").symlink_to(sample_folders["test"])
    fixed = ("--data", tmp_path, "--backbone", "test_resnet", "--weights", seeded_backbone, "--layers", "layer2")
    command = ("bench", suite, *fixed, "--lmd", config)
    result = featdiff_cli(*command, "--format", "json")
    assert result.exit_code == 0, result.output
    (task,) = json.loads(result.stdout)["tasks"]
    assert {"lmd_mse", "lmd_ssim"} <= set(task["methods"]) and "lmd_mse" in task["pairs"][0]["heads"]
    costs = task["methods"]
    ratio = costs["featdiff"]["images_per_second"] / costs["lmd_mse"]["images_per_second"]
    assert costs["lmd_mse"]["training_seconds"] > 0
    assert 0.1 < costs["lmd_mse"]["megabytes"] < 1
    (grid,) = grids(json.loads(result.stdout))
    (line,) = (line for line in grid.lines if line[0] == "lmd_mse")
    assert float(line[grid.header.index("x time")]) == pytest.approx(ratio, rel=0.01)
    fails(featdiff_cli(*command[:-1], "dlsr_paper"), 2, "--lmd dlsr_paper is of mode feature")


def test_interrupted_training_goes_on(photos: Path, config: Path, tmp_path: Path, featdiff_cli: Cli) -> None:
    long = tmp_path / "long.toml"
    long.write_text(config.read_text().replace("epochs = 2", "epochs = 2000, patience = 9999"))
    command = ["train", photos, "--config", long, "--cache", tmp_path / "cache", "-o", tmp_path / "model"]
    code, _, errors = stopped(command, lambda: list(tmp_path.rglob("training-*/loss.csv")), pause=1)
    assert code == 130
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors and not (tmp_path / "model").exists()


def test_two_processes_train_as_one_does(photos: Path, config: Path, tmp_path: Path) -> None:
    """As ``torchrun`` starts them (``accelerate launch`` starts one on a CPU): one model, and one process's loss."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29765"]
    curves = []
    for name, launcher in (
        ("one", [sys.executable, "-m", "featdiff_cli"]),
        ("two", [*torchrun, "-m", "featdiff_cli"]),
    ):
        arguments = ["train", photos, "--config", config, "--cache", tmp_path / name, "-o", tmp_path / f"{name}-model"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [*launcher, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("model: ") == 1
        (file,) = (tmp_path / name).rglob("loss.csv")
        with file.open(newline="") as stream:
            curves.append([float(row["loss"]) for row in csv.DictReader(stream)])
    assert len(curves[0]) == len(curves[1]) == 4
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    one, two = (load(tmp_path / f"{name}-model")[1]["calibration"].numpy() for name in ("one", "two"))
    np.testing.assert_allclose(two, one, atol=0.05)
