"""What the user names becomes an ordered list of references, each of which can be read."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import struct
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featdiff.data.batches import iter_loaded, load
from featdiff.data.decoding import decode
from featdiff.data.references import (
    IMAGE_SUFFIXES,
    FileRef,
    ImageRef,
    MissingRef,
    TarMemberRef,
    TarRef,
    ZipRef,
    list_images,
    printable,
)
from featdiff.exceptions import UsageError

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX file names and links")
TAR_MODES = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def png(value: int = 0) -> bytes:
    """A 2 x 2 grey PNG file whose pixels are ``value``."""
    stream = io.BytesIO()
    Image.new("L", (2, 2), value).save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, *names: str) -> Path:
    """PNG files of these names below ``folder``; the first is 0, the second 1 ..."""
    for value, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(value))
    return folder


def write_zip(file: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file


def write_tar(file: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    suffix = next(suffix for suffix in TAR_MODES if file.name.endswith(suffix))
    with tarfile.open(file, TAR_MODES[suffix]) as archive:
        for name, data in members.items():
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            content = data if isinstance(data, bytes) else b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def write_archive(file: Path, members: dict[str, bytes]) -> Path:
    return write_zip(file, members) if file.suffix == ".zip" else write_tar(file, dict(members))


def link(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def below(refs: list[ImageRef], root: Path | str) -> list[str]:
    """Paths relative to ``root``, in the order of ``refs``."""
    assert all(ref.path.startswith(f"{root}/") for ref in refs), [ref.path for ref in refs]
    return [ref.path[len(str(root)) + 1 :] for ref in refs]


def reason(ref: ImageRef) -> str:
    return load(ref, to_tensor).reason


def value(ref: ImageRef) -> int:
    """The grey value of a picture that is all one colour."""
    loaded = load(ref, to_tensor)
    assert loaded.pixels is not None, loaded.reason
    assert loaded.pixels.min() == loaded.pixels.max()
    return int(loaded.pixels.max())


@contextmanager
def ordinary_user() -> Iterator[Path]:
    """A folder that everybody may enter, and inside the block no right to pass over file modes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        if os.geteuid() != 0:
            yield folder
            return
        (folder / "probe").touch()
        try:
            os.seteuid(65534)
        except OSError as error:
            pytest.skip(f"root cannot drop its rights here: {error}")
        try:
            reachable = (folder / "probe").exists()
            os.seteuid(0)
            (folder / "probe").unlink()
            if not reachable:
                pytest.skip("the temporary folder is closed to other users")
            yield folder
        finally:
            os.seteuid(0)


@contextmanager
def without_rights() -> Iterator[None]:
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if before == 0:
            os.seteuid(0)


# ---- files and folders ----


def test_one_file(tmp_path: Path) -> None:
    file = write(tmp_path, "a.png") / "a.png"
    for source in (file, str(file), [file], (str(file),)):
        assert list_images(source) == [FileRef(str(file), str(file))]


def test_named_file_is_listed_whatever_its_suffix(tmp_path: Path) -> None:
    file = tmp_path / "picture.dat"
    file.write_bytes(png(7))
    (ref,) = list_images(file)
    assert value(ref) == 7


def test_folder_is_recursive_and_sorted_by_path(tmp_path: Path) -> None:
    names = ["c.png", "b/z.png", "b/a.png", "a/deep/er/x.png", "d/1.png", "a.png"]
    write(tmp_path, *names)
    assert below(list_images(tmp_path), tmp_path) == sorted(names)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_folder_and_its_archive_list_the_same_in_the_same_order(tmp_path: Path, suffix: str) -> None:
    names = ["c.png", "b/z.png", "a/deep/x.png", "a.png"]
    folder = write(tmp_path / "folder", *names)
    archive = write_archive(tmp_path / f"folder{suffix}", {name: png() for name in names})
    assert below(list_images(archive), archive) == sorted(names)
    assert below(list_images(folder), folder) == sorted(names)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_hidden_folders_are_left_out_of_folders_and_archives_alike(tmp_path: Path, suffix: str) -> None:
    names = ["a.png", ".cache/x.png", "b/.git/y.png"]
    folder = write(tmp_path / "folder", *names)
    archive = write_archive(tmp_path / f"folder{suffix}", {name: png() for name in names})
    assert below(list_images(folder), folder) == ["a.png"]
    assert below(list_images(archive), archive) == ["a.png"]


def test_folder_leaves_out_hidden_and_other_files(tmp_path: Path) -> None:
    write(tmp_path, "a.png", ".b.png", "._a.png", ".cache/c.png", "notes.txt", "Thumbs.db", "png", "d.png~")
    assert below(list_images(tmp_path), tmp_path) == ["a.png"]


