"""``featdiff score --fdr``, ``--alarms-per-day`` and ``--rate``."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from helpers import fails, stopped
from PIL import Image
from scipy.stats import false_discovery_control

from featdiff.verdicts.fdr import fdr_threshold

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def mixed(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """130 tiles, 20 pictures of noise, and a file that is no image."""
    folder = tmp_path_factory.mktemp("mixed")
    for file in sample_folders["test"].iterdir():
        (folder / file.name).symlink_to(file)
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(folder / f"noise_{i:02}.png")
    (folder / "broken.png").write_bytes(b"not much")
    return folder


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_marks_are_those_of_the_whole_batch(featdiff_cli: Cli, mixed: Path, tiny_model: Path, tmp_path: Path) -> None:
    command = ("score", mixed, "-m", tiny_model, "--fdr", 0.2)
    done = featdiff_cli(*command, "-o", tmp_path / "a.csv")
    assert done.exit_code == 3
    rows = rows_of(tmp_path / "a.csv")
    assert len(rows) == 151
    assert [row["fdr_flag"] for row in rows if row["status"] != "ok"] == [""]
    rows = [row for row in rows if row["status"] == "ok"]
    p_values = np.array([float(row["p_value"]) for row in rows])
    expected = false_discovery_control(p_values, method="bh") <= 0.2
    assert 0 < expected.sum() < 150
    assert [row["fdr_flag"] for row in rows] == [str(bool(flag)).lower() for flag in expected]

    flags = int(expected.sum())
    largest = f"{p_values[expected].max():.2g}"
    told = (
        f"fdr 0.2: {flags} of 150 are marked in fdr_flag, those with a p-value up to {largest}; on average at most 20 %"
    )
    assert told in done.stderr

    for ending in ("jsonl", "parquet"):
        assert featdiff_cli(*command, "-q", "-o", tmp_path / f"a.{ending}").exit_code == 3
    marks = [None if row["status"] != "ok" else row["fdr_flag"] == "true" for row in rows_of(tmp_path / "a.csv")]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.schema.field("fdr_flag").type == pa.bool_()
    assert [line["fdr_flag"] for line in lines] == table["fdr_flag"].to_pylist() == marks

    shown = featdiff_cli(*command, "-q", "--format", "table", "--top", 3).stdout.splitlines()
    assert len(shown) == 4
    assert all(line.endswith("  (fdr)") for line in shown[1:])


def test_merge_marks_all_blocks_together(
    featdiff_cli: Cli, mixed: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block alone would be marked otherwise."""
    monkeypatch.chdir(tmp_path)
    assert featdiff_cli("score", mixed, "-m", tiny_model, "--fdr", 0.2, "-o", "a.parquet").exit_code == 3
    plain = pq.read_table("a.parquet")
    featdiff_cli("manifest", mixed, "-q", "-o", "m.parquet")
    assert (
        featdiff_cli("score", "--manifest", "m.parquet", "--out", "b", "--block", 20, "-m", tiny_model, "-q").exit_code
        == 3
    )

    for file in ("m.csv", "b.parquet"):
        done = featdiff_cli("merge", "b", "--fdr", 0.2, "-o", file)
        assert done.exit_code == 3, done.output
        marked = plain["fdr_flag"].to_pylist()
        assert f"fdr 0.2: {marked.count(True)} of 150 are marked in fdr_flag" in done.stderr
    merged = pq.read_table("b.parquet")
    assert merged.schema.field("fdr_flag").type == pa.bool_()
    assert merged.column_names == plain.column_names
    assert merged["path"].to_pylist() == plain["path"].to_pylist()
    assert merged["fdr_flag"].to_pylist() == marked
    words = {None: "", True: "true", False: "false"}
    assert [row["fdr_flag"] for row in rows_of(tmp_path / "m.csv")] == [words[mark] for mark in marked]

    p_values = merged["p_value"].to_numpy()
    alone = [p_values[i : i + 20] <= fdr_threshold(p_values[i : i + 20], 0.2) for i in range(0, 151, 20)]
    assert np.concatenate(alone).tolist() != [bool(mark) for mark in marked]
    assert "fdr_flag" not in featdiff_cli("merge", "b").stderr
    none = featdiff_cli("merge", "b", "--fdr", 0.001)
    assert "fdr 0.001: none of 150 is marked in fdr_flag\n" in none.stderr
    fails(featdiff_cli("merge", "b", "--fdr", 2), 2, "--fdr", "between 0 and 1")


