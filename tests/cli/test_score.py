"""``featdiff score``: rows in every format, exit codes, and how it ends when something goes wrong."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from click.testing import Result
from helpers import FEATDIFF, fails, stopped

from featdiff import Detector
from featdiff.data.image_refs import ImageRef

Cli = Callable[..., Result]
COLUMNS = [
    *("path", "status", "reason", "ood_score", "p_value", "is_ood"),
    *("layer_layer1", "layer_layer2", "layer_layer4"),
]


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture
def files(few_images: Path) -> list[str]:
    return sorted(map(str, few_images.iterdir()))


@pytest.fixture
def mixed(few_images: Path) -> Path:
    """The folder of few images with two more that cannot be read."""
    (few_images / "c_empty.png").write_bytes(b"")
    (few_images / "z_cut.png").write_bytes((few_images / "a.png").read_bytes()[:150])
    return few_images


# ---- rows ----


def test_csv_holds_what_the_detector_says(
    featdiff_cli: Cli, tiny_detector: Detector, tiny_model: Path, few_images: Path, files: list[str]
) -> None:
    result = featdiff_cli("score", few_images, "-m", tiny_model)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == ",".join(COLUMNS)
    rows = rows_of(result.stdout)
    scores = tiny_detector.score(few_images)
    assert [row["path"] for row in rows] == scores.path == files
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["reason"] for row in rows} == {""}
    for name, values in (("ood_score", scores.ood_score), ("p_value", scores.p_value)):
        np.testing.assert_allclose([float(row[name]) for row in rows], values, rtol=1e-6)
    for name, values in scores.layers.items():
        np.testing.assert_allclose([float(row[f"layer_{name}"]) for row in rows], values, rtol=1e-6)
    assert [row["is_ood"] for row in rows] == [str(bool(value)).lower() for value in scores.is_ood]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_format_holds_the_same_rows(
    featdiff_cli: Cli, tiny_model: Path, mixed: Path, tmp_path: Path, kind: str
) -> None:
    """The suffix of the file tells which; ``--format`` goes before it (see the next test)."""
    file = tmp_path / f"rows.{kind}"
    result = featdiff_cli("score", mixed, "-m", tiny_model, "-o", file)
    assert result.exit_code == 3, result.output
    assert result.stdout == ""
    reference = [
        json.loads(line)
        for line in featdiff_cli("score", mixed, "-m", tiny_model, "--format", "jsonl").stdout.splitlines()
    ]
    if kind == "csv":
        found: list[Any] = rows_of(file.read_text())
        expected = [
            {k: "" if v is None else str(v).lower() if isinstance(v, bool) else str(v) for k, v in row.items()}
            for row in reference
        ]
        assert found == expected
    elif kind == "jsonl":
        assert [json.loads(line) for line in file.read_text().splitlines()] == reference
    else:
        table = pyarrow.parquet.read_table(file)
        assert table.column_names == COLUMNS
        assert table.to_pylist() == reference
    assert len(reference) == 8
    assert list(reference[0]) == COLUMNS


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "table"])
def test_every_format_goes_to_standard_output(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, files: list[str], tmp_path: Path, kind: str
) -> None:
    command = ("score", few_images, "-m", tiny_model, "--format", kind)
    result = featdiff_cli(*command, "-q")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    other = tmp_path / ("rows.jsonl" if kind == "csv" else "rows.csv")
    assert featdiff_cli(*command, "-o", other).stdout == ""
    assert result.stdout_bytes == other.read_bytes()
    if kind == "parquet":
        assert pyarrow.parquet.read_table(other).column("path").to_pylist() == files
    else:
        assert all(file in result.stdout for file in files)


def test_table_is_for_people(featdiff_cli: Cli, tiny_model: Path, mixed: Path) -> None:
    result = featdiff_cli("score", mixed, "-m", tiny_model, "--format", "table", "--fpr", "0.9")
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["verdict", "p-value", "score", "path"]
    assert [line.split()[0] for line in lines if "png" in line].count("unreadable") == 2
    assert any(line.endswith("(empty file (0 bytes))") for line in lines)
    assert len(lines) == 8


def test_summary_counts(featdiff_cli: Cli, tiny_model: Path, mixed: Path) -> None:
    result = featdiff_cli("score", mixed, "-m", tiny_model, "--fpr", "0.9")
    line = result.stderr.splitlines()[0]
    flagged = sum(row["is_ood"] == "true" for row in rows_of(result.stdout))
    assert line.startswith("8 images in ")
    assert "images/s" in line
    assert f"{flagged} OOD at fpr 0.9, 2 unreadable" in line


def test_the_request_is_read_once(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing may take minutes, and standard input can be read once only."""
    from featdiff.data import loaders, references

    calls: list[str] = []
    list_images, read_bytes = references.list_images, Path.read_bytes

    def listing(sources: Any, **options: Any) -> Any:
        if not all(isinstance(source, ImageRef) for source in sources):  # else they are listed already
            calls.append("list_images")
        return list_images(sources, **options)

    def reading(file: Path) -> bytes:
        if file.is_relative_to(tiny_model):
            calls.append(file.name)
        return read_bytes(file)

    for module in (references, loaders):
        monkeypatch.setattr(module, "list_images", listing)
    monkeypatch.setattr(Path, "read_bytes", reading)
    assert featdiff_cli("score", few_images, "-m", tiny_model, "-q").exit_code == 0
    assert sorted(calls) == ["config.json", "list_images", "model.safetensors"]