def test_hidden_folder_can_be_named(tmp_path: Path) -> None:
    folder = write(tmp_path / ".data", "a.png")
    assert below(list_images(folder), folder) == ["a.png"]


@pytest.mark.parametrize("suffix", [*sorted(IMAGE_SUFFIXES), ".JPG", ".Png", ".TIFF"])
def test_image_suffixes_of_any_case_are_listed(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").touch()
    assert below(list_images(tmp_path), tmp_path) == [f"a{suffix}"]


def test_image_suffixes_cover_the_promised_formats() -> None:
    promised = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
    assert promised <= set(IMAGE_SUFFIXES)


@posix
def test_linked_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", "x.png", "sub/y.png")
    folder = write(tmp_path / "folder", "a.png", "sub/b.png")
    (folder / "linked").symlink_to(outside)
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "sub" / "self").symlink_to(folder / "sub")
    found = below(list_images(folder), folder)
    assert sorted(found) == ["a.png", "linked/sub/y.png", "linked/x.png", "sub/b.png"]


@posix
def test_folder_given_as_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real", "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert below(list_images(tmp_path / "link"), tmp_path / "link") == ["a.png"]


@posix
@pytest.mark.parametrize("order", [1, -1])
def test_folder_reached_many_times_is_listed_once_by_its_first_name(tmp_path: Path, order: int) -> None:
    """Not by whichever name the file system happens to give first."""
    write(tmp_path / "m", "a.png")
    for name in "abcdefghijklnopqrstuvwxyz"[::order]:
        (tmp_path / name).symlink_to(tmp_path / "m")
    assert below(list_images(tmp_path), tmp_path) == ["a/a.png"]


def test_folder_whose_name_looks_like_an_image_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "x.jpg", "a.png")
    assert below(list_images(tmp_path), tmp_path) == ["x.jpg/a.png"]
    assert below(list_images(tmp_path / "x.jpg"), tmp_path) == ["x.jpg/a.png"]


def test_folder_whose_name_looks_like_an_archive_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "x.zip", "a.png")
    write(tmp_path / "y.tar.gz", "b.png")
    assert below(list_images([tmp_path / "x.zip", tmp_path / "y.tar.gz"]), tmp_path) == [
        "x.zip/a.png",
        "y.tar.gz/b.png",
    ]


def test_order_is_that_of_the_arguments(tmp_path: Path) -> None:
    write(tmp_path, "b/2.png", "b/1.png", "a/3.png", "c.png")
    sources = [tmp_path / "c.png", tmp_path / "b", np.zeros((4, 4), np.uint8), tmp_path / "a"]
    paths = [ref.path.removeprefix(f"{tmp_path}/") for ref in list_images(sources)]
    assert paths == ["c.png", "b/1.png", "b/2.png", "array[2]", "a/3.png"]


