"""``featdiff score --sort``, ``--top`` and ``--only-ood`` in every format, and what it says at the end."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet
import pytest
from click.testing import Result
from helpers import fails, model_of_vectors
from rich.cells import cell_len

from featdiff import FeatureDiffusion, Scores
from featdiff.report.writers import open_writer
from featdiff_cli.choice import Choice
from featdiff_cli.summary import Strangest, shortened

Cli = Callable[..., Result]
CHOICES = [("--sort",), ("--top", "3"), ("--only-ood",), ("--sort", "--only-ood"), ("--top", "2", "--only-ood")]
EACH = pytest.mark.parametrize("options", CHOICES, ids=" ".join)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of_vectors(tmp_path_factory.mktemp("vectors"))


@pytest.fixture
def score(featdiff_cli: Cli, vectors: Path) -> Cli:
    return lambda *more: featdiff_cli("score", "--features", vectors / "new.npy", "-m", vectors / "model", *more)


@pytest.fixture
def rows(score: Cli) -> list[dict[str, Any]]:
    """All of them, in their order."""
    return [json.loads(line) for line in score("--format", "jsonl").stdout.splitlines()]


def chosen(rows: list[dict[str, Any]], options: tuple[str, ...]) -> list[dict[str, Any]]:
    """What the options ask for, by another way."""
    if "--only-ood" in options:
        rows = [row for row in rows if row["is_ood"]]
    if "--sort" in options or "--top" in options:
        bad = [row for row in rows if row["p_value"] is None]
        good = [row for row in rows if row["p_value"] is not None]
        rows = sorted(good, key=lambda row: (row["p_value"], -row["ood_score"])) + bad
    return rows[: int(options[1])] if "--top" in options else rows


# ---- which rows ----


@EACH
def test_rows_that_were_asked_for(score: Cli, rows: list[dict[str, Any]], options: tuple[str, ...]) -> None:
    expected = chosen(rows, options)
    assert 2 <= len(expected) < 70 or options == ("--sort",)
    done = score("--format", "jsonl", *options)
    assert done.exit_code == 3, done.output
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected
    assert done.stderr.startswith("70 rows in ")  # all are counted
    assert ", 2 unreadable\n" in done.stderr


@EACH
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "txt"])
def test_files_hold_the_same(
    score: Cli, rows: list[dict[str, Any]], tmp_path: Path, options: tuple[str, ...], kind: str
) -> None:
    file = tmp_path / f"rows.{kind}"
    assert score("-o", file, *options).exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    if kind == "parquet":
        assert pyarrow.parquet.read_table(file).to_pylist() == chosen(rows, options)
    else:
        plain = {"txt": "table"}.get(kind, kind)
        assert file.read_bytes() == score("--format", plain, *options).stdout_bytes
        stream = io.BytesIO()
        open_writer(plain, stream).write_rows(chosen(rows, options), list(rows[0]))
        assert file.read_bytes() == stream.getvalue()


@EACH
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "txt"])
def test_resumed(
    score: Cli,
    featdiff_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    kind: str,
) -> None:
    """Rows of before are sorted among the others, and the strangest may be among them."""
    file, whole = tmp_path / f"rows.{kind}", tmp_path / f"whole.{kind}"
    undisturbed = score("-o", whole, *options)
    monkeypatch.setattr("featdiff_cli.vectors._AT_ONCE", 10)
    verdicts = FeatureDiffusion.verdicts
    done: list[int] = []

    def stop(self: FeatureDiffusion, *arguments: Any) -> Scores:
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return verdicts(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureDiffusion, "verdicts", stop)
        assert score("-o", file, *options).exit_code == 130
    other = ("--top", "9") if "--sort" in options else ("--sort",)
    fails(score("-o", file, "--resume", *other), 2, "was made with another choice of rows")

    resumed = score("-o", file, "--resume", *options)
    assert resumed.stderr.startswith("20 rows are there from an interrupted run, 50 are left\n")
    assert resumed.stderr.splitlines()[2:] == undisturbed.stderr.splitlines()[1:]
    if kind == "parquet":
        assert pyarrow.parquet.read_table(file).equals(pyarrow.parquet.read_table(whole))
    else:
        assert file.read_bytes() == whole.read_bytes()


def test_no_flagged_rows(score: Cli, tmp_path: Path) -> None:
    """A file that can be read all the same."""
    quiet = ("--only-ood", "--fpr", "0.001")
    refused = score(*quiet)
    assert refused.exit_code == 2  # too few held-out rows for such a rate
    none = tmp_path / "train.npy"
    np.save(none, np.zeros((3, 6), np.float32))
    for kind, expected in (("csv", 1), ("jsonl", 0), ("table", 1)):
        done = score("--only-ood", "--features", none, "--format", kind)
        assert done.exit_code == 0, done.output
        assert len(done.stdout.splitlines()) == expected
    assert score("--only-ood", "--features", none, "-o", tmp_path / "rows.parquet").exit_code == 0
    assert pyarrow.parquet.read_table(tmp_path / "rows.parquet").num_rows == 0


def test_what_is_not_written_counts_for_the_exit_code(score: Cli) -> None:
    assert score("--top", "1", "--fail-on-ood").exit_code == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sort",), "interrupted; no rows are written: --sort needs all of them first\n"),
        (("--only-ood",), "interrupted; the flagged ones of 0 rows are written\n"),
    ],
)
def test_ctrl_c_without_a_file(
    score: Cli, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], words: str
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureDiffusion, "verdicts", stop)
    done = score(*options)
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", words)


def test_a_full_disk_of_temporary_files(
    score: Cli, tmp_path: Path, mounted: Callable[[Path, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mounted(tmp_path / "disk", "4k")
    monkeypatch.setattr("featdiff_cli.rows._IN_MEMORY", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    fails(score("--sort"), 1, f"{disk}: No space left on device")


@pytest.mark.parametrize("top", ["0", "-1", "some"])
def test_a_number_that_makes_no_sense(score: Cli, top: str) -> None:
    fails(score("--top", top), 2, "--top")


def test_columns_that_are_not_known_yet_come_along() -> None:
    """Such as further p-values."""
    source = io.BytesIO()
    for name, score in (("a", 1.0), ("b", 2.0)):
        row = {"path": name, "status": "ok", "ood_score": score, "p_value": 0.5, "is_ood": True, "p_value_local": 0.25}
        source.write(json.dumps(row).encode() + b"\n")
    source.seek(0)
    first, second = Choice(sort=True).of_lines(source)
    assert (first["path"], second["path"]) == ("b", "a")
    assert first["p_value_local"] == 0.25


# ---- what it says at the end ----


def test_the_strangest_are_named(score: Cli, rows: list[dict[str, Any]]) -> None:
    lines = score().stderr.splitlines()
    assert lines[1] == "The strangest:"
    numbers = "  p {p_value:.4f}  score {ood_score:6.2f}  "
    assert lines[2:] == [
        (start := numbers.format(**row)) + shortened(row["path"], 80 - len(start))
        for row in chosen(rows, ("--sort",))[:5]
    ]
    assert all(len(line) <= 80 for line in lines[1:])
    assert score("-q").stderr == ""


def test_they_are_not_named_twice(score: Cli, vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the table has them on top, or has no others."""
    monkeypatch.setattr("featdiff_cli.score.is_seen_as_table", lambda *_: True)
    assert "The strangest:" in score().stderr
    assert "The strangest:" not in score("--top", "7").stderr
    np.save(tmp_path / "few.npy", np.load(vectors / "new.npy")[:5])
    assert "The strangest:" not in score("--features", tmp_path / "few.npy").stderr


