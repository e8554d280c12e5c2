"""``featdiff score --copy-to``, ``--link-to``, ``--move-to``, ``--undo``: which names, what is refused, and kills."""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flag_images
import pytest
from click.testing import Result
from flag_images import place
from helpers import fails

from featdiff.data.references import list_images
from featdiff.exceptions import FeatdiffError, UsageError
from featdiff.files import placing
from featdiff.report.manifest import read_manifest, undo
from featdiff_cli.flagged import Flagged, open_flagged
from featdiff_cli.main import Stopped

Cli = Callable[..., Result]
EACH = pytest.mark.parametrize("action", ["copy", "link", "move"])


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder but manifests, links as what they lead to."""
    files = sorted(file for file in folder.rglob("*") if not file.is_dir())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if "manifest" not in file.name}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """a.png, b/a.png, b/c.png: each holds its own name."""
    for name in ("a.png", "b/a.png", "b/c.png"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path / "photos"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "flagged"


Told = Callable[[], list[str]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Lines on standard error since it was called last."""
    return lambda: capsys.readouterr().err.splitlines()


# ---- the whole command ----


@EACH
def test_flagged_files_and_the_way_back(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, folder: Path, action: str
) -> None:
    before = content(few_images)
    arguments = ("score", few_images, "-m", tiny_model, "--fpr", "0.99", f"--{action}-to", folder)
    done = featdiff_cli(*arguments)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    flagged = [row for row in rows if row["is_ood"] == "true"]
    assert flagged
    assert content(folder) == {Path(row["path"]).name: before[Path(row["path"]).name] for row in flagged}
    assert (content(few_images) == before) == (action != "move")

    with (folder / "manifest.csv").open(newline="") as stream:
        listed = list(csv.DictReader(stream))
    assert [{name: row[name] for name in rows[0]} for row in listed] == flagged
    word = {"copy": "copied", "link": "linked", "move": "moved"}[action]
    assert f"{len(flagged)} of {len(flagged)} flagged images {word} to {folder}" in done.stderr
    assert f"Take it back: featdiff score --undo {folder}/manifest.csv" in done.stderr
    assert ("Next: featdiff explain " in done.stderr) == (action != "move")  # else there is no such file any more

    for _ in range(2):
        undone = featdiff_cli("score", "--undo", folder / "manifest.csv")
        assert (undone.exit_code, undone.stdout) == (0, "")
        assert undone.stderr == f"{len(flagged)} of {len(flagged)} images in {folder}/manifest.csv are taken back\n"
        assert content(folder) == {}
        assert content(few_images) == before