# ---- exit codes ----


def test_unreadable_rows_give_code_3(featdiff_cli: Cli, tiny_model: Path, mixed: Path) -> None:
    result = featdiff_cli("score", mixed, "-m", tiny_model, "-q")
    assert result.exit_code == 3
    rows = rows_of(result.stdout)
    bad = {Path(row["path"]).name: row for row in rows if row["status"] == "unreadable"}
    assert list(bad) == ["c_empty.png", "z_cut.png"]
    assert "empty file" in bad["c_empty.png"]["reason"]
    assert "damaged" in bad["z_cut.png"]["reason"]
    assert all(row[name] == "" for row in bad.values() for name in COLUMNS[3:])
    assert [Path(row["path"]).name for row in rows][2:4] == ["c.png", "c_empty.png"]


def test_only_unreadable_images_still_give_rows(featdiff_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    result = featdiff_cli("score", tmp_path, "-m", tiny_model, "-q")
    assert result.exit_code == 3
    (row,) = rows_of(result.stdout)
    assert (row["status"], list(row)) == ("unreadable", COLUMNS)


def test_fail_on_ood_gives_code_4(featdiff_cli: Cli, tiny_model: Path, mixed: Path) -> None:
    """Whether an image is flagged is known from its p-value; with code 4 before code 3."""
    rows = rows_of(featdiff_cli("score", mixed, "-m", tiny_model, "--fpr", "0.99").stdout)
    lowest = min(float(row["p_value"]) for row in rows if row["p_value"])
    assert lowest < 0.98
    command = ("score", mixed, "-m", tiny_model, "-q", "--fail-on-ood", "--fpr")
    assert featdiff_cli(*command, f"{lowest + 0.005}").exit_code == 4
    if lowest > 2 / 79:
        assert featdiff_cli(*command, f"{lowest - 0.005}").exit_code == 3
    assert featdiff_cli(*command[:-2], "--fpr", "0.99").exit_code == 3  # flagged, but nobody asked


def test_missing_file_among_others_is_a_row(
    featdiff_cli: Cli, tiny_model: Path, files: list[str], tmp_path: Path
) -> None:
    gone = tmp_path / "gone.png"
    result = featdiff_cli("score", files[0], gone, files[1], "-m", tiny_model, "-q")
    assert result.exit_code == 3
    rows = rows_of(result.stdout)
    assert [row["path"] for row in rows] == [files[0], str(gone), files[1]]
    assert rows[1]["reason"] == "no such file or folder"


def test_empty_and_missing_folders(featdiff_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(featdiff_cli("score", tmp_path / "empty", "-m", tiny_model), 2, str(tmp_path / "empty"), "no images")
    fails(featdiff_cli("score", tmp_path / "gone", "-m", tiny_model), 2, str(tmp_path / "gone"), "no such file")
    fails(featdiff_cli("score", tmp_path / "*.gif", "-m", tiny_model), 2, "no file matches")


def test_path_given_twice_is_one_row(featdiff_cli: Cli, tiny_model: Path, few_images: Path, files: list[str]) -> None:
    result = featdiff_cli("score", files[3], few_images, files[3], "-m", tiny_model, "-q")
    assert [row["path"] for row in rows_of(result.stdout)] == [files[3], *files[:3], *files[4:]]


# ---- paths on standard input ----


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_paths_on_stdin(featdiff_cli: Cli, tiny_model: Path, files: list[str], end: bytes) -> None:
    lines = end.join([*(file.encode() for file in files[:3]), b"", b"/gone.png"])
    result = featdiff_cli("score", "-", "-m", tiny_model, "-q", input=lines)
    assert result.exit_code == 3, result.output
    assert [row["path"] for row in rows_of(result.stdout)] == [*files[:3], "/gone.png"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_empty_stdin_gives_a_table_without_rows_or_is_refused(
    featdiff_cli: Cli, tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    """A file that is written must be readable: a header without rows, not zero bytes."""
    file = tmp_path / f"rows.{kind}"
    result = featdiff_cli("score", "-", "-m", tiny_model, "-o", file, input=b"")
    if result.exit_code:
        fails(result, 2)
        assert not file.exists()
    elif kind == "csv":
        assert file.read_text().splitlines() == [",".join(COLUMNS)]
    else:
        assert pyarrow.parquet.read_table(file).column_names == COLUMNS


# ---- wrong requests ----


@pytest.mark.parametrize(
    ("fpr", "words"),
    [
        ("0", ["--fpr", "between 0 and 1"]),
        ("1.5", ["--fpr", "between 0 and 1"]),
        ("0.0001", ["--fpr 0.0001 needs at least 9,999", "there are 78", "0.013"]),
        ("x", ["--fpr"]),
    ],
)
def test_impossible_rate_leaves_an_older_file_alone(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path, fpr: str, words: list[str]
) -> None:
    (tmp_path / "rows.csv").write_text("yesterday's rows")
    result = featdiff_cli("score", few_images, "-m", tiny_model, "--fpr", fpr, "-o", tmp_path / "rows.csv")
    fails(result, 2, *words)
    assert (tmp_path / "rows.csv").read_text() == "yesterday's rows"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["-m", "gone"], 1, ["no featdiff model at gone", "no such folder", "featdiff train"]),
        (["--device", "abacus"], 2, ["no device 'abacus'"]),
        (["--weights", "gone.safetensors"], 1, ["gone.safetensors"]),
        (["--format", "xml"], 2, ["--format", "xml"]),
        (["--batch-size", "0"], 2, ["--batch-size"]),
        (["--wings"], 2, ["--wings", "featdiff score --help"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_wrong_options_leave_an_older_file_alone(
    featdiff_cli: Cli,
    tiny_model: Path,
    few_images: Path,
    tmp_path: Path,
    options: list[str],
    code: int,
    words: list[str],
) -> None:
    (tmp_path / "rows.csv").write_text("yesterday's rows")
    result = featdiff_cli("score", few_images, "-m", tiny_model, "-o", tmp_path / "rows.csv", *options)
    fails(result, code, *words)
    assert (tmp_path / "rows.csv").read_text() == "yesterday's rows"


def test_images_must_be_named(featdiff_cli: Cli, tiny_model: Path) -> None:
    fails(featdiff_cli("score", "-m", tiny_model), 2, "IMAGES")


def test_output_in_a_missing_folder(featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path) -> None:
    file = tmp_path / "gone" / "rows.csv"
    fails(
        featdiff_cli("score", few_images, "-m", tiny_model, "-o", file),
        1,
        str(file),
        "No such file or directory",
    )


def test_folder_as_output(featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path) -> None:
    fails(featdiff_cli("score", few_images, "-m", tiny_model, "-o", tmp_path), 1, str(tmp_path), "directory")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "table"])
def test_full_disk(featdiff_cli: Cli, tiny_model: Path, few_images: Path, kind: str) -> None:
    result = featdiff_cli("score", few_images, "-m", tiny_model, "--format", kind, "-o", "/dev/full")
    fails(result, 1, "No space left on device")


def test_damaged_model_is_one_line(featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    data = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(data[: len(data) // 2])
    fails(featdiff_cli("score", few_images, "-m", tmp_path / "model"), 1, str(tmp_path / "model"), "damaged")


def test_debug_shows_where(
    featdiff_cli: Cli, few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATDIFF_DEBUG", "")  # put back afterwards, --debug sets it
    result = featdiff_cli("--debug", "score", few_images, "-m", tmp_path / "gone")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: no featdiff model")


# ---- real processes ----


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=str
)
def test_rows_so_far_are_kept_and_continued(
    featdiff_cli: Cli,
    tiny_model: Path,
    sample_folders: dict[str, Path],
    tmp_path: Path,
    number: signal.Signals,
    expected: int,
) -> None:
    """The file that was there stays, the rows are beside it, and in the end nobody can tell that there was a kill."""
    file = tmp_path / "rows.csv"
    partial = tmp_path / "rows.csv.partial"
    file.write_text("yesterday's rows")
    arguments = ["score", sample_folders["train"], "-m", tiny_model, "-o", file, "--batch-size", 4]
    record = tmp_path / "rows.csv.partial.json"  # a line about the run, and one for each part

    def has_a_part() -> bool:
        return record.exists() and record.read_text().count("\n") >= 2

    code, output, errors = stopped(arguments, has_a_part, number=number)
    assert code == expected, errors
    assert output == ""
    assert file.read_text() == "yesterday's rows"

    text = partial.read_text()
    rows = rows_of(text)
    assert 16 <= len(rows) < 390
    paths = sorted(map(str, sample_folders["train"].iterdir()))
    assert [row["path"] for row in rows] == paths[: len(rows)]
    if number != signal.SIGKILL:  # which may leave half a row
        assert text.endswith("\n")
        assert all(row["status"] == "ok" and row["layer_layer4"] for row in rows)
        assert errors == (
            f"interrupted; {len(rows)} rows are kept in {partial}: the same command with --resume goes on from there\n"
        )

    fails(featdiff_cli(*arguments), 2, f"{partial} holds what an interrupted run has done: resume it")
    done = featdiff_cli(*arguments, "--resume")
    assert done.exit_code == 0, done.stderr
    there = int(done.stderr.split(" rows are there")[0])
    unrecorded = 16 + 1 if number == signal.SIGKILL else 0  # a part, and half a row
    assert len(rows) - unrecorded <= there <= len(rows)
    assert done.stderr.splitlines()[0].endswith(f"{390 - there} are left")
    whole = featdiff_cli("score", sample_folders["train"], "-m", tiny_model, "-q", "--batch-size", 4)
    assert file.read_bytes() == whole.stdout_bytes
    assert "390 images in " in done.stderr and "of these images were in training" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_reader_that_has_seen_enough(tiny_model: Path, sample_folders: dict[str, Path], tmp_path: Path) -> None:
    """``featdiff score ... | head -1``: no traceback, nothing at exit."""
    run = subprocess.run(
        [
            "bash",
            "-c",
            '"$0" score "$1" -m "$2" -q --batch-size 2 | head -1; echo "${PIPESTATUS[0]}"',
            FEATDIFF,
        ]
        + [str(sample_folders["train"]), str(tiny_model)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.stderr == ""
    header, code = run.stdout.splitlines()
    assert header == ",".join(COLUMNS)
    assert code in ("1", "141")  # ended early, as SIGPIPE would
