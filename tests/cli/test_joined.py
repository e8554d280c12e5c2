"""A model of several encoders on the command line: trained, shown, scored, explained, evaluated and served."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from helpers import noise_pictures
from http_servers import Server
from weights_files import write

from featdiff import JoinedDetector

Cli = Callable[..., Result]
PAIR = "test_resnet,test_efficientnet"


@pytest.fixture(scope="module")
def weights(seeded_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file for each of ``PAIR``, as ``--weights`` takes them."""
    import timm

    torch.manual_seed(1)
    state = timm.create_model("test_efficientnet", pretrained=False).state_dict()
    return f"{seeded_backbone},{write(state, tmp_path_factory.mktemp('weights') / 'other.safetensors')}"


@pytest.fixture(scope="module")
def photos(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 tiles."""
    folder = tmp_path_factory.mktemp("photos")
    for file in sorted(sample_folders["train"].iterdir())[::9][:40]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_pictures(tmp_path_factory.mktemp("strange"), 8, 32)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes training short."""
    file = tmp_path_factory.mktemp("config") / "quick.toml"
    recipe = "{ epochs = 2, min_steps = 1, batch_size = 16 }"
    file.write_text(f"[detector]\nhidden_max = 32\nblocks = 1\nsize = 64\nfpr = 0.2\nrecipe = {recipe}\n")
    return file


@pytest.fixture(scope="module")
def model(photos: Path, config: Path, weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained model; do not change it."""
    from importlib.metadata import entry_points

    from click.testing import CliRunner

    folder = tmp_path_factory.mktemp("joined") / "model"
    (script,) = entry_points(group="console_scripts", name="featdiff")
    options = ["--backbone", PAIR, "--weights", weights, "--config", str(config), "-o", str(folder)]
    result = CliRunner().invoke(script.load(), ["train", str(photos), *options])
    assert result.exit_code == 0, result.output
    assert "2 encoders, joined by z-sum: test_resnet, test_efficientnet" in result.stderr
    assert "calibrated on 40 held-out images" in result.stderr
    return folder


def refused(result: Result, text: str, code: int = 2) -> None:
    lines = [line for line in result.stderr.splitlines() if line]
    assert result.exit_code == code, result.output
    assert text in lines[-1]


def test_info_tells_each_backbone(featdiff_cli: Cli, model: Path) -> None:
    text = featdiff_cli("info", model).stdout
    config = json.loads(featdiff_cli("info", model, "--json").stdout)
    assert "encoders    2, joined by z-sum" in text
    for i, encoder in enumerate(config["encoders"]):
        backbone = encoder["backbone"]
        assert f"backbone {i + 1}  {backbone['tag']}" in text
        assert f"SHA-256 {backbone['fingerprint'][:16]}" in text
    assert "layers 2" in text
    assert "keeps       paths of 40 training images" in text
    assert "trained on  40 different images" in text


def test_score(featdiff_cli: Cli, model: Path, photos: Path, strange: Path) -> None:
    result = featdiff_cli("score", strange, "-m", model, "--format", "csv")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert len(rows) == 8
    expected = JoinedDetector.from_pretrained(model).score(strange)
    np.testing.assert_allclose([float(row["ood_score"]) for row in rows], expected.ood_score, rtol=1e-6)
    assert [float(row["p_value"]) for row in rows] == pytest.approx(expected.p_value.tolist())
    assert [row["is_ood"].lower() == "true" for row in rows] == expected.is_ood.tolist()
    assert {"p_value_test_resnet", "p_value_test_efficientnet"} <= set(rows[0])
    assert {"layer_test_resnet/layer1", "layer_test_efficientnet/blocks.0"} <= set(rows[0])


def test_score_by_weights_that_lie_elsewhere(featdiff_cli: Cli, model: Path, strange: Path, weights: str) -> None:
    given = featdiff_cli("score", strange, "-m", model, "--format", "csv", "--weights", weights)
    assert given.stdout == featdiff_cli("score", strange, "-m", model, "--format", "csv").stdout
    first, second = weights.split(",")
    result = featdiff_cli("score", strange, "-m", model, "--weights", f"{second},{first}")
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    refused(featdiff_cli("score", strange, "-m", model, "--weights", first), "one file for each of 2 backbones", 1)


def test_report_and_explain(featdiff_cli: Cli, model: Path, strange: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    result = featdiff_cli("score", strange, "-m", model, "--report", report, "-o", tmp_path / "rows.csv")
    assert result.exit_code == 0, result.output
    assert "test_efficientnet" in report.read_text()

    image = sorted(strange.iterdir())[0]
    result = featdiff_cli("explain", image, "-m", model, "-o", tmp_path / "why")
    assert result.exit_code == 0, result.output
    told = json.loads(next((tmp_path / "why").glob("*.json")).read_text())
    assert set(told["p_values"]) == {"test_resnet", "test_efficientnet"}
    names = {head["name"].removeprefix("layer_").partition("/")[0] for head in told["heads"]}
    assert names == {"test_resnet", "test_efficientnet"}
    assert sum(head["amount"] for head in told["heads"]) == pytest.approx(told["ood_score"], abs=1e-4)


def test_eval(featdiff_cli: Cli, model: Path, photos: Path, strange: Path, sample_folders: dict[str, Path]) -> None:
    result = featdiff_cli("eval", "--id", photos, "--ood", f"noise={strange}", "-m", model, "--json", "-q")
    assert result.exit_code == 0, result.output
    heads = json.loads(result.stdout)["pairs"][0]["heads"]
    assert {"featdiff", "min-p", "test_resnet", "test_efficientnet"} <= set(heads)


def test_serve(model: Path, strange: Path) -> None:
    image = sorted(strange.iterdir())[0]
    expected = JoinedDetector.from_pretrained(model).score(image)
    with Server(model) as server:
        row = server.score(image.read_bytes())
    assert row["ood_score"] == pytest.approx(expected.ood_score[0], abs=1e-4)
    assert {"p_value_test_resnet", "p_value_test_efficientnet"} <= set(row)


def test_min_p_and_arguments_that_make_no_sense(
    featdiff_cli: Cli, photos: Path, config: Path, weights: str, tmp_path: Path
) -> None:
    shared = ("train", photos, "--weights", weights, "--config", config, "-o", tmp_path / "model")
    result = featdiff_cli(*shared, "--backbone", PAIR, "--join", "min-p")
    assert result.exit_code == 0, result.output
    assert "joined by min-p" in featdiff_cli("info", tmp_path / "model").stdout

    refused(featdiff_cli(*shared, "--backbone", PAIR, "--force", "--local"), "no local score")
    refused(featdiff_cli(*shared, "--backbone", f"{PAIR},test_vit", "--force"), "one file for each of 3 backbones")
    one = ("train", photos, "--config", config, "-o", tmp_path / "one")
    refused(featdiff_cli(*one, "--backbone", "test_resnet", "--join", "z-sum"), "name several backbones")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("export", "-m", "{model}", "-o", "{tmp}/exported"), "cannot be exported yet"),
        (("recalibrate", "{model}", "{photos}", "-o", "{tmp}/other"), "cannot be recalibrated yet"),
        (("update", "{model}", "{photos}", "-o", "{tmp}/other"), "cannot be updated"),
        (("outliers", "{photos}", "-m", "{model}", "-o", "{tmp}/outliers.safetensors"), "of mode joined"),
    ],
)
def test_what_it_cannot_do_is_refused(
    featdiff_cli: Cli, model: Path, photos: Path, tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    places = {"model": model, "photos": photos, "tmp": tmp_path}
    result = featdiff_cli(*(word.format(**places) for word in words))
    refused(result, text)
    assert not list(tmp_path.iterdir())