def test_rows_of_an_interrupted_run_count(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For CSV and JSON lines; numbers of the manifest are those of the rows."""
    from featdiff_cli.rows import FileRows

    for kind, options in (("csv", ()), ("jsonl", ()), ("csv", ("--raw-csv",)), ("txt", ("--sort",))):
        file = tmp_path / f"rows.{kind}"
        arguments = ("score", few_images, "-m", tiny_model, "--fpr", "0.99", "-q", "-o", file, *options)
        with monkeypatch.context() as patch:
            patch.setattr(FileRows, "finish", _interrupt)
            assert featdiff_cli(*arguments, "--copy-to", folder).exit_code == 130
        assert not folder.exists()

        done = featdiff_cli(*arguments, "--copy-to", folder, "--resume")
        assert done.exit_code == 0, done.output
        plain = featdiff_cli(*arguments[:6], "-q", "--only-ood").stdout
        with (folder / "manifest.csv").open(newline="") as stream:
            rows = [dict(list(row.items())[6:]) for row in csv.DictReader(stream)]
        assert rows == list(csv.DictReader(io.StringIO(plain)))
        assert len(content(folder)) == len(rows) > 0
        shutil.rmtree(folder)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_nothing_is_flagged(featdiff_cli: Cli, tiny_model: Path, sample_folders: dict[str, Path], folder: Path) -> None:
    image = sorted(sample_folders["train"].iterdir())[0]
    done = featdiff_cli("score", image, "-m", tiny_model, "--fpr", "0.013", "--copy-to", folder)
    assert done.exit_code == 0, done.output
    assert done.stderr.endswith("No image is flagged, so nothing is copied.\n")
    assert not folder.exists()


def test_bad_requests(featdiff_cli: Cli, tiny_model: Path, few_images: Path, folder: Path, tmp_path: Path) -> None:
    command = ("score", few_images, "-m", tiny_model)
    file = few_images / "a.png"
    fails(
        featdiff_cli(*command, "--copy-to", folder, "--move-to", folder), 2, "--copy-to and --move-to: give one of them"
    )
    fails(featdiff_cli(*command, "--copy-to", file), 2, "--copy-to", "is a file")
    fails(
        featdiff_cli(*command, "--copy-to", few_images / "x"),
        2,
        f"--copy-to {few_images}/x lies in {few_images}, which",
    )
    fails(featdiff_cli(*command, "--copy-to", file / "x"), 2, f"--copy-to {file}/x: {file} is not a folder")
    fails(featdiff_cli(*command, "--undo", folder), 2, "--undo takes back what was done, and scores nothing")
    fails(featdiff_cli("score", "--undo", folder), 2, "No such file")
    fails(featdiff_cli("score", "--undo", file), 2, f"{file} is not a manifest")
    fails(
        featdiff_cli("score", "--features", "x.npy", "--link-to", folder), 2, "--link-to", "cannot go with --features"
    )
    table = ("-o", tmp_path / "rows.txt", "--resume")
    fails(featdiff_cli(*command, "--copy-to", folder, *table), 2, "--copy-to needs all scores, and a table has rounded")


def test_a_link_does_not_hide_that_the_folder_is_scored(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(photos / "b")
    options = {"copy_to": tmp_path / "link" / "x", "move_to": None, "link_to": None}
    with pytest.raises(UsageError, match="which is scored"):
        open_flagged(options, [str(photos)], None)


def test_a_read_only_disk_is_noticed_before_the_work(tmp_path: Path, mounted: Callable[[Path, str], Path]) -> None:
    disk = mounted(tmp_path / "disk", "64k")
    assert os.system(f"mount -o remount,ro {disk}") == 0
    options = {"copy_to": disk / "x" / "y", "move_to": None, "link_to": None}
    with pytest.raises(UsageError, match=f"--copy-to {disk}/x/y: {disk} is read-only"):
        open_flagged(options, [], None)


# ---- names ----


@EACH
def test_folders_are_kept_below_the_one_that_all_share(photos: Path, folder: Path, action: str) -> None:
    """Whatever is in them: so names are the same in the next run."""
    before = content(photos)
    assert place(action, folder, photos, only=("c.png",)) == 0
    assert content(folder) == {"b/c.png": b"b/c.png"}
    assert place(action, folder, photos, only=("a.png",)) == 0
    assert content(folder) == before


@pytest.mark.parametrize(
    ("images", "names"),
    [
        (["photos"], ["a.png", "b/a.png", "b/c.png"]),
        (["photos/"], ["a.png", "b/a.png", "b/c.png"]),
        (["photos/b", "photos/a.png"], ["a.png", "b/a.png", "b/c.png"]),
        (["photos/b/*.png"], ["a.png", "c.png"]),
        (["photos/*/c.png"], ["b/c.png"]),
        (["photos/b/c.png"], ["c.png"]),
        (["photos/b/.."], ["a.png", "b/a.png", "b/c.png"]),
        (["photos", "other/a.png"], ["other/a.png", "photos/a.png", "photos/b/a.png", "photos/b/c.png"]),
        (["d.zip"], ["b/c.png"]),
        (["d.zip/b"], ["c.png"]),
        (["d.zip/b/c.png"], ["c.png"]),
        (["d.zip", "photos/b"], ["d.zip/b/c.png", "photos/b/a.png", "photos/b/c.png"]),
    ],
    ids=str,
)
def test_new_names(
    photos: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, images: list[str], names: list[str]
) -> None:
    monkeypatch.chdir(photos.parent)
    Path("other").mkdir()
    Path("other/a.png").write_text("other")
    with zipfile.ZipFile("d.zip", "w") as archive:
        archive.write("photos/b/c.png", "b/c.png")
    assert place("copy", folder, *images) == 0
    assert list(content(folder)) == names


def test_new_names_of_paths_on_standard_input(photos: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are seen from here."""
    monkeypatch.chdir(photos)
    refs = list_images("-", io.BytesIO(b"b/c.png\n" + str(photos.parent / "other.png").encode()))
    (photos.parent / "other.png").write_text("other")
    flagged = Flagged("copy", folder, ["-"])
    for number, ref in enumerate(list_images([ref.path for ref in refs])):
        flagged.add_row(number, {"path": ref.path, "is_ood": True})
    assert flagged.place(list_images([ref.path for ref in refs]), quiet=True) == 0
    assert content(folder) == {"b/c.png": b"b/c.png", "other.png": b"other"}


def test_relative_names_and_names_with_dots(photos: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``link/..`` is where the link leads to, not where it lies."""
    monkeypatch.chdir(photos)
    other = photos.parent / "other"
    (other / "deep").mkdir(parents=True)
    (other / "a.png").write_text("other")
    (photos / "link").symlink_to(other / "deep")
    assert place("move", folder, "link/../a.png", "a.png") == 0
    assert content(folder) == {"other/a.png": b"other", "photos/a.png": b"a.png"}
    assert undo(folder / "manifest.csv")[0].source == str(other / "a.png")
    assert (other / "a.png").read_text() == "other"


@EACH
def test_a_name_in_use_gets_a_number(photos: Path, folder: Path, action: str) -> None:
    (folder / "b").mkdir(parents=True)
    for name in ("a.png", "a-2.png", "b/a.png"):
        (folder / name).write_text("mine")
    before = content(folder)
    after = content(photos)
    assert place(action, folder, photos) == 0
    new = {"a-3.png": after["a.png"], "b/a-2.png": after["b/a.png"], "b/c.png": after["b/c.png"]}
    assert content(folder) == before | new
    undo(folder / "manifest.csv")
    assert content(folder) == before
    assert content(photos) == after


def test_names_that_differ_by_capital_letters_only_can_go_to_any_disk(tmp_path: Path, folder: Path) -> None:
    for name in ("A.png", "a.png"):
        (tmp_path / name).write_text(name)
    assert place("copy", folder, tmp_path / "A.png", tmp_path / "a.png") == 0
    assert content(folder) == {"A.png": b"A.png", "a-2.png": b"a.png"}


@pytest.mark.parametrize("action", ["copy", "link"])
def test_the_same_command_again_does_nothing(photos: Path, folder: Path, told: Told, action: str) -> None:
    place(action, folder, photos)
    (photos / "new.png").write_text("new")
    told()
    place(action, folder, photos)
    word = "copied" if action == "copy" else "linked"
    assert told()[0] == f"1 of 4 flagged images {word} to {folder}, 3 were there already"
    assert [entry.target for entry in read_manifest(folder / "manifest-2.csv") if entry.result == "done"] == ["new.png"]

    told()
    place(action, folder, photos)
    assert told() == [f"0 of 4 flagged images {word} to {folder}, 4 were there already"]
    undo(folder / "manifest-2.csv")
    assert sorted(content(folder)) == ["a.png", "b/a.png", "b/c.png"]


@EACH
@pytest.mark.parametrize("name", [b"\xff.png", b"-rf.png", b"=1+1.png", b"two\nlines.png", b"\x1b[31m.png", b"'.png"])
def test_names_of_files_are_kept_exactly(tmp_path: Path, folder: Path, action: str, name: bytes) -> None:
    file = tmp_path / "photos" / os.fsdecode(name)
    file.parent.mkdir()
    file.write_text("picture")
    assert place(action, folder, tmp_path / "photos") == 0
    assert (folder / os.fsdecode(name)).read_text() == "picture"
    undo(folder / "manifest.csv")
    assert content(folder) == {}
    assert file.read_text() == "picture"


def test_a_folder_that_leads_elsewhere_is_not_followed(photos: Path, folder: Path, tmp_path: Path, told: Told) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir(parents=True)
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    assert place("copy", folder, photos) == 3
    assert content(folder) == {"a.png": b"a.png"}
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert f"  left out: {photos}/b/a.png: {folder}/b leads out of {folder}" in told()


# ---- archives and links ----


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Members with names that no disk, or no terminal, should get."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in ("x/a.png", "x/A.png", "./x/b.png", "x/c:d\x1b*.png", f"x/{'long' * 100}.png", "y/a\\b.png"):
            archive.writestr(name, name)
    return tmp_path / "data.zip"


def test_members_are_written_out(archive: Path, folder: Path) -> None:
    assert place("copy", folder, archive) == 0
    short = "long" * 15
    assert content(folder) == {
        "x/A.png": b"x/A.png",
        "x/a-2.png": b"x/a.png",
        "x/b.png": b"./x/b.png",
        "x/c_d__.png": b"x/c:d\x1b*.png",
        f"x/{short}.png": f"x/{'long' * 100}.png".encode(),
        "y/a_b.png": b"y/a\\b.png",
    }
    sources = [entry.source for entry in read_manifest(folder / "manifest.csv")]
    assert f"{archive}/x/a.png" in sources
    assert {entry.result for entry in undo(folder / "manifest.csv")} == {"taken back"}
    assert content(folder) == {}


def test_copies_are_kept_if_the_archive_is_gone(archive: Path, folder: Path) -> None:
    place("copy", folder, archive)
    archive.unlink()
    assert {entry.note for entry in undo(folder / "manifest.csv")} == {"the original is gone, so the copy is kept"}
    assert len(content(folder)) == 6


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_members_of_tar_archives_beside_files(photos: Path, folder: Path, tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"data.{suffix}"
    with tarfile.open(archive, "w:gz" if suffix == "tar.gz" else "w") as tar:
        tar.add(photos / "b", "photos/b")
    assert place("copy", folder, photos, archive) == 0
    members = {f"data.{suffix}/photos/b/{name}.png": f"b/{name}.png".encode() for name in "ac"}
    assert content(folder) == members | {f"photos/{name}": text for name, text in content(photos).items()}


@pytest.mark.parametrize("action", ["link", "move"])
def test_members_cannot_be_linked_or_moved(archive: Path, photos: Path, folder: Path, told: Told, action: str) -> None:
    before = archive.read_bytes()
    assert place(action, folder, photos / "a.png", archive) == 3
    assert list(content(folder).values()) == [b"a.png"]
    assert archive.read_bytes() == before
    word = {"link": "linked", "move": "moved"}[action]
    lines = told()
    assert lines[0] == f"1 of 7 flagged images {word} to {folder}"
    assert sum(line.endswith(f": a member of an archive cannot be {word}, only copied") for line in lines) == 6


def test_links_are_copied_and_linked_but_not_moved(photos: Path, folder: Path, told: Told) -> None:
    link = photos / "link.png"
    link.symlink_to("a.png")
    assert place("move", folder / "1", link, photos / "a.png", only=("link.png",)) == 3
    assert f"  left out: {link}: a link, not a file: only files are moved" in told()
    assert not folder.exists()
    for number, action in enumerate(("copy", "link"), 2):
        place(action, folder / str(number), link)
        assert content(folder / str(number)) == {"link.png": b"a.png"}


@EACH
def test_images_that_are_gone_are_named(photos: Path, folder: Path, told: Told, action: str) -> None:
    refs = list_images(str(photos))
    (photos / "b" / "a.png").unlink()
    flagged = Flagged(action, folder, [str(photos)])
    for number, ref in enumerate(refs):
        flagged.add_row(number, {"path": ref.path, "is_ood": True})
    assert flagged.place(refs, quiet=False) == 3
    assert sorted(content(folder)) == ["a.png", "b/c.png"]
    (line,) = [line for line in told() if "left out" in line]
    assert line.startswith(f"  left out: {photos}/b/a.png: ")
    assert {entry.result for entry in undo(folder / "manifest.csv")} == {"taken back", "left"}


# ---- disks and kills ----


@pytest.mark.parametrize("action", ["copy", "move"])
def test_a_full_disk(photos: Path, tmp_path: Path, mounted: Callable[[Path, str], Path], action: str) -> None:
    disk = mounted(tmp_path / "disk", "128k")
    (photos / "b" / "a.png").write_bytes(bytes(1 << 20))
    before = content(photos)
    with pytest.raises(FeatdiffError) as caught:
        place(action, disk / "x", photos)
    word = "copied" if action == "copy" else "moved"
    assert str(caught.value) == (
        f"{disk}/x: No space left on device; 1 of 3 flagged images are {word}: the same command goes on, "
        f"and featdiff score --undo {disk}/x/manifest.csv takes it back"
    )
    assert content(disk) == {"x/a.png": b"a.png"}
    undo(disk / "x" / "manifest.csv")
    assert content(disk) == {}
    assert content(photos) == before


def test_a_disk_that_is_full_at_once(photos: Path, tmp_path: Path, mounted: Callable[[Path, str], Path]) -> None:
    """Without a manifest nothing is done, and no folder is left behind."""
    disk = mounted(tmp_path / "disk", "64k")
    with pytest.raises(OSError, match="No space"):
        (disk / "full").write_bytes(bytes(1 << 20))
    before = content(photos)
    with pytest.raises(FeatdiffError, match="x/y cannot be written: No space left on device"):
        place("move", disk / "x" / "y", photos)
    assert [file.name for file in disk.iterdir()] == ["full"]
    assert content(photos) == before


def test_ctrl_c(photos: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move_new = placing.move_new

    def stopped(source: Path, target: Path) -> None:
        if target.name == "c.png":
            raise KeyboardInterrupt
        move_new(source, target)

    before = content(photos)
    monkeypatch.setattr(placing, "move_new", stopped)
    with pytest.raises(Stopped) as caught:
        place("move", folder, photos)
    assert caught.value.code == 130
    assert caught.value.message.startswith(
        "interrupted; 2 of 3 flagged images are moved: the same command goes on, and "
    )
    assert [entry.result for entry in read_manifest(folder / "manifest.csv")] == ["done", "done", "planned"]

    monkeypatch.undo()
    undo(folder / "manifest.csv")
    assert content(photos) == before


#: What changes a name on the disk.
def killed_at(number: int, action: str, folder: Path, photos: Path) -> bool:
    """Whether a process that does it was killed before its step of this number, or ended before that."""
    command = [sys.executable, flag_images.__file__, str(number), action, str(folder), str(photos)]
    code = subprocess.run(command, check=False, timeout=60).returncode
    assert code in (0, -signal.SIGKILL)
    return code != 0


@EACH
@pytest.mark.parametrize("then", ["undo", "go on"])
def test_killed_at_any_step(photos: Path, tmp_path: Path, action: str, then: str) -> None:
    before = content(photos)
    number = 0
    killed = True
    while killed:
        number += 1
        folder = tmp_path / f"flagged {number}"
        killed = killed_at(number, action, folder, photos)
        manifests = list(folder.glob("manifest*.csv"))
        whole = [text for name, text in content(folder).items() if not name.endswith(".tmp")]
        assert set(whole) <= set(before.values())  # nothing half-written

        if then == "go on":
            if content(photos):  # else all are moved
                place(action, folder, photos)
            assert {name: text for name, text in content(folder).items() if not name.endswith(".tmp")} == before
        for manifest in folder.glob("manifest*.csv"):
            undo(manifest)
        assert content(photos) == before
        assert not manifests or content(folder) == {}
    assert number > 5
