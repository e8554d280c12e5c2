"""``--report`` of ``score``, ``audit`` and ``eval``."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from helpers import fails

from featdiff import Detector

Cli = Callable[..., Result]


def data_of(file: Path) -> dict[str, Any]:
    """What the page's script reads."""
    (text,) = re.findall(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.S)
    found: dict[str, Any] = json.loads(text)
    return found


def words_of(file: Path) -> str:
    """The text of a page."""
    text = re.sub(r"<(script|style|noscript)>.*?</\1>", "", file.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split())


def pictures_in(file: Path) -> int:
    return file.read_text(encoding="utf-8").count('<div class="shot"><img src="data:image/webp')


@pytest.fixture
def mixed(few_images: Path) -> Path:
    (few_images / "c_empty.png").write_bytes(b"")
    return few_images


def test_score_writes_a_page_beside_the_rows(featdiff_cli: Cli, tiny_model: Path, mixed: Path, tmp_path: Path) -> None:
    page, table = tmp_path / "a.html", tmp_path / "a.csv"
    result = featdiff_cli("score", mixed, "-m", tiny_model, "--report", page, "-o", table, "--fpr", "0.4")
    assert result.exit_code == 3, result.output
    assert f"report: {page} (0." in result.stderr

    rows = list(csv.DictReader(table.open()))
    flagged = sum(row["is_ood"] == "true" for row in rows)
    words = words_of(page)
    assert f"{flagged} of 7 images are unlike the normal ones" in words
    assert "c_empty.png empty file (0 bytes)" in words
    assert f"Model {tiny_model}" in words
    assert "Backbone test_resnet" in words

    data = data_of(page)
    readable = {row["path"]: row for row in rows if row["status"] == "ok"}
    assert {f"{mixed}/{name}" for name in data["rows"]["name"]} == set(readable)
    for i, name in enumerate(data["rows"]["name"]):
        row = readable[f"{mixed}/{name}"]
        assert data["levels"]["p"][data["rows"]["p"][i]] == pytest.approx(float(row["p_value"]), rel=1e-6)
        assert data["rows"]["score"][i] == pytest.approx(float(row["ood_score"]), rel=1e-3)
        for column in data["rows"]["more"]:
            assert column["values"][i] == pytest.approx(float(row[f"layer_{column['label']}"]), rel=1e-3)
    assert pictures_in(page) == 6


def test_the_page_explains_the_strangest(
    featdiff_cli: Cli, tiny_model: Path, tiny_detector: Detector, few_images: Path, tmp_path: Path
) -> None:
    page = tmp_path / "a.html"
    assert featdiff_cli("score", few_images, "-m", tiny_model, "--report", page, "-q").exit_code == 0
    text = words_of(page)
    for file in few_images.iterdir():
        for reason in tiny_detector.explain(file).reasons:
            assert " ".join(reason.split()) in text
    assert text.count("Nearest normal images") == 6


@pytest.mark.parametrize("images", [0, 2])
def test_as_many_pictures_as_asked_for(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path, images: int
) -> None:
    page = tmp_path / "a.html"
    options = ("--report", page, "--report-images", images, "-q")
    assert featdiff_cli("score", few_images, "-m", tiny_model, *options).exit_code == 0
    assert pictures_in(page) == images
    assert len(data_of(page)["rows"]["name"]) == 6


