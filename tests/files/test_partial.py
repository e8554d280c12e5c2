"""A file that grows: whole or absent under its name, and resumed after any end of the process that wrote it."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import heed_ctrl_c

from featdiff.exceptions import FeatdiffError, UsageError
from featdiff.files.partial import PartialFile

MADE_WITH = {"model": "a", "fpr": 0.05}
#: Writes parts of about 1 MB, each of its own byte, until all are written.
WRITER = """
import sys, time
from pathlib import Path
from featdiff.files.partial import PartialFile
print("begins", flush=True)
with PartialFile(Path(sys.argv[1]), {"model": "a", "fpr": 0.05}, resume=True) as parts:
    for i in range(parts.facts.get("parts", 0), 60):
        parts.append(bytes([65 + i]) * (1_000_000 + i), {"parts": i + 1})
        time.sleep(0.005)
    parts.finish()
"""
WHOLE = b"".join(bytes([65 + i]) * (1_000_000 + i) for i in range(60))


def begun(file: Path, *parts: bytes) -> Path:
    """Write parts and end too early; returns the partial file."""
    with PartialFile(file, MADE_WITH) as rows:
        for i, part in enumerate(parts):
            rows.append(part, {"parts": i + 1})
    return rows.partial


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_older_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"yesterday")
    with PartialFile(file, MADE_WITH) as rows:
        rows.append(b"one ", {"parts": 1})
        assert file.read_bytes() == b"yesterday"
        assert rows.partial.read_bytes() == b"one "
        rows.append(b"two", {"parts": 2})
        rows.finish()
    assert file.read_bytes() == b"one two"
    assert names(tmp_path) == ["rows.csv"]


def test_what_was_begun_is_cut_off_and_the_rest_continues(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    partial = begun(file, b"one ", b"two ")
    with partial.open("ab") as stream:
        stream.write(b"thr")  # as a kill leaves it
    with PartialFile(file, MADE_WITH, resume=True) as rows:
        assert rows.facts == {"parts": 2}
        rows.append(b"three", {"parts": 3})
        rows.finish()
    assert file.read_bytes() == b"one two three"


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda data: data[:-1], 1),
        (lambda data: data[:4] + b"TWO ", 1),
        (lambda data: bytes(8), 0),  # as a power cut may leave a file
        (lambda data: b"", 0),
    ],
)
def test_only_what_is_whole_is_continued(tmp_path: Path, damage: Callable[[bytes], bytes], left: int) -> None:
    partial = begun(tmp_path / "rows.csv", b"one ", b"two ")
    partial.write_bytes(damage(partial.read_bytes()))
    with PartialFile(tmp_path / "rows.csv", MADE_WITH, resume=True) as rows:
        assert rows.facts.get("parts", 0) == left
    assert not left or partial.read_bytes() == b"one "


@pytest.mark.parametrize("cut", range(1, 240, 9))
def test_a_record_that_is_cut_anywhere_loses_parts_and_nothing_else(tmp_path: Path, cut: int) -> None:
    partial = begun(tmp_path / "rows.csv", b"one ", b"two ")
    record = partial.with_name(partial.name + ".json")
    text = record.read_bytes()
    first = text.index(b"\n") + 1
    record.write_bytes(text[: max(first, len(text) - cut)])
    lines = record.read_bytes().count(b"\n") - 1
    with PartialFile(tmp_path / "rows.csv", MADE_WITH, resume=True) as rows:
        assert rows.facts.get("parts", 0) == lines
        for i, part in enumerate((b"one ", b"two ")[lines:], lines):
            rows.append(part, {"parts": i + 1})
        rows.finish()
    assert (tmp_path / "rows.csv").read_bytes() == b"one two "


def test_an_edited_record_is_not_believed(tmp_path: Path) -> None:
    partial = begun(tmp_path / "rows.csv", b"one ", b"two ")
    record = partial.with_name(partial.name + ".json")
    record.write_text(record.read_text().replace('{"parts": 2}', '{"parts": 3}'))
    with PartialFile(tmp_path / "rows.csv", MADE_WITH, resume=True) as rows:
        assert rows.facts == {"parts": 1}
    assert partial.read_bytes() == b"one "


def test_an_interrupted_run_is_not_thrown_away_by_chance(tmp_path: Path) -> None:
    partial = begun(tmp_path / "rows.csv", b"one ")
    with pytest.raises(UsageError, match="holds what an interrupted run has done: resume it, or delete"):
        PartialFile(tmp_path / "rows.csv", MADE_WITH)
    assert partial.read_bytes() == b"one "
    assert names(tmp_path) == ["rows.csv.partial", "rows.csv.partial.json"]


@pytest.mark.parametrize(
    ("made_with", "words"),
    [
        ({"model": "b", "fpr": 0.05}, r"another model \(a, now b\)"),
        ({"model": "a", "fpr": 0.01}, r"another fpr \(0.05, now 0.01\)"),
        ({"model": "a", "fpr": 0.05, "columns": ("x", "y")}, r"another columns \(None, now x, y\)"),
    ],
)
def test_parts_of_another_run_are_refused(tmp_path: Path, made_with: dict[str, object], words: str) -> None:
    partial = begun(tmp_path / "rows.csv", b"one ")
    with pytest.raises(UsageError, match=words):
        PartialFile(tmp_path / "rows.csv", made_with, resume=True)
    assert partial.read_bytes() == b"one "


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rows.csv.partial").write_bytes(b"mine")
    for resume in (False, True):
        with pytest.raises(UsageError, match="was not written by featdiff"):
            PartialFile(tmp_path / "rows.csv", MADE_WITH, resume)
    assert names(tmp_path) == ["rows.csv.partial"]
    assert (tmp_path / "rows.csv.partial").read_bytes() == b"mine"


def test_nothing_is_left_of_a_run_without_parts(tmp_path: Path) -> None:
    begun(tmp_path / "rows.csv")
    assert names(tmp_path) == []
    with pytest.raises(FeatdiffError, match=r"gone/rows.csv cannot be written: No such file or directory"):
        PartialFile(tmp_path / "gone" / "rows.csv", MADE_WITH)
    with pytest.raises(FeatdiffError, match="it is a directory"):
        PartialFile(tmp_path, MADE_WITH)


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    with PartialFile(file, MADE_WITH) as first:
        first.append(b"one", {"parts": 1})
        for resume in (False, True):
            with pytest.raises(UsageError, match=f"another process is writing {file}"):
                PartialFile(file, MADE_WITH, resume)
        first.finish()
    with PartialFile(file, MADE_WITH) as second:
        second.append(b"two", {"parts": 1})
        second.finish()
    assert file.read_bytes() == b"two"


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    real = tmp_path / "far" / "rows.csv"
    real.write_bytes(b"old")
    real.chmod(0o600)
    (tmp_path / "link.csv").symlink_to(real)
    with PartialFile(tmp_path / "link.csv", MADE_WITH) as rows:
        rows.append(b"new", {"parts": 1})
        assert rows.partial.stat().st_mode & 0o777 == 0o600
        rows.finish()
    assert (tmp_path / "link.csv").is_symlink()
    assert (real.read_bytes(), real.stat().st_mode & 0o777) == (b"new", 0o600)


@pytest.mark.parametrize("end", ["convert", "append"])
def test_a_full_disk_keeps_the_parts(tmp_path: Path, mounted: Callable[[Path, str], Path], end: str) -> None:
    disk = mounted(tmp_path / "disk", "512k")
    file = disk / "rows.csv"
    file.write_bytes(b"old")
    with PartialFile(file, MADE_WITH) as rows:
        rows.append(bytes(300_000), {"parts": 1})
        with pytest.raises(FeatdiffError, match="rows.csv cannot be written: No space left on device"):
            if end == "append":
                rows.append(bytes(300_000), {"parts": 2})
            else:
                rows.finish(lambda source, target: target.write(2 * source.read()) and None)
    assert file.read_bytes() == b"old"
    assert names(disk) == ["rows.csv", "rows.csv.partial", "rows.csv.partial.json"]
    assert rows.partial.stat().st_size == 300_000
    with PartialFile(file, MADE_WITH, resume=True) as rows:
        assert rows.facts == {"parts": 1}
        rows.finish()
    assert file.read_bytes() == bytes(300_000)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_random_moments(tmp_path: Path, number: signal.Signals) -> None:
    """In the end the file is as if nobody had killed anything; before that, it is the old one."""
    rng = random.Random(number)
    file = tmp_path / "rows.bin"
    file.write_bytes(b"old")
    kills = 0
    for pause in [rng.uniform(0, 0.1) for _ in range(6)] + [60.0]:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=heed_ctrl_c,
        )
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(pause)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            kills += 1
        if process.wait() == 0:
            break
        assert file.read_bytes() == b"old"
    assert kills >= 3
    assert file.read_bytes() == WHOLE
    assert names(tmp_path) == ["rows.bin"]