def test_what_to_type_next(featdiff_cli: Cli, tiny_model: Path, few_images: Path) -> None:
    (few_images / "b.png").rename(few_images / "b b.png")
    done = featdiff_cli("score", few_images, "-m", tiny_model, "--format", "jsonl")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    path = chosen(rows, ("--sort",))[0]["path"]
    quoted = f"'{path}'" if " " in path else path
    assert done.stderr.splitlines()[-2:] == [
        f"Next: featdiff explain {quoted} -m {tiny_model} -o explained",
        "      or the same featdiff score with --report report.html",
    ]


@pytest.mark.parametrize("path", ["-rf.png", "a\x1b[31m.png"])
def test_a_path_that_cannot_be_typed_as_it_is_printed(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    strangest = Strangest([{"path": path, "ood_score": 9.0, "p_value": 0.01}, {"path": "b.png"}])
    with click.Context(click.Command("score")):
        strangest.say_next("featdiff-model", quiet=False)
    assert capsys.readouterr().err.startswith("Next: featdiff explain b.png -o explained\n")


def test_unreadable_images_are_not_strange(featdiff_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    lines = featdiff_cli("score", tmp_path, "-m", tiny_model).stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("0 OOD at fpr 0.05, 1 unreadable")


def test_errors_have_no_score_and_are_not_named() -> None:
    strangest = Strangest()
    strangest.add_rows(
        [
            {"path": "error", "ood_score": None, "p_value": 0.01},
            *({"path": str(i), "ood_score": float(i), "p_value": 0.5} for i in range(9)),
        ]
    )
    assert [row["path"] for row in strangest.rows] == ["8", "7", "6", "5", "4"]


@pytest.mark.parametrize(
    "path", ["a" * 300 + "end.png", "日本" * 100 + "end.png", "/x" * 2000 + "/end.png", "\x1b" * 70 + "end.png"]
)
def test_long_paths_end_as_they_do(path: str) -> None:
    text = shortened(path, 50)
    assert 45 <= cell_len(text) <= 50
    assert text.startswith("...") and text.endswith("end.png")
    assert "\x1b" not in text
    assert shortened("short.png", 50) == "short.png"