def test_duplicates_are_listed_once_at_their_first_place(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png", "c.png")
    b, none = tmp_path / "b.png", tmp_path / "none.png"
    sources = [b, str(b), tmp_path, f"{tmp_path}/", tmp_path / "*.png", none, none]
    assert below(list_images(sources), tmp_path) == ["b.png", "a.png", "c.png", "none.png"]


def test_order_does_not_depend_on_how_the_folder_was_written(tmp_path: Path) -> None:
    names = [f"{i % 7}/{i * 37 % 100:02d}.png" for i in range(60)]
    first = write(tmp_path / "first", *names)
    second = write(tmp_path / "second", *reversed(names))
    found = below(list_images(first), first)
    assert found == below(list_images(second), second) == sorted(names)


# ---- globs ----


def test_glob_is_sorted_and_may_be_recursive(tmp_path: Path) -> None:
    write(tmp_path, "b.png", "a.png", "sub/c.png", "sub/d.bmp", ".e.png")
    assert below(list_images(f"{tmp_path}/*.png"), tmp_path) == ["a.png", "b.png"]
    assert below(list_images(f"{tmp_path}/**/*.png"), tmp_path) == ["a.png", "b.png", "sub/c.png"]
    assert below(list_images(f"{tmp_path}/su[ab]"), tmp_path) == ["sub/c.png", "sub/d.bmp"]


def test_glob_finds_archives(tmp_path: Path) -> None:
    for name in "ba":
        write_zip(tmp_path / f"{name}.zip", {"x.png": png()})
    assert below(list_images(f"{tmp_path}/*.zip"), tmp_path) == ["a.zip/x.png", "b.zip/x.png"]


@pytest.mark.parametrize("name", ["[1].png", "what?.png", "a*.png"])
def test_file_whose_name_is_a_pattern_is_that_file(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, "1.png", "whats.png", "ab.png")
    assert below(list_images(tmp_path / name), tmp_path) == [name]


# ---- standard input ----


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_stdin_gives_a_path_a_line(tmp_path: Path, end: bytes) -> None:
    """Blank lines do not count, spaces belong to the name, folders and archives are opened, order is kept."""
    write(tmp_path, "b.png", " spaced name.png", "sub/c.png")
    write_zip(tmp_path / "z.zip", {"in.png": png()})
    names = ["b.png", "", "   ", " spaced name.png", "sub", "z.zip", "gone.png", "b.png"]
    lines = [os.fsencode(tmp_path / name) if name.strip() else name.encode() for name in names]
    for text in (end.join(lines), end.join(lines) + end):
        found = below(list_images("-", io.BytesIO(text)), tmp_path)
        assert found == ["b.png", " spaced name.png", "sub/c.png", "z.zip/in.png", "gone.png"]


def test_stdin_is_the_default_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.png")
    text = io.TextIOWrapper(io.BytesIO(os.fsencode(tmp_path / "a.png")))
    monkeypatch.setattr(sys, "stdin", text)
    assert below(list_images(["-"]), tmp_path) == ["a.png"]


def test_stdin_takes_its_place_among_the_arguments(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png", "c.png")
    stream = io.BytesIO(os.fsencode(tmp_path / "a.png"))
    found = list_images([tmp_path / "c.png", "-", tmp_path / "b.png"], stream)
    assert below(found, tmp_path) == ["c.png", "a.png", "b.png"]


def test_missing_paths_on_stdin_are_rows_not_an_error(tmp_path: Path) -> None:
    refs = list_images("-", io.BytesIO(os.fsencode(tmp_path / "gone.png")))
    assert [reason(ref) for ref in refs] == ["no such file or folder"]


def test_zero_bytes_on_stdin_are_a_row(tmp_path: Path) -> None:
    """As from ``find -print0``, or from a binary file by mistake."""
    (ref,) = list_images("-", io.BytesIO(b"a.png\0b.png"))
    assert reason(ref) == "no such file or folder"


def test_dash_as_a_path_object_is_a_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").write_bytes(png(3))
    (ref,) = list_images(Path("-"), io.BytesIO(b"nothing"))
    assert value(ref) == 3


# ---- odd names ----


@pytest.fixture
def latin1_file(tmp_path: Path) -> bytes:
    """A file whose name is not UTF-8."""
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    try:
        with open(name, "wb") as stream:
            stream.write(png(9))
    except OSError as error:
        pytest.skip(f"this file system takes only UTF-8 names: {error}")
    return name


@posix
@pytest.mark.parametrize("way", ["folder", "glob", "stdin", "path"])
def test_name_that_is_not_utf8_is_read_and_printed_as_unicode(tmp_path: Path, latin1_file: bytes, way: str) -> None:
    source = {"folder": tmp_path, "glob": f"{tmp_path}/*.png", "stdin": "-", "path": os.fsdecode(latin1_file)}
    (ref,) = list_images(source[way], io.BytesIO(latin1_file + b"\n"))
    assert ref.path == f"{tmp_path}/caf\\xe9.png"
    assert ref.path.encode("utf-8").decode("utf-8") == ref.path
    assert value(ref) == 9
    assert value(pickle.loads(pickle.dumps(ref))) == 9


@posix
def test_missing_name_that_is_not_utf8_is_printed_as_unicode(tmp_path: Path) -> None:
    (ref,) = list_images("-", io.BytesIO(os.fsencode(tmp_path) + b"/\xff.png"))
    assert ref.path == f"{tmp_path}/\\xff.png"


@posix
def test_two_files_printed_alike_are_both_listed(tmp_path: Path, latin1_file: bytes) -> None:
    """One name holds the byte E9, the other a backslash and ``xe9``: both files must get a row."""
    (tmp_path / "caf\\xe9.png").write_bytes(png(1))
    assert sorted(value(ref) for ref in list_images(tmp_path)) == [1, 9]


def test_printable_keeps_ordinary_names() -> None:
    assert printable(Path("ä/日本.png")) == "ä/日本.png"


@pytest.mark.parametrize("name", ["", "\ud800.png", "a\0b.png", "x" * 5000 + ".png"])
def test_impossible_name_becomes_a_row(name: str) -> None:
    """Empty, not encodable, with a zero byte, too long."""
    refs = list_images([np.zeros((4, 4), np.uint8), name])
    assert len(refs) == 2
    assert refs[1].path
    assert refs[1].path.encode("utf-8")
    assert reason(refs[1])


# ---- nothing found ----


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "no such file or folder"),
        ("empty", "no images in this folder"),
        ("*.tif", "no file matches"),
        ("text.zip/train", "no images in this archive"),
        ("text.zip", "no images in this archive"),
        ("corrupt.zip", "archive cannot be read"),
    ],
)
def test_nothing_found_is_a_usage_error_that_names_it(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    write_zip(tmp_path / "text.zip", {"readme.txt": b"x"})
    (tmp_path / "corrupt.zip").write_bytes(b"PK\x03\x04" + b"x" * 100)
    with pytest.raises(UsageError, match=words) as caught:
        list_images(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [[], ()])
def test_no_sources_is_a_usage_error(source: object) -> None:
    with pytest.raises(UsageError, match="no images"):
        list_images(source)


def test_missing_beside_found_is_a_row(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    (tmp_path / "empty").mkdir()
    sources = [tmp_path / name for name in ("a.png", "gone", "empty", "*.tif")]
    refs = list_images(sources)
    assert below(refs, tmp_path) == ["a.png", "gone", "empty", "*.tif"]
    reasons = ["", "no such file or folder", "no images in this folder", "no file matches this pattern"]
    assert [reason(ref) for ref in refs] == reasons


@pytest.mark.parametrize(
    "source", [None, 3, {"a": 1}, [["a.png"]], b"a.png", object(), [None]], ids=lambda s: type(s).__name__
)
def test_unknown_kinds_are_usage_errors_that_say_what_is_taken(source: object) -> None:
    with pytest.raises(UsageError, match="paths, PIL images, arrays or tensors"):
        list_images(source)


# ---- files that cannot be read ----


@posix
def test_broken_link_is_a_row_with_a_reason(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "c.jpg")
    refs = list_images(tmp_path)
    assert below(refs, tmp_path) == ["a.png", "b.jpg", "c.jpg"]
    assert [reason(ref) for ref in refs] == ["", "no such file or directory", os.strerror(40).lower()]
    assert below(list_images(tmp_path / "b.jpg"), tmp_path) == ["b.jpg"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.timeout(20)
def test_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    os.mkfifo(tmp_path / "y.zip")
    folder = list_images(tmp_path)
    assert below(folder, tmp_path) == ["x.jpg"]
    refs = folder + list_images(tmp_path / "x.jpg") + list_images(tmp_path / "y.zip")
    assert [reason(ref) for ref in refs] == ["not a regular file"] * 3


def test_folder_in_place_of_a_file_has_a_reason(tmp_path: Path) -> None:
    """A file can be replaced between listing and reading."""
    (tmp_path / "x.jpg").mkdir()
    assert "folder" in reason(FileRef("x.jpg", str(tmp_path / "x.jpg")))


def test_file_deleted_after_listing_has_a_reason(tmp_path: Path) -> None:
    (ref,) = list_images(write(tmp_path, "a.png"))
    (tmp_path / "a.png").unlink()
    assert reason(ref) == "no such file or directory"


@posix
def test_file_without_permission_has_a_reason() -> None:
    with ordinary_user() as folder:
        write(folder, "good.png", "secret.png")
        (folder / "good.png").chmod(0o644)
        (folder / "secret.png").chmod(0)
        with without_rights():
            good, secret = list_images(folder)
            assert (value(good), reason(secret)) == (0, "permission denied")


@posix
def test_folder_and_archive_without_permission_are_rows() -> None:
    with ordinary_user() as folder:
        write(folder, "a.png", "closed/b.png", "z.png")
        write_zip(folder / "closed.zip", {"c.png": png()}).chmod(0)
        (folder / "closed").chmod(0)
        try:
            with without_rights():
                refs = list_images([folder, folder / "closed.zip"])
                reasons = {ref.path.removeprefix(f"{folder}/"): reason(ref) for ref in refs}
        finally:
            (folder / "closed").chmod(0o755)
    assert set(reasons) == {"a.png", "z.png", "closed", "closed.zip"}
    assert reasons["a.png"] == reasons["z.png"] == ""
    for name in ("closed", "closed.zip"):
        assert "permission denied" in reasons[name].lower()


# ---- archives ----

MEMBERS = ["train/b.png", "train/a.png", "test/deep/c.png", "d.png"]
ARCHIVES = [".zip", *TAR_MODES]


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_archive_is_read_without_unpacking(tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"data{suffix}"
    write_archive(archive, {name: png(i) for i, name in enumerate(MEMBERS)} | {"readme.txt": b"x"})
    refs = list_images(archive)
    assert {name: value(ref) for name, ref in zip(below(refs, archive), refs, strict=True)} == {
        name: i for i, name in enumerate(MEMBERS)
    }
    assert os.listdir(tmp_path) == [archive.name]


@pytest.mark.parametrize(("suffix", "kind"), [(".zip", ZipRef), (".tar", TarRef)])
def test_members_that_can_be_read_in_any_order_are_sorted(tmp_path: Path, suffix: str, kind: type) -> None:
    archive = write_archive(tmp_path / f"data{suffix}", {name: png() for name in MEMBERS})
    refs = list_images(archive)
    assert below(refs, archive) == sorted(MEMBERS)
    assert all(type(ref) is kind and not ref.sequential for ref in refs)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_members_of_a_compressed_tar_keep_its_order(tmp_path: Path, suffix: str) -> None:
    archive = write_tar(tmp_path / f"data{suffix}", {name: png() for name in MEMBERS})
    refs = list_images(archive)
    assert below(refs, archive) == MEMBERS
    assert all(type(ref) is TarMemberRef and ref.sequential for ref in refs)


def test_compressed_tar_under_a_plain_name(tmp_path: Path) -> None:
    compressed = write_tar(tmp_path / "a.tar.gz", {name: png(i) for i, name in enumerate(MEMBERS)})
    compressed.rename(tmp_path / "a.tar")
    assert [value(ref) for ref in list_images(tmp_path / "a.tar")] == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("train", ["train/a.png", "train/b.png"]),
        ("train/", ["train/a.png", "train/b.png"]),
        ("test/deep", ["test/deep/c.png"]),
        ("test/deep/c.png", ["test/deep/c.png"]),
    ],
)
def test_folder_or_file_inside_an_archive(tmp_path: Path, suffix: str, inside: str, expected: list[str]) -> None:
    """``train2`` is not inside ``train``."""
    members = {name: png() for name in [*MEMBERS, "train2/e.png"]}
    archive = write_archive(tmp_path / f"data{suffix}", members)
    assert sorted(below(list_images(f"{archive}/{inside}"), archive)) == expected


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_folder_inside_an_archive_whose_members_begin_with_a_dot(tmp_path: Path, suffix: str) -> None:
    """``tar -czf data.tar.gz .`` writes ``./train/a.png``."""
    members = {f"./{name}": png(i) for i, name in enumerate(MEMBERS)}
    archive = write_archive(tmp_path / f"data{suffix}", members)
    assert sorted(value(ref) for ref in list_images(archive)) == [0, 1, 2, 3]
    assert sorted(value(ref) for ref in list_images(f"{archive}/train")) == [0, 1]


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_missing_folder_inside_an_archive(tmp_path: Path, suffix: str) -> None:
    archive = write_archive(tmp_path / f"data{suffix}", {"train/a.png": png()})
    with pytest.raises(UsageError, match="data.*val: no images in this archive"):
        list_images(f"{archive}/val")


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_archive_leaves_out_hidden_and_other_members(tmp_path: Path, suffix: str) -> None:
    names = ["a.png", ".b.png", "__MACOSX/a.png", "__MACOSX/._a.png", "x.jpg/", "notes.txt", "sub/._a.png"]
    archive = write_archive(tmp_path / f"data{suffix}", {n: png() for n in names if not n.endswith("/")})
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr("x.jpg/", b"")
    assert below(list_images(archive), archive) == ["a.png"]


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_member_written_twice_is_listed_once_and_the_last_counts(tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"data{suffix}"
    with pytest.warns(UserWarning, match="Duplicate") if suffix == ".zip" else tempfile.TemporaryFile():
        if suffix == ".zip":
            with zipfile.ZipFile(archive, "w") as file:
                file.writestr("a.png", png(1))
                file.writestr("a.png", png(2))
        else:
            with tarfile.open(archive, TAR_MODES[suffix]) as tar:
                for number in (1, 2):
                    info = tarfile.TarInfo("a.png")
                    info.size = len(png(number))
                    tar.addfile(info, io.BytesIO(png(number)))
    (ref,) = list_images(archive)
    assert value(ref) == 2


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_links_inside_a_tar_are_read_and_never_lost(tmp_path: Path, suffix: str) -> None:
    """Hard links are how tar stores a file met twice; a broken link or a FIFO is a row with a reason."""
    members: dict[str, bytes | tarfile.TarInfo] = {
        "d/a.png": png(5),
        "d/hard.png": link("d/hard.png", tarfile.LNKTYPE, "d/a.png"),
        "d/soft.png": link("d/soft.png", tarfile.SYMTYPE, "a.png"),
        "d/dead.png": link("d/dead.png", tarfile.SYMTYPE, "gone.png"),
        "d/pipe.png": link("d/pipe.png", tarfile.FIFOTYPE),
    }
    archive = write_tar(tmp_path / f"data{suffix}", members)
    loaded = {ref.path.rsplit("/", 1)[1]: load(ref, to_tensor) for ref in list_images(archive)}
    assert {"a.png", "hard.png", "soft.png"} <= set(loaded)
    for name in ("a.png", "hard.png", "soft.png"):
        assert (loaded[name].reason, int(loaded[name].pixels.max())) == ("", 5)  # type: ignore[union-attr]
    for name in ("dead.png", "pipe.png"):
        assert name not in loaded or loaded[name].reason


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize("damage", ["empty", "text", "half", "flipped"])
def test_corrupt_archive_is_a_row_with_one_line(tmp_path: Path, suffix: str, damage: str) -> None:
    rng = np.random.default_rng(0)
    members = {f"{i}.png": rng.integers(0, 40, 30000, dtype=np.uint8).tobytes() for i in range(5)}
    archive = write_archive(tmp_path / f"data{suffix}", members)
    whole = archive.read_bytes()
    middle = len(whole) // 2
    flipped = bytes(byte ^ 0x55 for byte in whole[middle : middle + 64])
    data = {
        "empty": b"",
        "text": b"this is not an archive\n" * 40,
        "half": whole[:middle],
        "flipped": whole[:middle] + flipped + whole[middle + 64 :],
    }
    archive.write_bytes(data[damage])
    refs = list_images([archive, np.zeros((4, 4), np.uint8)])
    assert refs[-1].path == "array[1]"
    assert len(refs) >= 2
    for ref in refs[:-1]:
        assert ref.path.startswith(str(archive))
        assert reason(ref)  # the members are noise: none of them is an image either
        assert "\n" not in reason(ref)
    if damage != "flipped":
        assert len(refs) == 2
        assert "archive cannot be read" in reason(refs[0])


def test_deflate_damage_inside_a_tar_is_a_row(tmp_path: Path) -> None:
    """Every place of a small compressed tar is damaged in turn."""
    rng = np.random.default_rng(0)
    members = {f"{i}.png": rng.integers(0, 40, 3000, dtype=np.uint8).tobytes() for i in range(3)}
    whole = write_tar(tmp_path / "whole.tar.gz", dict(members)).read_bytes()
    bad = tmp_path / "bad.tar.gz"
    for place in range(20, len(whole) - 40, 97):
        bad.write_bytes(whole[:place] + b"\xff\x00\xaa\x55" * 4 + whole[place + 16 :])
        refs = list_images([bad, np.zeros((4, 4), np.uint8)])
        assert len(refs) > 1
        assert all(reason(ref) for ref in refs[:-1])


def _patched(archive: Path, local: int, central: int, new: bytes) -> None:
    """Overwrite a field of the first member in its local header and in the directory of a zip file."""
    data = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        start = data.index(signature) + offset
        data[start : start + len(new)] = new
    archive.write_bytes(data)


@pytest.mark.parametrize(
    ("field", "words"),
    [((6, 8, struct.pack("<H", 1)), "encrypted"), ((8, 10, struct.pack("<H", 97)), "compression method")],
    ids=["encrypted", "unknown method"],
)
def test_zip_member_that_cannot_be_decoded_is_a_row(tmp_path: Path, field: tuple[int, int, bytes], words: str) -> None:
    archive = write_zip(tmp_path / "data.zip", {"a.png": png(1), "b.png": png(2)})
    _patched(archive, *field)
    bad, good = list_images(archive)
    assert words in reason(bad)
    assert value(good) == 2


def test_zip_of_a_newer_format_is_a_row(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "data.zip", {"a.png": png()})
    _patched(archive, 4, 6, struct.pack("<H", 132))
    refs = list_images([archive, np.zeros((4, 4), np.uint8)])
    assert "version" in reason(refs[0])


def test_zip_member_with_wrong_checksum_is_a_row(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "data.zip", {"a.png": png(1), "b.png": png(2)})
    data = bytearray(archive.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 0xFF
    archive.write_bytes(data)
    bad, good = list_images(archive)
    assert "CRC" in reason(bad)
    assert value(good) == 2


def test_zip_member_name_that_is_not_ascii(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "data.zip", {"grün/日本.png": png(4)})
    (ref,) = list_images(archive)
    assert (ref.path, value(ref)) == (f"{archive}/grün/日本.png", 4)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tar_member_name_that_is_not_utf8(tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"data{suffix}"
    with tarfile.open(archive, TAR_MODES[suffix], format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("caf\udce9.png")
        info.size = len(png(6))
        tar.addfile(info, io.BytesIO(png(6)))
    (ref,) = list_images(archive)
    assert (ref.path, value(ref)) == (f"{archive}/caf\\xe9.png", 6)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("way", ["replace", "overwrite"])
def test_archive_written_anew_is_read_anew(tmp_path: Path, suffix: str, way: str) -> None:
    """In one process, as in a notebook: the second list must not be that of the old file."""
    archive = write_archive(tmp_path / f"data{suffix}", {"a.png": png(1), "b.png": png(2)})
    assert [value(ref) for ref in list_images(archive)] == [1, 2]
    fresh = write_archive(tmp_path / f"new{suffix}", {"c.png": png(11), "d.png": png(12), "e.png": png(13)})
    if way == "replace":
        fresh.rename(archive)
    else:
        archive.write_bytes(fresh.read_bytes())
    refs = list_images(archive)
    assert below(refs, archive) == ["c.png", "d.png", "e.png"]
    assert [value(ref) for ref in refs] == [11, 12, 13]


@posix
def test_archive_overwritten_by_one_of_the_same_size_is_read_anew(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "data.zip", {"a.png": png(1)})
    size = archive.stat().st_size
    assert [value(ref) for ref in list_images(archive)] == [1]
    write_zip(archive, {"b.png": png(2)})
    os.utime(archive, (0, 2_000_000_000))  # some clocks are coarse
    assert archive.stat().st_size == size
    (ref,) = list_images(archive)
    assert (below([ref], archive), value(ref)) == (["b.png"], 2)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_members_read_from_many_threads_are_not_mixed_up(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    members = {f"{i:02d}.png": rng.bytes(40_000) for i in range(16)}
    refs = list_images(write_archive(tmp_path / f"data{suffix}", members))
    wrong: list[object] = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(16):
            try:
                wrong.extend([i] * (refs[i].read() != members[f"{i:02d}.png"]))
            except Exception as error:  # two threads in one stream
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_compressed_tar_can_be_read_backwards(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar.gz", {f"{i}.png": png(i) for i in range(5)})
    refs = list_images(archive)
    assert [value(ref) for ref in reversed(refs)] == [4, 3, 2, 1, 0]


# ---- images in memory ----


def held(source: object) -> np.ndarray:
    """The decoded RGB pixels (H, W, 3) of the one image in ``source``."""
    (ref,) = list_images(source)
    return np.asarray(decode(ref.read()))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_pil_image(pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    assert np.array_equal(held(image), pixels)
    assert [ref.path for ref in list_images([image, image])] == ["image[0]", "image[1]"]


def test_arrays_of_uint8(pixels: np.ndarray) -> None:
    grey = pixels[:, :, 0]
    assert np.array_equal(held(pixels), pixels)
    assert np.array_equal(held(pixels[:, ::-1]), pixels[:, ::-1])
    assert np.array_equal(held(grey), np.stack([grey] * 3, axis=2))
    assert np.array_equal(held(grey[:, :, None]), np.stack([grey] * 3, axis=2))


def test_array_with_alpha_is_laid_on_white(pixels: np.ndarray) -> None:
    alpha = np.zeros((5, 7, 1), np.uint8)
    alpha[2:] = 255
    found = held(np.concatenate([pixels, alpha], axis=2))
    assert (found[:2] == 255).all()
    assert np.array_equal(found[2:], pixels[2:])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_arrays_of_floats_are_scaled_by_255(dtype: str) -> None:
    levels = np.arange(256).reshape(16, 16)
    assert np.array_equal(held((levels / 255).astype(dtype))[:, :, 1], levels)


def test_floats_use_a_fixed_scale_not_their_own_range() -> None:
    found = held(np.array([[0.2, 0.003, 0.999], [0.2, 0.2, 0.2]], np.float32))
    assert found[0, :, 0].tolist() == [51, 1, 255]  # rounded, not cut off


def test_array_batch(pixels: np.ndarray) -> None:
    refs = list_images(["-", np.stack([pixels, 255 - pixels])], io.BytesIO())
    assert [ref.path for ref in refs] == ["array[1][0]", "array[1][1]"]
    assert np.array_equal(np.asarray(decode(refs[1].read())), 255 - pixels)


def test_tensors(pixels: np.ndarray) -> None:
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    assert np.array_equal(held(chw), pixels)
    assert np.array_equal(held((chw / 255).requires_grad_()), pixels)
    assert np.array_equal(held(chw[:1]), np.stack([pixels[:, :, 0]] * 3, axis=2))
    assert np.array_equal(held(chw[0]), np.stack([pixels[:, :, 0]] * 3, axis=2))
    refs = list_images(torch.stack([chw, 255 - chw]))
    assert [ref.path for ref in refs] == ["array[0][0]", "array[0][1]"]
    assert np.array_equal(np.asarray(decode(refs[1].read())), 255 - pixels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_every_float_type(dtype: torch.dtype) -> None:
    image = torch.zeros(3, 4, 4, dtype=dtype)
    image[0] = 1
    assert (held(image) == [255, 0, 0]).all()


BAD_ARRAYS: dict[str, tuple[np.ndarray | torch.Tensor, str]] = {
    "above 1": (np.full((4, 4), 1.5), r"\[0, 1\]"),
    "below 0": (np.full((4, 4, 3), -0.01, np.float32), r"\[0, 1\]"),
    "nan": (np.full((4, 4), np.nan), "NaN"),
    "infinite": (np.full((4, 4), np.inf), "infinite"),
    "int64": (np.zeros((4, 4), np.int64), "int64"),
    "uint16": (np.zeros((4, 4), np.uint16), "uint16"),
    "bool": (np.zeros((4, 4), bool), "bool"),
    "complex": (np.zeros((4, 4), complex), "complex"),
    "two channels": (np.zeros((4, 4, 2), np.uint8), "channels.* 2"),
    "five channels": (np.zeros((4, 4, 5), np.uint8), "channels.* 5"),
    "channels first": (np.zeros((3, 8, 9), np.uint8), "channels.* 9"),
    "tensor channels last": (torch.zeros(8, 9, 3), "channels.* 8"),
    "no rows": (np.zeros((0, 4, 3), np.uint8), "empty"),
    "no columns": (torch.zeros(3, 4, 0), "empty"),
    "1-d": (np.zeros(4, np.uint8), "2 to 4 dimensions, not 1"),
    "5-d": (np.zeros((1, 1, 1, 4, 4), np.uint8), "2 to 4 dimensions, not 5"),
    "names": (np.array(["a.png"]), "dimensions"),
    "no images": (np.zeros((0, 4, 4, 3), np.uint8), "no images"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_array_that_is_no_image_alone_says_why(kind: str) -> None:
    """Given alone it may be refused at once, or be a row; the words must say what is wrong."""
    array, words = BAD_ARRAYS[kind]
    with pytest.raises(UsageError, match=words):
        refs = list_images(array)
        raise UsageError("; ".join(reason(ref) for ref in refs))


@pytest.mark.parametrize("kind", [kind for kind, (array, _) in BAD_ARRAYS.items() if array.ndim in (2, 3)])
def test_array_that_is_no_image_is_a_row_beside_others(kind: str) -> None:
    array, words = BAD_ARRAYS[kind]
    good, bad = list_images([np.zeros((4, 4), np.uint8), array])
    assert reason(good) == ""
    assert bad.path == "array[1]"
    with pytest.raises(UsageError, match=words):
        raise UsageError(reason(bad))


def test_one_bad_image_of_a_batch_is_a_row() -> None:
    batch = torch.zeros(3, 3, 4, 4)
    batch[1, 0, 0, 0] = float("nan")
    assert [bool(reason(ref)) for ref in list_images(batch)] == [False, True, False]


@pytest.mark.timeout(60)
def test_picture_opened_but_not_loaded_may_be_given_many_times() -> None:
    """Pillow reads the file on first use; two threads must not do that at once."""
    stream, tags = io.BytesIO(), Image.Exif()
    tags[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG", exif=tags)
    expected = to_tensor(decode(stream.getvalue()))
    for _ in range(10):
        refs = list_images([Image.open(io.BytesIO(stream.getvalue()))] * 6)
        loaded = list(iter_loaded(refs, to_tensor, workers=6))
        assert [item.reason for item in loaded] == [""] * 6
        assert all(torch.equal(item.pixels, expected) for item in loaded)  # type: ignore[arg-type]


# ---- references in other processes ----


def test_every_reference_survives_pickling(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    members = {"b.png": png(1)}
    sources = [
        tmp_path / "a.png",
        *(write_archive(tmp_path / f"x{suffix}", members) for suffix in (".zip", ".tar", ".tar.gz")),
        Image.new("RGB", (2, 2), (1, 1, 1)),
        np.full((2, 2), 1, np.uint8),
    ]
    refs = list_images(sources)
    copies = pickle.loads(pickle.dumps(refs))
    assert [ref.path for ref in copies] == [ref.path for ref in refs]
    assert [value(ref) for ref in copies] == [0, 1, 1, 1, 1, 1]
    missing = pickle.loads(pickle.dumps(MissingRef("a", "gone")))
    assert reason(missing) == "gone"


USER_SCRIPT = """
import numpy as np, torch
from featdiff.data.batches import iter_loaded

def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

def run(refs):
    found = iter_loaded(refs, to_tensor, workers=3)
    return [(item.ref.path, item.digest, None if item.pixels is None else item.pixels.tolist(), item.reason)
            for item in found]
"""


@pytest.mark.timeout(120)
def test_all_kinds_are_read_in_a_spawned_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With archives already open in the parent, the child gives the same pixels, digests and reasons."""
    write(tmp_path, "a.png", "b.png")
    (tmp_path / "c.png").write_bytes(b"text")
    members = {f"{i}.png": png(i) for i in range(4)}
    archives = [write_archive(tmp_path / f"x{suffix}", members) for suffix in (".zip", ".tar", ".tar.gz")]
    memory = [Image.new("P", (2, 2)), torch.ones(3, 2, 2), np.full((2, 2), np.nan)]
    refs = list_images([tmp_path, *archives, *memory, tmp_path / "gone"])
    (tmp_path / "user_script.py").write_text(USER_SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)
    import user_script  # type: ignore[import-not-found]

    here = user_script.run(refs)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(user_script.run, (refs,))
    assert there == here
    assert len(here) == 3 + 3 * 4 + 3 + 1
    assert sum(bool(reason) for *_, reason in here) == 3
