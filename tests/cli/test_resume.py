"""``featdiff score -o FILE --resume``: what is continued, what is refused, and that the result does not show it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from click.testing import Result
from helpers import fails, model_of_vectors

from featdiff import Detector, FeatureDiffusion, Scores
from featdiff.data.image_refs import FileRef
from featdiff.files.partial import PartialFile

Cli = Callable[..., Result]
KINDS = ("csv", "jsonl", "parquet", "txt")


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """Ctrl-C comes inside the block, when so many parts have been judged."""
    judge = Detector._judge
    judged: list[int] = []

    def stop(self: Detector, *parts: Any) -> Scores:
        if len(judged) == after:
            raise KeyboardInterrupt
        judged.append(1)
        return judge(self, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "_judge", stop)
        yield


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ``train.npy``, and ``new.npy`` of 70 rows, of which 5 are strange and 2 hold NaN."""
    return model_of_vectors(tmp_path_factory.mktemp("vectors"))


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Rows are scored ten at a time: ``parts(error, 3)`` raises an error after three parts; returns what was scored."""
    monkeypatch.setattr("featdiff_cli.vectors._AT_ONCE", 10)
    verdicts = FeatureDiffusion.verdicts

    def end(error: BaseException | None = None, after: int = 0) -> list[int]:
        done: list[int] = []

        def counted(self: FeatureDiffusion, *arguments: Any) -> Scores:
            if error is not None and len(done) == after:
                raise error
            done.append(1)
            return verdicts(self, *arguments)

        monkeypatch.setattr(FeatureDiffusion, "verdicts", counted)
        return done

    end()
    return end


def command(vectors: Path, file: Path, *more: object) -> tuple[object, ...]:
    return ("score", "--features", vectors / "new.npy", "-m", vectors / "model", "-o", file, *more)


def same(file: Path, other: Path) -> bool:
    if file.suffix == ".parquet":
        return bool(pyarrow.parquet.read_table(file).equals(pyarrow.parquet.read_table(other)))
    return file.read_bytes() == other.read_bytes()


# ---- continued ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; 30 rows are kept in "),
        (MemoryError("no room"), 1, "30 rows are kept in "),
    ],
    ids=["ctrl-c", "error"],
)
def test_the_rest_is_scored_and_the_file_is_the_same(
    featdiff_cli: Cli,
    vectors: Path,
    tmp_path: Path,
    parts: Callable[..., list[int]],
    kind: str,
    error: BaseException,
    code: int,
    said: str,
) -> None:
    whole, file = tmp_path / f"whole.{kind}", tmp_path / f"rows.{kind}"
    undisturbed = featdiff_cli(*command(vectors, whole))
    file.write_text("old")

    parts(error, after=3)
    stopped = featdiff_cli(*command(vectors, file))
    assert stopped.exit_code == code
    assert stopped.stderr.startswith(f"{said}{file}.partial: the same command with --resume goes on from there\n")
    assert file.read_text() == "old"
    if kind != "parquet":
        assert whole.read_bytes().startswith(Path(f"{file}.partial").read_bytes())

    scored = parts()
    resumed = featdiff_cli(*command(vectors, file, "--resume"))
    assert len(scored) == 4  # of 7 parts
    assert resumed.exit_code == undisturbed.exit_code == 3
    first, summary, *strangest = resumed.stderr.splitlines()
    assert first == "30 rows are there from an interrupted run, 40 are left"
    assert summary.startswith("70 rows in ")
    whole_summary, *whole_strangest = undisturbed.stderr.splitlines()
    assert summary.rpartition(": ")[2] == whole_summary.rpartition(": ")[2]
    assert len(whole_strangest) == 6
    assert strangest == ([] if kind == "txt" else whole_strangest)  # a table has rounded numbers
    assert ", 2 unreadable" in summary
    assert same(file, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, whole.name]


def test_rows_of_before_count_for_the_exit_code(
    featdiff_cli: Cli, vectors: Path, tmp_path: Path, parts: Callable[..., list[int]]
) -> None:
    """All strange rows are among the first ten."""
    file = tmp_path / "rows.csv"
    parts(KeyboardInterrupt(), after=1)
    strict = ("--fpr", "0.006", "--fail-on-ood")
    assert featdiff_cli(*command(vectors, file, *strict)).exit_code == 130
    parts()
    done = featdiff_cli(*command(vectors, file, *strict, "--resume"))
    assert done.exit_code == 4, done.stderr
    assert ": 5 OOD at fpr 0.006, 2 unreadable" in done.stderr


def test_a_run_that_was_stopped_before_the_last_step(
    featdiff_cli: Cli, vectors: Path, tmp_path: Path, parts: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: PartialFile, *_: object) -> None:
        raise KeyboardInterrupt

    whole, file = tmp_path / "whole.parquet", tmp_path / "rows.parquet"
    featdiff_cli(*command(vectors, whole))
    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "finish", stop)
        assert "70 rows are kept" in featdiff_cli(*command(vectors, file)).stderr
    scored = parts()
    done = featdiff_cli(*command(vectors, file, "--resume"))
    assert (done.exit_code, scored) == (3, [])
    assert same(file, whole)


def test_a_signal_in_the_last_moment(
    featdiff_cli: Cli, vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = PartialFile.finish

    def stop(self: PartialFile, *arguments: Any) -> None:
        finish(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(PartialFile, "finish", stop)
    stopped = featdiff_cli(*command(vectors, tmp_path / "rows.csv"))
    assert (stopped.exit_code, stopped.stderr) == (130, "interrupted; all 70 rows are written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_picture_finds_the_scores_of_before(tmp_path: Path, kind: str) -> None:
    """``--figure`` of the pixel mode draws the least and the most strange of all."""
    from featdiff_cli.choice import Choice
    from featdiff_cli.rows import FileRows

    score = np.array([0.5, np.nan, -2.25])
    bad = np.isnan(score)
    status = ["ok", "unreadable", "ok"]
    part = Scores(["=a", "b\nc", "d"], status, ["", "torn", ""], score, 1 / (2 + np.arange(3)), bad, {})
    for resume in (False, True):
        with FileRows(tmp_path / f"rows.{kind}", kind, False, {}, part.columns, resume, Choice()) as rows:
            before = list(rows.before() or ())
            if resume:
                assert rows.resumed(9, lambda count: part.path[:count]) == {"rows": 3}
                assert [row["path"] for row in before] == part.path
                assert [row["ood_score"] for row in before] == [0.5, None, -2.25]
            else:
                assert rows.resumed(9, lambda count: part.path[:count]) == {}
                assert before == []
                rows.write(part, {"rows": 3})


def test_resume_without_an_interrupted_run_begins_at_the_beginning(
    featdiff_cli: Cli, vectors: Path, tmp_path: Path, parts: Callable[..., list[int]]
) -> None:
    """So that a scheduler can give the same command each time."""
    featdiff_cli(*command(vectors, tmp_path / "whole.csv"))
    for _ in range(2):
        done = featdiff_cli(*command(vectors, tmp_path / "rows.csv", "--resume"))
        assert done.stderr.splitlines()[0] == "0 rows are there from an interrupted run, 70 are left"
        assert same(tmp_path / "rows.csv", tmp_path / "whole.csv")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_full_disk(
    featdiff_cli: Cli,
    vectors: Path,
    tmp_path: Path,
    parts: Callable[..., list[int]],
    mounted: Callable[[Path, str], Path],
    kind: str,
) -> None:
    featdiff_cli(*command(vectors, tmp_path / f"whole.{kind}"))
    disk = mounted(tmp_path / "disk", "40k")
    file = disk / f"rows.{kind}"
    file.write_text("old")
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(7 * 4096))
    stopped = featdiff_cli(*command(vectors, file))
    assert stopped.exit_code == 1
    kept, error = stopped.stderr.splitlines()
    assert error == f"Error: {file} cannot be written: No space left on device"
    count = int(kept.split()[0])
    assert 10 <= count < 70
    assert kept == f"{count} rows are kept in {file}.partial: the same command with --resume goes on from there"
    assert file.read_text() == "old"

    ballast.unlink()
    done = featdiff_cli(*command(vectors, file, "--resume"))
    assert done.stderr.startswith(f"{count} rows are there")
    assert same(file, tmp_path / f"whole.{kind}")
    assert [path.name for path in disk.iterdir()] == [file.name]


def test_images_are_not_decoded_again(
    featdiff_cli: Cli,
    tiny_model: Path,
    sample_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training images among them are counted, and missing files at the end are rows, as in one run."""
    files = sorted(sample_folders["train"].iterdir())[:40]
    arguments = ("score", *files, tmp_path / "gone.png", "-m", tiny_model, "--batch-size", 4, "--exclude-known", "-o")
    whole, file = tmp_path / "whole.csv", tmp_path / "rows.csv"
    undisturbed = featdiff_cli(*arguments, whole)

    with interrupted(monkeypatch, after=2):
        assert featdiff_cli(*arguments, file).stderr.startswith("interrupted; 32 rows are kept")

    read = FileRef.read
    seen: list[str] = []

    def reading(self: FileRef) -> bytes:
        seen.append(self.path)
        return read(self)

    monkeypatch.setattr(FileRef, "read", reading)
    done = featdiff_cli(*arguments, file, "--resume")
    assert sorted(seen) == [str(path) for path in files[32:]]
    assert same(file, whole)
    assert done.exit_code == undisturbed.exit_code == 3
    assert done.stderr.splitlines()[1].startswith("41 images in ")


