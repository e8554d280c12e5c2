"""Files get new names: never over another one, whole or not at all, on one disk and across two."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from featdiff.exceptions import FeatdiffError
from featdiff.files.placing import copy_new, link_new, move_new, numbered, remove_empty, same_for_any_disk, sha256_of

Mount = Callable[[Path, str], Path]
ACTIONS = pytest.mark.parametrize("action", [copy_new, move_new, link_new], ids=["copy", "move", "link"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "a.png"
    file.write_bytes(b"picture")
    os.chmod(file, 0o640)
    os.utime(file, ns=(10**18, 10**18))
    return file


@pytest.fixture(params=["links", "no links"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hard links and without, as on FAT."""
    if request.param == "no links":

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)


def test_a_copy_is_the_same(file: Path, disk: None) -> None:
    target = file.with_name("b.png")
    copy_new(file, target)
    copy_new(b"member", file.with_name("c.png"))
    assert target.read_bytes() == b"picture"
    assert (target.stat().st_mode & 0o777, target.stat().st_mtime_ns) == (0o640, 10**18)
    assert file.with_name("c.png").read_bytes() == b"member"
    assert names(file.parent) == ["a.png", "b.png", "c.png"]


def test_a_moved_file_is_the_same(file: Path, disk: None) -> None:
    target = file.with_name("b.png")
    move_new(file, target)
    assert target.read_bytes() == b"picture"
    assert target.stat().st_mtime_ns == 10**18
    assert names(file.parent) == ["b.png"]


@ACTIONS
@pytest.mark.parametrize("there", ["file", "folder", "broken link"])
def test_a_name_in_use_stays_as_it_is(file: Path, disk: None, action: Callable[[Path, Path], None], there: str) -> None:
    target = file.with_name("b.png")
    if there == "file":
        target.write_bytes(b"other")
    elif there == "folder":
        target.mkdir()
    else:
        target.symlink_to("nowhere")
    before = os.lstat(target)

    with pytest.raises(FileExistsError):
        action(file, target)
    assert os.path.samestat(before, os.lstat(target))
    assert there != "file" or target.read_bytes() == b"other"
    assert file.read_bytes() == b"picture"
    assert names(file.parent) == ["a.png", "b.png"]


@pytest.mark.parametrize("action", [copy_new, move_new], ids=["copy", "move"])
def test_a_name_that_is_taken_in_the_last_moment_stays(
    file: Path, monkeypatch: pytest.MonkeyPatch, disk: None, action: Callable[[Path, Path], None]
) -> None:
    """Somebody is quicker, after it was seen that the name is free."""
    target = file.with_name("b.png")
    lexists = os.path.lexists

    def quicker(path: Path) -> bool:
        free = not lexists(path)
        if free and path == target:
            target.write_bytes(b"other")
        return not free

    monkeypatch.setattr(os.path, "lexists", quicker)
    with pytest.raises(FileExistsError):
        action(file, target)
    assert (file.read_bytes(), target.read_bytes()) == (b"picture", b"other")
    assert names(file.parent) == ["a.png", "b.png"]


def test_a_move_that_was_interrupted_is_finished(file: Path) -> None:
    target = file.with_name("b.png")
    os.link(file, target)
    move_new(file, target)
    assert names(file.parent) == ["b.png"]


def test_only_files_are_moved(file: Path) -> None:
    link = file.with_name("link.png")
    link.symlink_to(file)
    with pytest.raises(FeatdiffError, match="not a regular file"):
        move_new(link, file.with_name("b.png"))
    assert link.is_symlink()


# ---- disks ----


def test_moved_to_another_disk(file: Path, tmp_path: Path, mounted: Mount) -> None:
    other = mounted(tmp_path / "other", "256k")
    move_new(file, other / "a.png")
    assert (other / "a.png").read_bytes() == b"picture"
    assert (other / "a.png").stat().st_mtime_ns == 10**18
    assert not file.exists()


@pytest.mark.parametrize("action", [copy_new, move_new], ids=["copy", "move"])
def test_a_full_disk_holds_nothing_half_written(
    file: Path, tmp_path: Path, mounted: Mount, action: Callable[[Path, Path], None]
) -> None:
    other = mounted(tmp_path / "other", "64k")
    file.write_bytes(bytes(1 << 20))
    with pytest.raises(OSError, match="No space left"):
        action(file, other / "a.png")
    assert names(other) == []
    assert file.stat().st_size == 1 << 20


def test_a_file_of_a_read_only_disk_cannot_leave_it(file: Path, tmp_path: Path, mounted: Mount) -> None:
    """Nor is it copied: then it would be in two places."""
    disk = mounted(tmp_path / "disk", "64k")
    (disk / "b.png").write_bytes(b"picture")
    assert os.system(f"mount -o remount,ro {disk}") == 0
    with pytest.raises(OSError, match="Read-only"):
        move_new(disk / "b.png", tmp_path / "b.png")
    assert names(tmp_path) == ["a.png", "disk"]
    assert names(disk) == ["b.png"]


# ---- names ----


def test_numbers_go_before_the_ending() -> None:
    assert [str(name) for name in islice(numbered(Path("x/a.b.png")), 3)] == [
        "x/a.b.png",
        "x/a.b-2.png",
        "x/a.b-3.png",
    ]


def test_names_that_some_disks_take_for_one() -> None:
    assert same_for_any_disk(Path("A/E\u0301.PNG")) == same_for_any_disk(Path("a/\u00e9.png"))
    assert same_for_any_disk(Path("a")) != same_for_any_disk(Path("b"))


def test_empty_folders_are_removed_up_to_one(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    remove_empty(tmp_path / "a" / "b" / "c" / "was never made", tmp_path / "a")
    assert names(tmp_path / "a") == []
    (tmp_path / "a" / "b").mkdir()
    (tmp_path / "a" / "file").touch()
    remove_empty(tmp_path / "a" / "b", tmp_path)
    assert names(tmp_path / "a") == ["file"]


def test_sha256(file: Path) -> None:
    assert sha256_of(file) == sha256_of(b"picture") != sha256_of(b"other")
