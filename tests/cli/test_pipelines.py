"""featdiff among other tools: curves in TensorBoard and MLflow, make, and the stages of DVC."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import Result
from helpers import fails, noise_pictures, typed
from mlflow.tracking import MlflowClient
from pages import PIPELINE, blocks_at, commands_at
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from featdiff import FeatureDiffusion
from featdiff.exceptions import LogStopped, UsageError
from featdiff.runtime.run_log import logged_to

Cli = Callable[..., Result]
SMALL = FeatureDiffusion(hidden_max=16, recipe={"epochs": 2, "min_steps": 20}, calibration=0.2)
ROWS = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)


@pytest.fixture
def place(tmp_path: Path, seeded_backbone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photos/ and images/, where ``featdiff train`` takes a small backbone and trains shortly."""
    for name in ("photos", "images"):
        (tmp_path / name).mkdir()
        noise_pictures(tmp_path / name, 30 if name == "photos" else 5, 24)
    config = f"""
[detector]
backbone = "test_resnet"
weights = "{seeded_backbone}"
layers = "layer4"
hidden_max = 32
blocks = 1
local = false
size = 32
recipe = {{ epochs = 1, min_steps = 20, batch_size = 16 }}
"""
    (tmp_path / "small.toml").write_text(config)
    monkeypatch.setenv("FEATDIFF_TRAIN_CONFIG", str(tmp_path / "small.toml"))
    monkeypatch.setenv("FEATDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path


def curves_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each curve in a folder of TensorBoard."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# ---- curves ----


def test_the_command_of_the_page(place: Path) -> None:
    """Six trainings of five folds: the last loss of each is the same in both places, and the settings are there."""
    (command,) = [line for line in commands_at(PIPELINE) if "--log-to" in line]
    done = typed(command, place)
    assert done.returncode == 0, done.stderr
    curves = curves_of(place / "runs")
    assert set(curves) == {f"training-{n}/{name}" for n in range(1, 7) for name in ("loss", "val_loss", "lr", "epoch")}

    client = MlflowClient(f"sqlite:///{place}/runs.db")
    experiment = client.get_experiment_by_name("featdiff")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["backbone"] == '"test_resnet"'
    assert set(run.data.metrics) == set(curves)
    history = client.get_metric_history(run.info.run_id, "training-6/loss")
    assert np.allclose([(point.step, point.value) for point in history], curves["training-6/loss"], rtol=1e-6)


def test_a_point_for_each_step(tmp_path: Path) -> None:
    with logged_to([f"tensorboard:{tmp_path / 'runs'}"], {"note": 1}):
        SMALL.fit(ROWS)
    curves = curves_of(tmp_path / "runs")
    steps = [step for step, _ in curves["training-1/loss"]]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 20
    assert min(value for _, value in curves["training-1/val_loss"]) == pytest.approx(SMALL.validation_loss_, rel=1e-5)
    SMALL.fit(ROWS)  # nothing is written any more
    assert curves_of(tmp_path / "runs") == curves


def test_training_is_the_same_with_it(tmp_path: Path) -> None:
    plain = SMALL.fit(ROWS).score_samples(ROWS)
    with logged_to([f"tensorboard:{tmp_path / 'runs'}"]):
        logged = SMALL.fit(ROWS).score_samples(ROWS)
    assert np.array_equal(plain, logged)


def test_a_training_that_fails_is_marked(tmp_path: Path) -> None:
    target = f"sqlite:///{tmp_path}/runs.db"
    with pytest.raises(KeyboardInterrupt), logged_to([f"mlflow:{target}"]):
        raise KeyboardInterrupt
    client = MlflowClient(target)
    experiment = client.get_experiment_by_name("featdiff")
    assert experiment is not None
    assert client.search_runs([experiment.experiment_id])[0].info.status == "FAILED"


def test_a_place_that_fails_later_does_not_end_the_training(tmp_path: Path) -> None:
    """Its database vanishes after the run was begun."""
    with (
        pytest.warns(LogStopped, match="mlflow:.* takes no more: ") as warned,
        logged_to([f"mlflow:sqlite:///{tmp_path}/runs.db"]),
    ):
        (tmp_path / "runs.db").unlink()
        SMALL.fit(ROWS)
    assert len(warned) == 1
    assert SMALL.n_rows_ == 200


def test_vectors_are_followed_too(featdiff_cli: Cli, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    line = ["train", "--features", tmp_path / "rows.npy", "-o", tmp_path / "model", "-q"]
    done = featdiff_cli(*line, "--log-to", f"tensorboard:{tmp_path / 'runs'}")
    assert done.exit_code == 0, done.stderr
    assert "training-6/loss" in curves_of(tmp_path / "runs")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("tensorbord:runs", "did you mean tensorboard?"),
        ("wandb:runs", "tensorboard:FOLDER or mlflow:URI"),
        ("tensorboard:", "tensorboard:FOLDER"),
        ("tensorboard:/dev/null/x", "cannot be written"),
        ("mlflow:ftp://somewhere", "cannot be written"),
    ],
)
def test_places_that_cannot_be(featdiff_cli: Cli, place: Path, target: str, words: str) -> None:
    """Said before any training."""
    fails(featdiff_cli("train", place / "photos", "-o", place / "m", "-q", "--log-to", target), 2, "--log-to", words)
    with pytest.raises(UsageError), logged_to([target]):
        pass


# ---- make and DVC ----


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_does_what_is_needed_and_no_more(place: Path) -> None:
    (block,) = blocks_at(PIPELINE, language="makefile")
    (place / "Makefile").write_text(block.text)
    (place / "images" / "broken.png").write_bytes(b"nothing")  # exit code 3, which is no failure here

    def make() -> list[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        run = subprocess.run(["make"], cwd=place, capture_output=True, text=True, env={**os.environ, "PATH": path})
        assert run.returncode == 0, run.stderr
        return re.findall(r"^featdiff (\w+)", run.stdout, flags=re.M)

    assert make() == ["train", "score"]
    assert len((place / "scores.csv").read_text().splitlines()) == 7
    assert make() == []
    shutil.copy(place / "photos" / "01.png", place / "images" / "new.png")
    assert make() == ["score"]
    assert len((place / "scores.csv").read_text().splitlines()) == 8


def test_the_stages_of_dvc(place: Path) -> None:
    """It is YAML; each command needs what is named, and leaves what is named."""
    (block,) = blocks_at(PIPELINE, language="yaml")
    stages = yaml.safe_load(block.text)["stages"]
    assert list(stages) == ["train", "score"]
    for stage in stages.values():
        assert all((place / name).exists() for name in stage["deps"])
        assert not any((place / name).exists() for name in stage["outs"])
        done = typed(shlex.join(shlex.split(stage["cmd"])), place)
        assert done.returncode == 0, done.stderr
        assert all((place / name).exists() for name in stage["outs"])