def test_an_image_that_is_gone_is_a_row_without_a_picture(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emptied(self: Detector, images: Any, *_: Any) -> Any:
        shutil.rmtree(few_images)
        return explain(self, images)

    explain = Detector.iter_explanations
    monkeypatch.setattr(Detector, "iter_explanations", emptied)
    page = tmp_path / "a.html"
    result = featdiff_cli("score", few_images, "-m", tiny_model, "--report", page, "-q")
    assert result.exit_code == 0, result.output
    assert pictures_in(page) == 0
    assert len(data_of(page)["rows"]["name"]) == 6


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_rows_of_an_interrupted_run_are_in_the_page(
    featdiff_cli: Cli,
    tiny_model: Path,
    mixed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    whole, page = tmp_path / "whole.html", tmp_path / "resumed.html"
    common = ("score", mixed, "-m", tiny_model, "--batch-size", 1, "-q")
    featdiff_cli(*common, "-o", tmp_path / f"whole.{kind}", "--report", whole)

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "_measured", failing_after(3, Detector._measured))
        patch.setattr(Detector, "batches_at_once", 1)
        assert featdiff_cli(*common, "-o", tmp_path / f"a.{kind}", "--report", page).exit_code == 1
    assert not page.exists()
    assert featdiff_cli(*common, "-o", tmp_path / f"a.{kind}", "--report", page, "--resume").exit_code == 3

    first, second = data_of(whole), data_of(page)
    for key in ("name", "folder", "score"):
        assert first["rows"][key] == second["rows"][key]
    p_values = [[data["levels"]["p"][i] for i in data["rows"]["p"]] for data in (first, second)]
    np.testing.assert_allclose(*p_values, rtol=1e-6)
    assert first["valid"] == second["valid"] == 6
    assert pictures_in(page) == 6


def failing_after(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[None] = []

    def called(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) > count:
            raise OSError("no such luck")
        return function(*arguments, **options)

    return called


def test_a_table_cannot_be_resumed_for_a_page(featdiff_cli: Cli, tiny_model: Path, few_images: Path) -> None:
    options = ("--resume", "-o", few_images.parent / "a.txt", "--report", few_images.parent / "a.html")
    fails(featdiff_cli("score", few_images, "-m", tiny_model, *options), 2, "--report needs all scores")


@pytest.mark.parametrize("command", ["score", "audit", "eval"])
@pytest.mark.parametrize(
    ("place", "word"), [("a.csv", "ends in .html"), ("none/a.html", "no folder"), ("full.html", "is a folder")]
)
def test_bad_places_are_refused_before_the_work(
    featdiff_cli: Cli, few_images: Path, tmp_path: Path, command: str, place: str, word: str
) -> None:
    (tmp_path / "full.html").mkdir()
    arguments = ["--id", few_images, "--ood", f"x={few_images}"] if command == "eval" else [few_images]
    result = featdiff_cli(command, *arguments, "--report", tmp_path / place)
    fails(result, 2, "--report: ", word)


def test_a_number_of_pictures_without_a_page(featdiff_cli: Cli, tiny_model: Path, few_images: Path) -> None:
    fails(featdiff_cli("score", few_images, "-m", tiny_model, "--report-images", 3), 2, "give both")


def test_a_full_disk_names_the_page_and_keeps_the_rows(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path, mounted: Callable[[Path, str], Path]
) -> None:
    disk = mounted(tmp_path / "disk", "16k")
    result = featdiff_cli(
        "score", few_images, "-m", tiny_model, "-o", tmp_path / "a.csv", "--report", disk / "a.html", "-q"
    )
    fails(result, 1, f"{disk}/a.html cannot be written: No space left on device")
    assert list(disk.iterdir()) == []
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 7


def test_vectors_have_a_page_without_pictures(featdiff_cli: Cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", rng.normal(size=(120, 12)).astype(np.float32))
    np.save(tmp_path / "test.npy", rng.normal(size=(30, 12)).astype(np.float32) + 2)
    model, page = tmp_path / "model", tmp_path / "a.html"
    assert featdiff_cli("train", "--features", tmp_path / "train.npy", "-o", model, "-q").exit_code == 0
    result = featdiff_cli("score", "--features", tmp_path / "test.npy", "-m", model, "--report", page)
    assert result.exit_code == 0, result.output
    assert pictures_in(page) == 0
    assert len(data_of(page)["rows"]["name"]) == 30
    assert "test.npy" in words_of(page)


def test_audit_writes_a_page(
    featdiff_cli: Cli, sample_folders: dict[str, Path], seeded_backbone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in sorted(sample_folders["test"].iterdir())[:24]:
        shutil.copy(file, folder)
    (folder / "broken.png").write_bytes(b"")
    page, table = tmp_path / "a.html", tmp_path / "a.csv"
    backbone = ("--backbone", "test_resnet", "--weights", seeded_backbone, "--layers", "layer2,layer4")
    result = featdiff_cli("audit", folder, *backbone, "--report", page, "-o", table)
    assert result.exit_code == 3, result.output

    rows = list(csv.DictReader(table.open()))
    data = data_of(page)
    assert [f"{folder}/{name}" for name in data["rows"]["name"]] == [r["path"] for r in rows if r["status"] == "ok"]
    (nearest,) = [column for column in data["rows"]["more"] if column["label"] == "nearest"]
    assert [f"{folder}/{name}" for name in nearest["values"]] == [r["nearest"] for r in rows if r["status"] == "ok"]
    assert data["calibration"] is None
    assert f"{sum(row['is_ood'] == 'true' for row in rows)} of 25 images are marked as odd" in words_of(page)
    assert pictures_in(page) == 24

    assert featdiff_cli("audit", folder, *backbone, "--report", page, "--report-images", 3, "-q").exit_code == 3
    assert pictures_in(page) == 3


def test_eval_writes_a_page(
    featdiff_cli: Cli,
    tiny_model: Path,
    tiny_detector: Detector,
    sample_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    sets = {"id": tmp_path / "id", "digits": tmp_path / "digits"}
    for folder, source in ((sets["id"], "test"), (sets["digits"], "digits")):
        folder.mkdir()
        for file in sorted(sample_folders[source].iterdir())[:16]:
            shutil.copy(file, folder)
    (sets["id"] / "broken.png").write_bytes(b"")
    page = tmp_path / "a.html"
    arguments = ("eval", "--id", sets["id"], "--ood", f"digits<b>={sets['digits']}", "-m", tiny_model)
    result = featdiff_cli(*arguments, "--report", page, "--json", "--protocol", "matched")
    assert result.exit_code == 3, result.output

    (pair,) = json.loads(result.stdout)["pairs"]
    words = words_of(page)
    assert "digits<b>" in words
    assert "digits<b>, matched:" not in words  # the title says it
    for fact in (f"Model {tiny_model}", "False-alarm rate 5 %", "Unreadable 1"):
        assert fact in words
    assert re.search(r"Duration \d+\.\d s", words)
    assert "broken.png empty file (0 bytes)" in words
    for head, metrics in pair["heads"].items():
        low, high = (f"{100 * value:.1f}" for value in metrics["auroc_ci"])
        assert f"{head} {100 * metrics['auroc']:.1f} {low} - {high} " in words

    scores = tiny_detector.score([sets["id"], sets["digits"]])
    in_domain = [row for row in scores.sorted() if row.status == "ok" and "/id/" in row.path]
    digits = [row for row in scores.sorted()[::-1] if "/digits/" in row.path]
    names = re.findall(r'class="name"><bdi>(.*?)</bdi>', page.read_text().replace("<wbr>", ""))
    assert names[:6] == [Path(row.path).name for row in sorted(in_domain, key=lambda row: -row.ood_score)[:6]]
    assert names[6:] == [Path(row.path).name for row in sorted(digits, key=lambda row: row.ood_score)[:6]]
    assert pictures_in(page) == 12
