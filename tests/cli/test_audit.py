"""``featdiff audit``: rows, order, what is said, and exit codes."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from helpers import fails, stopped
from PIL import Image

Cli = Callable[..., Result]
HEADER = ["path", "status", "reason", "ood_score", "p_value", "is_ood", "group", "nearest", "duplicate_of"]


@pytest.fixture(scope="module")
def folder(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 tiles, two near-copies and a copy of some of them, and stripes."""
    folder = tmp_path_factory.mktemp("audit") / "photos"
    folder.mkdir()
    files = sorted(sample_folders["train"].iterdir())[::13][:30]
    for i, file in enumerate(files):
        shutil.copy(file, folder / f"{i:02d}.png")
    tile = np.asarray(Image.open(files[3]).convert("RGB")).astype(int)
    for i in (1, 2):
        Image.fromarray(np.clip(tile + i, 0, 255).astype(np.uint8)).save(folder / f"near{i}.png")
    shutil.copy(files[5], folder / "same.png")
    stripes = np.zeros((32, 32, 3), dtype=np.uint8)
    stripes[:, ::4] = 255
    Image.fromarray(stripes).save(folder / "stripes.png")
    return folder


@pytest.fixture
def look(seeded_backbone: Path) -> list[Any]:
    return ["--backbone", "test_resnet", "--weights", seeded_backbone, "--layers", "layer1,layer2", "--size", "32"]


def table(result: Result) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(result.stdout)))


def test_rows_come_oddest_first(featdiff_cli: Cli, folder: Path, look: list[Any]) -> None:
    result = featdiff_cli("audit", folder, *look)
    assert result.exit_code == 0
    rows = table(result)
    assert list(rows[0]) == HEADER
    assert len(rows) == 34
    assert Path(rows[0]["path"]).stem == "stripes"
    assert rows[0]["is_ood"].lower() == "true"
    p = [float(row["p_value"]) for row in rows]
    assert p == sorted(p)
    assert p[0] == pytest.approx(1 / 34, rel=1e-6)
    assert p[-1] == 1

    by_name = {Path(row["path"]).stem: row for row in rows}
    assert by_name["same"]["duplicate_of"] == by_name["05"]["path"]
    assert by_name["same"]["ood_score"] == by_name["05"]["ood_score"]
    assert by_name["near1"]["group"] == by_name["near2"]["group"] == by_name["03"]["group"] != ""


def test_what_is_said(featdiff_cli: Cli, folder: Path, look: list[Any]) -> None:
    result = featdiff_cli("audit", folder, *look)
    said = result.stderr.splitlines()
    assert any(line.startswith("34 images; ") for line in said)
    assert any(line.startswith("1 marked as OOD: the oddest 5 % of them") for line in said)
    assert any("near-copies in" in line for line in said)
    assert any("near1.png" in line and "near2.png" in line for line in said)
    assert "1 duplicate" in said
    assert f"  {folder / 'same.png'} has the content of {folder / '05.png'}" in said
    quiet = featdiff_cli("audit", folder, *look, "-q")
    assert quiet.stderr == ""
    assert quiet.stdout == result.stdout


def test_top_and_formats(featdiff_cli: Cli, folder: Path, look: list[Any], tmp_path: Path) -> None:
    everything = table(featdiff_cli("audit", folder, *look))
    top = table(featdiff_cli("audit", folder, *look, "--top", 3))
    assert top == everything[:3]

    lines = featdiff_cli("audit", folder, *look, "--top", 3, "--format", "jsonl").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["path"] for row in rows] == [row["path"] for row in top]
    assert list(rows[0]) == HEADER
    assert rows[0]["is_ood"] is True

    shown = featdiff_cli("audit", folder, *look, "--top", 3, "--format", "table").stdout
    assert "stripes.png" in shown
    for file in (tmp_path / "odd.csv", tmp_path / "odd.jsonl", tmp_path / "odd.parquet"):
        result = featdiff_cli("audit", folder, *look, "-o", file)
        assert (result.exit_code, result.stdout) == (0, "")
        assert file.stat().st_size > 0
    assert list(csv.DictReader((tmp_path / "odd.csv").open())) == everything
    import pandas

    assert pandas.read_parquet(tmp_path / "odd.parquet").columns.tolist() == HEADER
    fails(featdiff_cli("audit", folder, *look, "--top", 0), 2, "--top")


