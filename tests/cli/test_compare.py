"""``featdiff compare``: numbers of both models on the same images, changed verdicts, rows, the page, refusals."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from click.testing import Result
from helpers import fails, model_of_vectors, noise_pictures
from PIL import Image
from small_pixels import PIXEL

from featdiff import Detector, PixelDetector
from featdiff.evaluation.metrics import auroc, fpr_at_tpr
from featdiff.evaluation.paired import auroc_difference, fpr95_difference
from featdiff.export.export import export
from featdiff.verdicts.shares import interval_of_share

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def images(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``test``: 60 tiles; ``odd``: 30 tiles turned upside down and inverted; ``noise``: 12 pictures."""
    folder = tmp_path_factory.mktemp("compared")
    for name in ("test", "odd", "noise"):
        (folder / name).mkdir()
    for i, file in enumerate(sorted(sample_folders["test"].iterdir())[::2][:60]):
        picture = Image.open(file).convert("RGB")
        picture.save(folder / "test" / file.name)
        if i % 2:
            odd = Image.fromarray(255 - np.asarray(picture)[::-1])
            odd.save(folder / "odd" / file.name)
    noise_pictures(folder / "noise", 12, 32)
    return folder


@pytest.fixture(scope="module")
def other(
    tiny_arguments: dict[str, Any], sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model that looks at one layer alone, at a rate of its own."""
    arguments = {**tiny_arguments, "layers": "layer2", "fpr": 0.1, "transform": {"input_size": (3, 32, 32)}}
    folder = tmp_path_factory.mktemp("other") / "model"
    Detector(**arguments).fit(sample_folders["train"], groups="none").save_pretrained(folder)
    return folder


def words_of(file: Path) -> str:
    text = re.sub(r"<(script|style)>.*?</\1>", "", file.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split())


# ---- numbers ----


@pytest.fixture(scope="module")
def compared(tiny_model: Path, other: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``--json`` says, with the rows that ``-o`` writes and the page beside it."""
    from importlib.metadata import entry_points

    from click.testing import CliRunner

    (script,) = entry_points(group="console_scripts", name="featdiff")
    folder = tmp_path_factory.mktemp("results")
    arguments = ["compare", tiny_model, other, "--id", images / "test", "--ood", images / "odd", "--ood"]
    arguments += [f"static={images / 'noise'}", "--json", "-o", folder / "rows.csv", "--report", folder / "page.html"]
    result = CliRunner().invoke(script.load(), [str(argument) for argument in arguments], prog_name="featdiff")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found | {"rows": folder / "rows.csv", "page": folder / "page.html"}


def test_numbers_are_those_of_both_models(
    compared: dict[str, Any], tiny_model: Path, other: Path, images: Path
) -> None:
    models = [Detector.from_pretrained(folder) for folder in (tiny_model, other)]
    assert [model["name"] for model in compared["models"]] == [str(tiny_model), str(other)]
    assert [model["fpr"] for model in compared["models"]] == [0.05, 0.1]
    assert [model["calibration"] for model in compared["models"]] == [len(model.calibration_) for model in models]
    assert [model["known"] for model in compared["models"]] == [0, 0]
    assert [pair["ood"] for pair in compared["pairs"]] == ["odd", "static"]

    normal = [model.score(images / "test") for model in models]
    for pair, name in zip(compared["pairs"], ("odd", "noise"), strict=True):
        strange = [model.score(images / name) for model in models]
        scores = [tuple(part.ood_score for part in parts) for parts in (normal, strange)]
        assert pair["n"] == len(strange[0])
        for key, single, measure in (
            ("auroc", auroc, auroc_difference),
            ("fpr95", fpr_at_tpr, fpr95_difference),
        ):
            values = [single(a.ood_score, b.ood_score) for a, b in zip(normal, strange, strict=True)]
            expected = measure(*scores)  # type: ignore[arg-type]
            assert pair[key]["values"] == pytest.approx(values, abs=1e-9), (name, key)
            assert pair[key]["difference"] == pytest.approx(values[1] - values[0], abs=1e-9)
            assert pair[key]["difference_ci"] == pytest.approx(expected.interval, abs=1e-6)
            low, high = expected.interval
            assert pair[key]["is_shown"] == (low > 0 or high < 0)
        assert pair["flagged"] == [part.flagged for part in strange]

    flags = [part.is_ood for part in normal]
    found = compared["id"]
    assert (found["n"], found["flagged"]) == (60, [int(part.sum()) for part in flags])
    assert found["flagged_ci"][1] == pytest.approx(interval_of_share(flags[1].mean(), 60))
    for key, chosen in (("only_a", flags[0] & ~flags[1]), ("only_b", flags[1] & ~flags[0])):
        assert sorted(found[key]) == [normal[0].path[i] for i in np.flatnonzero(chosen)]
    assert len(found["only_a"]) + len(found["only_b"]) > 0
    assert 0 < found["mcnemar_p"] <= 1


def test_rows_of_both_models(compared: dict[str, Any], other: Path, images: Path) -> None:
    rows = list(csv.DictReader(compared["rows"].open()))
    assert [row["set"] for row in rows] == ["in-domain"] * 60 + ["odd"] * 30 + ["static"] * 12
    by_path = {row["path"]: row for row in rows if row["set"] == "in-domain"}
    for row in Detector.from_pretrained(other).score(images / "test"):
        assert float(by_path[row.path]["p_value_b"]) == pytest.approx(row.p_value, rel=1e-6)
        assert by_path[row.path]["is_ood_b"] == str(row.is_ood).lower()
    for key in ("only_a", "only_b"):
        assert sorted(path for path, row in by_path.items() if row["changed"] == key) == sorted(compared["id"][key])


def test_the_page(compared: dict[str, Any], tiny_model: Path, other: Path) -> None:
    text = compared["page"].read_text(encoding="utf-8")
    words = words_of(compared["page"])
    assert "What would change from A to B?" in words
    assert f"A {tiny_model}, flags at 5 %" in words
    assert f"B {other}, flags at 10 %" in words
    first = compared["pairs"][0]["auroc"]
    a, b = (f"{100 * value:.1f}" for value in first["values"])
    assert f"AUROC {a} by A, {b} by B, {100 * first['difference']:+.1f} points" in words
    assert text.count('<path class="own"') == text.count('<path class="other"') == 2
    shown = 0
    for part in (compared["id"], *compared["pairs"]):
        for key in ("only_a", "only_b"):
            shown += min(12, len(part[key]))
            for path in part[key][:12]:
                assert Path(path).name in re.sub(r"\s", "", words), path
    assert text.count('<div class="shot"><img src="data:image/webp') == shown > 0


def test_in_words(featdiff_cli: Cli, tiny_model: Path, other: Path, images: Path, tmp_path: Path) -> None:
    arguments = ("compare", tiny_model, other, "--id", images / "test", "--ood", images / "odd", "--fpr", "0.1")
    result = featdiff_cli(*arguments, "-o", tmp_path / "rows.parquet")
    assert result.exit_code == 0, result.stderr
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert len(table) == 90
    flagged = sum(row["is_ood_a"] for row in table if row["set"] == "in-domain")
    low, high = interval_of_share(flagged / 60, 60)
    told = " ".join(result.stdout.split())
    assert (
        f"in-domain (60 images): A flags {flagged}, {flagged / 0.6:.1f} % ({100 * low:.1f} to {100 * high:.1f})" in told
    )
    assert "where 10 % were asked for" in told
    assert "odd (30 images): AUROC" in told
    assert "Where an interval holds 0, no difference is shown." in told
    only_b = [row["path"] for row in table if row["set"] == "odd" and row["changed"] == "only_b"]
    assert ("odd, flagged by B alone:" in told) == bool(only_b)


def test_a_model_does_not_differ_from_itself(featdiff_cli: Cli, tiny_model: Path, images: Path) -> None:
    """Nor from itself with other thresholds, as far as AUROC goes."""
    arguments = ("compare", tiny_model, tiny_model, "--id", images / "test", "--ood", images / "odd")
    found = json.loads(featdiff_cli(*arguments, "--json").stdout)
    pair = found["pairs"][0]
    assert pair["auroc"]["difference_ci"] == pair["fpr95"]["difference_ci"] == [0, 0]
    assert not pair["auroc"]["is_shown"]
    assert found["id"]["only_a"] == found["id"]["only_b"] == []
    told = featdiff_cli(*arguments).stdout
    assert "+0.0 points (+0.0 to +0.0): no difference shown" in told
    assert "no verdict differs" in told


def test_without_ood_sets(featdiff_cli: Cli, tiny_model: Path, other: Path, images: Path) -> None:
    result = featdiff_cli("compare", tiny_model, other, "--id", images / "test")
    assert result.exit_code == 0, result.stderr
    assert "verdicts differ" in result.stdout
    assert "AUROC A" not in result.stdout
    found = json.loads(featdiff_cli("compare", tiny_model, other, "--id", images / "test", "--json").stdout)
    assert found["pairs"] == []


def test_groups_widen_intervals(featdiff_cli: Cli, tiny_model: Path, other: Path, images: Path) -> None:
    arguments = ("compare", tiny_model, other, "--id", images / "test", "--ood", images / "odd", "--json")
    alone = json.loads(featdiff_cli(*arguments).stdout)
    by_photograph = json.loads(featdiff_cli(*arguments, "--groups", r"([a-z]+_\d\d)_").stdout)
    assert by_photograph["id"]["groups"] < alone["id"]["groups"] == 60
    assert by_photograph["id"]["mcnemar_p"] is None
    low, high = by_photograph["id"]["flagged_ci"][0]
    assert high - low > alone["id"]["flagged_ci"][0][1] - alone["id"]["flagged_ci"][0][0]
    ends = [found["pairs"][0]["auroc"] for found in (alone, by_photograph)]
    assert ends[0]["values"] == ends[1]["values"]
    assert ends[0]["difference_ci"] != ends[1]["difference_ci"]


# ---- images that not both can read, other kinds of models ----


def test_broken_images_are_left_out_for_both(
    featdiff_cli: Cli, tiny_model: Path, other: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    arguments = ("compare", tiny_model, other, "--id", images / "test", "--id", tmp_path / "torn.png", "--json")
    result = featdiff_cli(*arguments)
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["id"]["n"] == 60
    assert list(found["left_out"]) == [str(tmp_path / "torn.png")]
    assert "left out for both: " in result.stderr


def test_training_images_are_told(
    featdiff_cli: Cli, tiny_model: Path, other: Path, sample_folders: dict[str, Path], images: Path
) -> None:
    some = sorted(sample_folders["train"].iterdir())[:40]
    result = featdiff_cli("compare", tiny_model, other, "--id", images / "test", *sum((("--id", f) for f in some), ()))
    assert result.exit_code == 0
    assert re.search(r"WARNING: \d+ of the images were in training of A, .*: the comparison is not fair", result.stderr)
    assert re.search(r"WARNING: \d+ of the images were in training of B", result.stderr)


def test_other_kinds_of_models(featdiff_cli: Cli, tiny_model: Path, other: Path, images: Path, tmp_path: Path) -> None:
    """An exported model says what its origin says; one of the pixel mode something else."""
    export(Detector.from_pretrained(other), tmp_path / "exported", ["onnx"])
    quick = {"distances": ["mse"], "steps": 2, "repetitions": 1, "recipe": {**PIXEL["recipe"], "epochs": 1}}
    pixels = PixelDetector(**{**PIXEL, **quick}).fit(images / "test")
    pixels.save_pretrained(tmp_path / "pixel")
    sets = ("--id", images / "test", "--ood", images / "odd", "--json", "--fpr", "0.1")
    found = json.loads(featdiff_cli("compare", tmp_path / "exported", other, *sets).stdout)
    assert found["id"]["only_a"] == found["id"]["only_b"] == []
    assert found["pairs"][0]["auroc"]["difference"] == pytest.approx(0, abs=0.01)

    found = json.loads(featdiff_cli("compare", tiny_model, tmp_path / "pixel", *sets).stdout)
    scores = [pixels.score(images / name).ood_score for name in ("test", "odd")]
    assert found["pairs"][0]["auroc"]["values"][1] == pytest.approx(auroc(*scores), abs=0.01)


# ---- refused ----


def test_refused(featdiff_cli: Cli, tiny_model: Path, other: Path, images: Path, tmp_path: Path) -> None:
    both = ("compare", tiny_model, other, "--id", images / "test")
    fails(featdiff_cli(*both, "--ood", images / "odd", "--ood", images / "odd"), 2, "names 'odd' twice")
    fails(featdiff_cli(*both, "--ood", "=x"), 2, "--ood takes IMAGES or NAME=IMAGES")
    fails(featdiff_cli(*both, "--ood", tmp_path / "missing"), 2, "missing")
    fails(featdiff_cli(*both, "--fpr", "0.0001"), 2, "--fpr 0.0001 needs at least 9,999 held-out images")
    fails(featdiff_cli(*both, "-o", tmp_path / "rows.txt"), 2, "--output", ".csv")
    fails(featdiff_cli(*both, "--report", tmp_path / "page.pdf"), 2, "--report", ".html")
    fails(featdiff_cli(*both, "--groups", "auto"), 2, "--groups", "looks at features")
    fails(featdiff_cli("compare", tiny_model, other, "--id", images / "noise" / "00.png"), 2, "2 are needed")
    fails(featdiff_cli("compare", tiny_model, tmp_path / "none", "--id", images / "test"), 1, "no featdiff model at")
    model_of_vectors(tmp_path)
    fails(featdiff_cli("compare", tiny_model, tmp_path / "model", "--id", images / "test"), 1, "trained on vectors")


def test_a_path_may_hold_an_equals_sign(featdiff_cli: Cli, tiny_model: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "gain=2").symlink_to(images / "odd")
    arguments = ("compare", tiny_model, tiny_model, "--id", images / "test", "--ood", tmp_path / "gain=2", "--json")
    found = json.loads(featdiff_cli(*arguments).stdout)
    assert [(pair["ood"], pair["n"]) for pair in found["pairs"]] == [("gain=2", 30)]
