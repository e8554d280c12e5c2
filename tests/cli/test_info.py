"""``featdiff info``: what a saved model is, without its backbone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from helpers import fails
from model_mutations import reseal

from featdiff.files.model_folder import FORMAT_VERSION, digest_of

Cli = Callable[..., Result]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the saved tiny detector that may be changed."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_facts(featdiff_cli: Cli, tiny_model: Path) -> None:
    result = featdiff_cli("info", tiny_model)
    assert (result.exit_code, result.stderr) == (0, "")
    config = json.loads((tiny_model / "config.json").read_text())
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert str(tiny_model) in lines["model"] and f"format {FORMAT_VERSION}" in lines["model"]
    assert lines["digest"].split() == ["digest", "SHA-256", config["digest"]]
    assert config["digest"] == digest_of(config) and len(config["digest"]) == 64
    assert (
        f"test_resnet.r160_in1k (file test_resnet.safetensors), SHA-256 {config['backbone']['fingerprint'][:16]}"
        in (lines["backbone"])
    )
    assert lines["view"].split(maxsplit=1)[1] == "whole picture, about 160 x 160 pixels"
    assert "layer1 (32), layer2 (48), layer4 (96)" in lines["layers"]
    assert "one per layer" in lines["denoisers"] and not lines["denoisers"].split()[1].startswith("0.0")
    assert "5 of 292 in-domain images" in lines["neighbours"]
    assert "fused, start times [70, 95], 2 stored noise samples" in lines["score"]
    assert "390 different images" in lines["trained"]
    assert "78 held-out images; fpr 0.05, possible from 0.013 up" in lines["calibrated"]


def test_size_is_that_of_the_files(featdiff_cli: Cli, tiny_model: Path) -> None:
    size = sum(file.stat().st_size for file in tiny_model.iterdir())
    assert f"({size / 1e6:.1f} MB" in featdiff_cli("info", tiny_model).stdout


def test_json_is_the_whole_config(featdiff_cli: Cli, tiny_model: Path) -> None:
    result = featdiff_cli("info", tiny_model, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == json.loads((tiny_model / "config.json").read_text())


def test_default_is_the_folder_that_train_writes(
    featdiff_cli: Cli, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, tmp_path / "featdiff-model")
    monkeypatch.chdir(tmp_path)
    assert "featdiff-model" in featdiff_cli("info").stdout.splitlines()[0]


def test_backbone_is_not_needed(featdiff_cli: Cli, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["settings"]["weights"] = "/gone/weights.safetensors"
    config["backbone"]["tag"] = "no_such_network"
    (model / "config.json").write_text(json.dumps(config))
    reseal(model)
    result = featdiff_cli("info", model)
    assert result.exit_code == 0, result.output
    assert "no_such_network" in result.stdout


def test_missing_model(featdiff_cli: Cli, tmp_path: Path) -> None:
    fails(featdiff_cli("info", tmp_path / "gone"), 1, str(tmp_path / "gone"), "no such folder", "featdiff train")
    fails(featdiff_cli("info", tmp_path), 1, "has no config.json and model.safetensors")


def test_damaged_files(featdiff_cli: Cli, model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-1000])
    fails(featdiff_cli("info", model), 1, "damaged")
    (model / "model.safetensors").write_bytes(data)
    (model / "config.json").write_text("{")
    fails(featdiff_cli("info", model), 1, "damaged")


@pytest.mark.parametrize("option", [[], ["--json"]], ids=["", "json"])
def test_edited_setting_is_refused(featdiff_cli: Cli, model: Path, option: list[str]) -> None:
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"fpr": 0.05', '"fpr": 0.06'))
    fails(featdiff_cli("info", model, *option), 1, str(model), "changed", "config.json")


@pytest.mark.parametrize("key", ["backbone", "images", "settings", "layers", "featdiff_version"])
@pytest.mark.parametrize("option", [[], ["--json"]], ids=["", "json"])
def test_config_that_lacks_a_part(featdiff_cli: Cli, model: Path, key: str, option: list[str]) -> None:
    config = json.loads((model / "config.json").read_text())
    del config[key]
    (model / "config.json").write_text(json.dumps(config))
    reseal(model)
    result = featdiff_cli("info", model, *option)
    if result.exit_code or not option:
        fails(result, 1, str(model), "damaged", key)


def test_newer_format(featdiff_cli: Cli, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"format_version": FORMAT_VERSION + 1}))
    fails(
        featdiff_cli("info", model),
        1,
        f"has format {FORMAT_VERSION + 1}",
        f"reads {FORMAT_VERSION}",
        "pip install -U featdiff",
    )


def test_older_format(featdiff_cli: Cli, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"format_version": 1}))
    fails(featdiff_cli("info", model), 1, "old format 1", "train it again")


@pytest.mark.parametrize("number", [-1, 0, 1.5, None])
def test_impossible_counts_are_refused(featdiff_cli: Cli, model: Path, number: object) -> None:
    """Also under a digest that fits."""
    config = json.loads((model / "config.json").read_text())
    config["images"]["calibration"] = number
    (model / "config.json").write_text(json.dumps(config))
    reseal(model)
    for option in ([], ["--json"]):
        fails(featdiff_cli("info", model, *option), 1, "images.calibration")


def test_groups_decide_the_smallest_rate(featdiff_cli: Cli, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["images"]["calibration_groups"] = 39
    (model / "config.json").write_text(json.dumps(config))
    reseal(model)
    assert "78 held-out images in 39 groups; fpr 0.05, possible from 0.025 up" in featdiff_cli("info", model).stdout