def test_nothing_is_left_of_a_run_without_rows(
    featdiff_cli: Cli, vectors: Path, tmp_path: Path, parts: Callable[..., list[int]]
) -> None:
    parts(KeyboardInterrupt(), after=0)
    stopped = featdiff_cli(*command(vectors, tmp_path / "rows.csv"))
    assert (stopped.exit_code, stopped.stderr) == (130, "interrupted; no rows were written yet\n")
    assert list(tmp_path.iterdir()) == []


def test_only_missing_files_are_left(
    featdiff_cli: Cli,
    tiny_model: Path,
    few_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are rows, as they are beside others; alone they would be refused."""
    files = sorted(few_images.iterdir())[:4]
    options = (tmp_path / "gone.png", "-m", tiny_model, "--batch-size", 1, "-o", tmp_path / "rows.csv")
    with interrupted(monkeypatch, after=1):
        assert "; 4 rows are kept in " in featdiff_cli("score", *files, *options).stderr
    done = featdiff_cli("score", *files, *options, "--resume")
    assert done.exit_code == 3, done.stderr
    assert (
        (tmp_path / "rows.csv").read_text().splitlines()[-1].startswith(f"{tmp_path / 'gone.png'},unreadable,no such")
    )


# ---- refused ----


def refused(result: Result, *words: str) -> None:
    fails(result, 2, *words)


def test_other_rows_are_not_mixed(
    featdiff_cli: Cli, vectors: Path, tmp_path: Path, parts: Callable[..., list[int]]
) -> None:
    file = tmp_path / "rows.csv"
    parts(KeyboardInterrupt(), after=2)
    featdiff_cli(*command(vectors, file))
    before = Path(f"{file}.partial").read_bytes()
    parts()

    refused(featdiff_cli(*command(vectors, file)), f"{file}.partial holds what an interrupted run has done")
    refused(featdiff_cli(*command(vectors, file, "--resume", "--fpr", "0.2")), "another fpr (0.05, now 0.2)")
    refused(featdiff_cli(*command(vectors, file, "--resume", "--raw-csv")), "another raw CSV (False, now True)")
    refused(featdiff_cli(*command(vectors, file, "--resume", "--format", "jsonl")), "another format (csv, now jsonl)")

    other = tmp_path / "model"
    recipe = {"epochs": 2, "min_steps": 100, "batch_size": 64}
    FeatureDiffusion(recipe=recipe, random_state=1).fit(np.load(vectors / "train.npy")).save_pretrained(other)
    new = ("score", "--features", vectors / "new.npy", "-m", other, "-o", file, "--resume")
    refused(featdiff_cli(*new), "another model (")

    shutil.copy(vectors / "new.npy", tmp_path / "new.npy")
    renamed = ("score", "--features", tmp_path / "new.npy", "-m", vectors / "model", "-o", file, "--resume")
    refused(featdiff_cli(*renamed), "another content of ")
    assert Path(f"{file}.partial").read_bytes() == before
    assert featdiff_cli(*command(vectors, file, "--resume")).exit_code == 3


def test_other_images_are_not_mixed(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(few_images.iterdir())
    file = tmp_path / "rows.csv"
    options = ("-m", tiny_model, "--batch-size", 1, "-o", file)
    with interrupted(monkeypatch, after=1):
        assert "; 4 rows are kept in " in featdiff_cli("score", *files, *options).stderr

    words = ("holds 4 rows, and they are not the first of what is to be scored now", "same files in the same order")
    refused(featdiff_cli("score", *files[::-1], *options, "--resume"), *words)
    refused(featdiff_cli("score", *files[:3], *options, "--resume"), *words)
    refused(featdiff_cli("score", *files, *options, "--resume", "--exclude-known"), "another exclude-known")
    refused(featdiff_cli("score", *files, *options, "--resume", "--max-pixels", 99), "another max-pixels")
    done = featdiff_cli("score", *files, *options, "--resume")
    assert done.exit_code == 0, done.stderr
    assert "4 rows are there from an interrupted run, 2 are left" in done.stderr


def test_only_a_file_can_be_continued(featdiff_cli: Cli, vectors: Path) -> None:
    source = ("score", "--features", vectors / "new.npy", "-m", vectors / "model", "--resume")
    refused(featdiff_cli(*source), "--resume needs -o FILE")
    refused(featdiff_cli(*source, "-o", "-"), "--resume needs -o FILE")


def test_two_processes_do_not_write_one_file(featdiff_cli: Cli, vectors: Path, tmp_path: Path) -> None:
    with PartialFile(tmp_path / "rows.csv", {}):
        refused(featdiff_cli(*command(vectors, tmp_path / "rows.csv")), "another process is writing")
        refused(featdiff_cli(*command(vectors, tmp_path / "rows.csv", "--resume")), "another process is writing")
    assert featdiff_cli(*command(vectors, tmp_path / "rows.csv")).exit_code == 3