def test_unreadable_files_are_listed_and_give_code_3(
    featdiff_cli: Cli, folder: Path, look: list[Any], tmp_path: Path
) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes((folder / "00.png").read_bytes()[:60])
    result = featdiff_cli("audit", folder, torn, *look)
    assert result.exit_code == 3
    last = table(result)[-1]
    assert (last["path"], last["status"], last["ood_score"], last["is_ood"]) == (str(torn), "unreadable", "", "")
    assert last["reason"]
    assert "35 images, 1 unreadable; " in result.stderr
    assert f"  left out: {torn}: " in result.stderr


def test_groups(featdiff_cli: Cli, folder: Path, look: list[Any], tmp_path: Path) -> None:
    none = table(featdiff_cli("audit", folder, *look, "--groups", "none"))
    assert {Path(row["path"]).stem for row in none if row["group"]} == {"same", "05"}
    by_name = table(featdiff_cli("audit", folder, *look, "--groups", r"(\d)\d\.png|(near)|(same|stripes)"))
    group = {Path(row["path"]).stem: row["group"] for row in by_name}
    assert group["00"] == group["09"] != group["10"]
    assert group["near1"] == group["near2"] != group["03"]

    odd = tmp_path / "odd.csv"  # its own table says who belongs together
    featdiff_cli("audit", folder, *look, "-o", odd)
    again = table(featdiff_cli("audit", folder, *look, "--groups", odd))
    assert again == list(csv.DictReader(odd.open()))

    fails(featdiff_cli("audit", folder, *look, "--groups", "shot"), 2, "--groups 'shot' has no brackets")
    fails(featdiff_cli("audit", folder, *look, "--groups", "gone.csv"), 2, "--groups: gone.csv: no such file")


def test_too_few_images(featdiff_cli: Cli, few_images: Path, look: list[Any]) -> None:
    fails(featdiff_cli("audit", few_images, *look), 2, "needs at least 20 different ones that can be read, not 6")


def test_a_rate_that_needs_more_images(featdiff_cli: Cli, folder: Path, look: list[Any]) -> None:
    result = featdiff_cli("audit", folder, *look, "--fpr", 0.01)
    fails(result, 2, "--fpr 0.01 needs at least 99 other images")
    assert table(featdiff_cli("audit", folder, *look, "--fpr", 0.2))[5]["is_ood"].lower() == "true"


def test_archives_and_paths_on_stdin(featdiff_cli: Cli, folder: Path, look: list[Any], tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", folder.parent, "photos")
    packed = table(featdiff_cli("audit", archive, *look))
    plain = table(featdiff_cli("audit", folder, *look))
    assert [Path(row["path"]).name for row in packed] == [Path(row["path"]).name for row in plain]
    paths = "\n".join(str(file) for file in sorted(folder.iterdir()))
    assert table(featdiff_cli("audit", "-", *look, input=paths)) == plain


def test_nothing_given(featdiff_cli: Cli, tmp_path: Path) -> None:
    fails(featdiff_cli("audit"), 2, "Missing argument 'IMAGES...'")
    fails(featdiff_cli("audit", tmp_path / "gone"), 2, "gone")
    (tmp_path / "empty").mkdir()
    fails(featdiff_cli("audit", tmp_path / "empty"), 2, "empty")


def test_ctrl_c_is_one_line(sample_folders: dict[str, Path], look: list[Any], tmp_path: Path) -> None:
    arguments = ["audit", sample_folders["train"], sample_folders["digits"], *look, "--batch-size", 4]
    code, output, errors = stopped(
        [*arguments, "--cache", tmp_path / "cache"], lambda: list(tmp_path.glob("cache/features/*")), pause=0.05
    )
    assert code == 130
    assert output == ""
    assert errors == "interrupted; features are kept, the same command goes on from there\n"