def test_it_goes_on_after_an_interruption(featdiff_cli: Cli, mixed: Path, tiny_model: Path, tmp_path: Path) -> None:
    command = ("score", mixed, "-m", tiny_model, "--fdr", 0.2, "--batch-size", 8, "-o", tmp_path / "a.csv")
    assert featdiff_cli(*command, "-q").exit_code == 3
    expected = rows_of(tmp_path / "a.csv")
    (tmp_path / "a.csv").unlink()
    code, _, _ = stopped(command, lambda: list(tmp_path.glob("*a.csv*.json*")), number=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert featdiff_cli(*command, "-q", "--resume").exit_code == 3
    assert [row["fdr_flag"] for row in rows_of(tmp_path / "a.csv")] == [row["fdr_flag"] for row in expected]


def test_too_few_held_out_images_are_told(featdiff_cli: Cli, mixed: Path, tiny_model: Path) -> None:
    """78 of them: no p-value is below 1 / 79."""
    done = featdiff_cli("score", mixed, "-m", tiny_model, "--fdr", 0.001)
    assert (
        "fdr 0.001: none of 150 is marked in fdr_flag; with 78 held-out images, at least 1,899 must stand out at once"
        in done.stderr
    )
    marks = [row["fdr_flag"] for row in csv.DictReader(done.stdout.splitlines())]
    assert sorted(marks) == [""] + ["false"] * 150
    fails(featdiff_cli("score", mixed, "-m", tiny_model, "--fdr", 1.5), 2, "--fdr", "between 0 and 1")


def test_alarms_in_a_day_are_a_rate(featdiff_cli: Cli, mixed: Path, tiny_model: Path) -> None:
    command = ("score", mixed, "-m", tiny_model, "--format", "jsonl")
    by_rate = featdiff_cli(*command, "--fpr", 0.1)
    by_day = featdiff_cli(*command, "--alarms-per-day", 100, "--rate", 1000)
    assert by_day.stdout == by_rate.stdout
    assert by_day.stdout != featdiff_cli(*command).stdout


def test_what_the_calibration_cannot_support(featdiff_cli: Cli, mixed: Path, tiny_model: Path) -> None:
    days = ("--alarms-per-day", 10, "--rate", 100_000)
    words = (
        "--alarms-per-day 10 of 100,000 images is a rate of 0.0001",
        "which needs 9,999 held-out images, and there are 78",
        "allow 1,266 a day",
    )
    fails(featdiff_cli("score", mixed, "-m", tiny_model, *days), 2, *words)
    assert featdiff_cli("score", mixed, "-m", tiny_model, "--alarms-per-day", 1266, *days[2:]).exit_code == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rate", 1000), "needs --rate IMAGES"),
        (("--alarms-per-day", 3), "needs --rate IMAGES"),
        (("--alarms-per-day", 3, "--rate", 1000, "--fpr", 0.05), "drop --fpr"),
        (("--alarms-per-day", 3, "--rate", 2), "less than --rate"),
        (("--alarms-per-day", 0, "--rate", 2), "more than 0"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(
    featdiff_cli: Cli, mixed: Path, tiny_model: Path, options: tuple[object, ...], words: str
) -> None:
    fails(featdiff_cli("score", mixed, "-m", tiny_model, *options), 2, words)
