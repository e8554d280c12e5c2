"""The manifest of flagged images: it holds any name, is never overwritten, and can be undone in any state."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from featdiff.exceptions import FeatdiffError, UsageError
from featdiff.files.placing import copy_new, link_new, move_new, sha256_of
from featdiff.report.manifest import (
    ALREADY,
    COLUMNS,
    DONE,
    LEFT,
    PLANNED,
    TAKEN_BACK,
    Entry,
    read_manifest,
    undo,
    write_new_manifest,
)

ROW = {"path": "a.png", "status": "ok", "ood_score": -0.5, "p_value": 0.01, "is_ood": True, "p_value_local": None}
ACTIONS = {"copy": copy_new, "link": link_new, "move": move_new}
EACH = pytest.mark.parametrize("action", ACTIONS)


class Place:
    """A folder ``photos`` with ``sub/a.png``, and a folder ``flagged`` where it goes."""

    def __init__(self, folder: Path) -> None:
        self.photos = folder / "photos"
        self.flagged = folder / "flagged"
        self.source = self.photos / "sub" / "a.png"
        self.target = self.flagged / "sub" / "a.png"
        self.source.parent.mkdir(parents=True)
        self.flagged.mkdir()
        self.source.write_bytes(b"picture")

    def entry(self, action: str, result: str = DONE, **changes: str) -> Entry:
        sha256 = sha256_of(b"picture") if action == "copy" else ""
        fields = {"source": str(self.source), "target": "sub/a.png", "sha256": sha256, **changes}
        return Entry(action=action, result=result, row=ROW, **fields)

    def place(self, action: str, result: str = DONE) -> Path:
        """Do it; returns the manifest."""
        manifest = write_new_manifest(self.flagged, [self.entry(action, result)])
        self.target.parent.mkdir()
        ACTIONS[action](self.source, self.target)
        return manifest


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def files_below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


# ---- the file ----


def test_a_manifest_is_a_table_with_all_columns_of_the_rows(place: Place) -> None:
    manifest = write_new_manifest(place.flagged, [place.entry("copy")])
    assert manifest == place.flagged / "manifest.csv"
    with manifest.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert list(row) == [*COLUMNS, *ROW]
    assert (row["from"], row["to"], row["action"]) == (str(place.source), "sub/a.png", "copy")
    assert (row["ood_score"], row["p_value"], row["is_ood"], row["p_value_local"]) == ("-0.5", "0.01", "true", "")


def test_no_manifest_is_overwritten(place: Place) -> None:
    files = [write_new_manifest(place.flagged, [place.entry("copy")]) for _ in range(3)]
    assert [file.name for file in files] == ["manifest.csv", "manifest-2.csv", "manifest-3.csv"]


@pytest.mark.parametrize(
    "name", ["=1+1.png", "-5", "'a.png", "two\nlines\r.png", "\x1b[31m.png", "\udcff.png", 'a,"b.png']
)
def test_any_name_can_be_read_again(place: Place, name: str) -> None:
    entry = place.entry("move", source=f"/x/{name}", target=name, note=name)
    entry.row = {"path": name, "layer_a": -1.5, "group": ""}
    (read,) = read_manifest(write_new_manifest(place.flagged, [entry]))
    assert (read.source, read.target, read.note) == (entry.source, name, name)
    assert read.row == entry.row


def test_writing_again_changes_only_the_result(place: Place) -> None:
    """Negative numbers are not taken for text that a spreadsheet would calculate."""
    manifest = place.place("copy")
    before = manifest.read_text()
    undo(manifest)
    assert manifest.read_text() == before.replace(",done,", f",{TAKEN_BACK},")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"path,group\na,b\n",
        b"\xff\xfe",
        b"from,to\n1,2,3\n",
        b'"',
        b"from,to,action,result,note,sha256\na,b,eat,done,,\n",
    ],
    ids=["empty", "another table", "no text", "a long row", "a quote", "an unknown action"],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "manifest.csv"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="is not a manifest"):
        undo(file)
    assert file.read_bytes() == content


def test_a_folder_in_place_of_a_manifest(place: Place, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it holds no manifest"):
        undo(place.flagged)
    place.place("copy")
    with pytest.raises(UsageError, match=r"name one of its files \(manifest.csv\)"):
        undo(place.flagged)
    with pytest.raises(UsageError, match="No such file"):
        undo(tmp_path / "gone.csv")


# ---- undone ----


@EACH
@pytest.mark.parametrize("result", [DONE, PLANNED])
def test_undone_and_undone_again(place: Place, action: str, result: str) -> None:
    manifest = place.place(action, result)
    for _ in range(2):
        assert [entry.result for entry in undo(manifest)] == [TAKEN_BACK]
        assert place.source.read_bytes() == b"picture"
        assert files_below(place.flagged) == ["manifest.csv"]


@EACH
def test_what_was_planned_and_not_done(place: Place, action: str) -> None:
    manifest = write_new_manifest(place.flagged, [place.entry(action, PLANNED)])
    assert [entry.result for entry in undo(manifest)] == [TAKEN_BACK]
    assert place.source.read_bytes() == b"picture"


@pytest.mark.parametrize("other", ["the same file", "a copy"])
def test_a_move_that_was_interrupted(place: Place, other: str) -> None:
    """Both names are there; on two disks these are two files."""
    manifest = write_new_manifest(place.flagged, [place.entry("move", PLANNED)])
    place.target.parent.mkdir()
    if other == "a copy":
        place.target.write_bytes(b"picture")
    else:
        os.link(place.source, place.target)
    assert [entry.result for entry in undo(manifest)] == [TAKEN_BACK]
    assert place.source.read_bytes() == b"picture"
    assert files_below(place.flagged) == ["manifest.csv"]


def test_what_a_killed_copy_has_left_goes_too(place: Place) -> None:
    manifest = write_new_manifest(place.flagged, [place.entry("copy", PLANNED)])
    place.target.parent.mkdir()
    (place.target.parent / ".a.png.0123abcd.tmp").write_bytes(b"pic")
    undo(manifest)
    assert files_below(place.flagged) == ["manifest.csv"]


def test_folders_that_were_removed_come_back(place: Place) -> None:
    manifest = place.place("move")
    place.source.parent.rmdir()
    place.photos.rmdir()
    undo(manifest)
    assert place.source.read_bytes() == b"picture"


def test_the_folder_may_have_moved(place: Place, tmp_path: Path) -> None:
    place.place("move")
    place.flagged.rename(tmp_path / "elsewhere")
    undo(tmp_path / "elsewhere" / "manifest.csv")
    assert place.source.read_bytes() == b"picture"


# ---- left ----


def change_copy(place: Place) -> None:
    place.target.write_bytes(b"retouched")


def remove_original(place: Place) -> None:
    place.source.unlink()


def take_old_name(place: Place) -> None:
    place.source.write_bytes(b"another")


def take_old_name_by_link(place: Place) -> None:
    place.source.symlink_to(place.target)


def replace_link(place: Place) -> None:
    place.target.unlink()
    place.target.write_bytes(b"mine")


def lose(place: Place) -> None:
    place.target.unlink()


@pytest.mark.parametrize(
    ("action", "change", "note"),
    [
        ("copy", change_copy, "the copy was changed, so it is kept"),
        ("copy", remove_original, "the original is gone, so the copy is kept"),
        ("link", replace_link, "it is no longer that link, so it is kept"),
        ("move", take_old_name, "its old name is in use"),
        ("move", take_old_name_by_link, "its old name is in use"),
        ("move", lose, "it is at neither place"),
    ],
)
def test_nothing_is_lost_or_overwritten(place: Place, action: str, change: Callable[[Place], None], note: str) -> None:
    manifest = place.place(action)
    change(place)
    before = {
        file: (os.lstat(file).st_ino, file.read_bytes()) for file in (place.source, place.target) if file.exists()
    }
    for _ in range(2):
        (entry,) = undo(manifest)
        assert (entry.result, entry.note) == (LEFT, note)
        assert before == {file: (os.lstat(file).st_ino, file.read_bytes()) for file in before}


def test_when_the_old_name_is_free_again_a_second_call_goes_on(place: Place) -> None:
    manifest = place.place("move")
    take_old_name(place)
    assert undo(manifest)[0].result == LEFT
    place.source.unlink()
    assert undo(manifest)[0].result == TAKEN_BACK
    assert place.source.read_bytes() == b"picture"


def test_what_another_run_has_put_there_is_not_touched(place: Place) -> None:
    manifest = write_new_manifest(place.flagged, [place.entry("copy", ALREADY), place.entry("copy", LEFT, target="")])
    place.target.parent.mkdir()
    place.target.write_bytes(b"picture")
    assert [entry.result for entry in undo(manifest)] == [ALREADY, LEFT]
    assert place.target.read_bytes() == b"picture"


@EACH
@pytest.mark.parametrize("target", ["../mine/a.png", "/mine/a.png", "link/a.png"])
def test_a_manifest_from_somebody_else_cannot_reach_out_of_its_folder(
    place: Place, tmp_path: Path, action: str, target: str
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.png").write_bytes(b"picture")
    (place.flagged / "link").symlink_to(mine)
    wanted = str(mine / "a.png") if target.startswith("/") else target
    source = str(tmp_path / "new.png") if action == "move" else str(place.source)
    manifest = write_new_manifest(place.flagged, [place.entry(action, target=wanted, source=source)])
    (entry,) = undo(manifest)
    assert (entry.result, entry.note) == (LEFT, "it does not lie in the folder of the manifest")
    assert (mine / "a.png").read_bytes() == b"picture"
    assert not (tmp_path / "new.png").exists()


@EACH
@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png"])
def test_names_that_no_file_can_have(place: Place, tmp_path: Path, action: str, name: str) -> None:
    place.target.parent.mkdir()
    place.target.write_bytes(b"picture")
    old, new = place.entry(action, source=str(tmp_path / name)), place.entry(action, target=name)
    first, second = undo(write_new_manifest(place.flagged, [old, new]))
    assert (first.result, second.result) == (LEFT, TAKEN_BACK)  # nothing has the new name
    assert first.note
    assert place.source.read_bytes() == place.target.read_bytes() == b"picture"


def test_ctrl_c_while_it_is_undone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest says how far it came."""
    other = place.source.with_name("b.png")
    other.write_bytes(b"other")
    entries = [place.entry("move"), place.entry("move", source=str(other), target="b.png")]
    manifest = write_new_manifest(place.flagged, entries)
    place.target.parent.mkdir()
    move_new(place.source, place.target)
    move_new(other, place.flagged / "b.png")

    def stopped(source: Path, target: Path) -> None:
        if target == other:
            raise KeyboardInterrupt
        move_new(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("featdiff.report.manifest.move_new", stopped)
        with pytest.raises(KeyboardInterrupt):
            undo(manifest)
    assert [entry.result for entry in read_manifest(manifest)] == [TAKEN_BACK, DONE]
    assert [entry.result for entry in undo(manifest)] == [TAKEN_BACK, TAKEN_BACK]
    assert (place.source.read_bytes(), other.read_bytes()) == (b"picture", b"other")


def test_a_manifest_that_cannot_be_written_anew(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done is done; to type it again is safe."""
    manifest = place.place("copy")
    with monkeypatch.context() as patch:
        patch.setattr("featdiff.report.manifest.write_output", _refuse)
        with pytest.raises(FeatdiffError, match="cannot be written"):
            undo(manifest)
    assert not place.target.exists()
    assert undo(manifest)[0].result == TAKEN_BACK


def _refuse(file: Path, data: bytes) -> None:
    raise FeatdiffError(f"{file} cannot be written: No space left on device")
