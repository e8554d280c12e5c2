"""Files are written whole or not at all, alone and together."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from featdiff.exceptions import FeatdiffError, UsageError
from featdiff.files.atomic import filling, write_atomically, write_together
from featdiff.files.cache import cache_errors


@pytest.fixture
def small_disk(tmp_path: Path, mounted: Callable[[Path, str], Path]) -> Path:
    """A real file system of 256 KiB."""
    return mounted(tmp_path / "disk", "256k")


def test_write_atomically_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    for content in (b"first", b"second, longer"):
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_failed_write_leaves_the_old_file(small_disk: Path) -> None:
    write_atomically(small_disk / "file", b"old")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(small_disk / "file", bytes(1 << 20))
    assert [(file.name, file.read_bytes()) for file in small_disk.iterdir()] == [("file", b"old")]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers that interrupt")
def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while a large file is written, in a process of its own: pytest's may not survive a signal.

    There a signal ended in a segmentation fault, on a processor with matrix registers (AMX): most likely the stack that
    faulthandler sets up for signals is too small for them.
    """
    code = f"""
import signal
from pathlib import Path
from featdiff.files.atomic import write_atomically
signal.signal(signal.SIGALRM, signal.default_int_handler)
content = bytes(64 << 20)
try:
    signal.setitimer(signal.ITIMER_REAL, 0.003)
    write_atomically(Path({str(tmp_path / "file")!r}), content)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_files_written_together_all_stay_old_if_one_fails(tmp_path: Path) -> None:
    """The second cannot be written, so the first does not take its place either."""
    first, second = tmp_path / "first", tmp_path / "gone" / "second"
    first.write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        write_together({first: b"new", second: b"new"})
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("first", b"old")]

    second.parent.mkdir()
    write_together({first: b"new", second: b"newer"})
    assert (first.read_bytes(), second.read_bytes()) == (b"new", b"newer")


def test_an_error_of_the_cache_says_what_to_do_and_names_its_argument(tmp_path: Path) -> None:
    with pytest.raises(FeatdiffError) as caught, cache_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.argument == "cache"
    assert str(caught.value) == (
        f"the feature cache {tmp_path} cannot be written: No space left on device. Free space or choose another cache; "
        "what was computed so far is kept"
    )


def test_a_new_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "new"
    with filling(folder) as place:
        (place / "a").write_text("first")
        assert not folder.exists()
        (place / "b").write_text("second")
    assert sorted(file.name for file in folder.iterdir()) == ["a", "b"]
    assert [file.name for file in folder.parent.iterdir()] == ["new"]


def test_files_of_a_folder_are_replaced_when_all_are_written(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    for name in ("a", "b", "part/c"):
        (tmp_path / name).write_text("old")
    with filling(tmp_path) as place:
        (place / "a").write_text("new")
        (place / "part").mkdir()
        (place / "part" / "c").write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert [(tmp_path / name).read_text() for name in ("a", "b", "part/c")] == ["new", "old", "new"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "part"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, UsageError])
def test_a_folder_that_is_not_filled_stays_as_it_was(error: type[BaseException], exists: bool, tmp_path: Path) -> None:
    if exists:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "a").write_text("old")
    with pytest.raises(error), filling(tmp_path / "new") as place:
        (place / "a").write_text("first")
        raise error
    left = [(file.name, file.read_text()) for file in tmp_path.rglob("*") if file.is_file()]
    assert left == ([("a", "old")] if exists else [])
    assert len(list(tmp_path.iterdir())) == exists


def test_a_folder_on_a_full_disk(small_disk: Path) -> None:
    (small_disk / "a").write_text("old")
    with pytest.raises(FeatdiffError, match="disk cannot be written: No space left"), filling(small_disk) as place:
        (place / "a").write_text("new")
        (place / "b").write_bytes(bytes(1 << 20))
    assert [(file.name, file.read_text()) for file in small_disk.iterdir()] == [("a", "old")]


def test_errors_name_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    message = f"the model could not be written to {tmp_path / 'new' / 'student'}: full"
    with pytest.raises(FeatdiffError) as caught, filling(tmp_path / "new") as place:
        raise FeatdiffError(f"the model could not be written to {place / 'student'}: full")
    assert str(caught.value) == message
