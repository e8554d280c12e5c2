"""Files, folders and globs become an ordered list of references, each of which can be read."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import (
    below,
    ordinary_user,
    png,
    posix,
    reason_of,
    value,
    without_rights,
    write,
    write_archive,
    write_zip,
)
from PIL import Image

from featdiff.data.references import (
    IMAGE_SUFFIXES,
    FileRef,
    MissingRef,
    list_images,
    printable,
)
from featdiff.exceptions import UsageError

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
    assert reason_of(refs[1])


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
    assert [reason_of(ref) for ref in refs] == reasons


@pytest.mark.parametrize(
    "source", [None, 3, {"a": 1}, [["a.png"]], {"a.png"}, object(), [None]], ids=lambda s: type(s).__name__
)
def test_unknown_kinds_are_usage_errors_that_say_what_is_taken(source: object) -> None:
    with pytest.raises(UsageError, match="give paths, PIL images, arrays, tensors, bytes or open files"):
        list_images(source)


# ---- files that cannot be read ----


@posix
def test_broken_link_is_a_row_with_a_reason(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "c.jpg")
    refs = list_images(tmp_path)
    assert below(refs, tmp_path) == ["a.png", "b.jpg", "c.jpg"]
    assert [reason_of(ref) for ref in refs] == ["", "no such file or directory", os.strerror(40).lower()]
    assert below(list_images(tmp_path / "b.jpg"), tmp_path) == ["b.jpg"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.timeout(20)
def test_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    os.mkfifo(tmp_path / "y.zip")
    folder = list_images(tmp_path)
    assert below(folder, tmp_path) == ["x.jpg"]
    refs = folder + list_images(tmp_path / "x.jpg") + list_images(tmp_path / "y.zip")
    assert [reason_of(ref) for ref in refs] == ["not a regular file"] * 3


def test_folder_in_place_of_a_file_has_a_reason(tmp_path: Path) -> None:
    """A file can be replaced between listing and reading."""
    (tmp_path / "x.jpg").mkdir()
    assert "folder" in reason_of(FileRef("x.jpg", str(tmp_path / "x.jpg")))


def test_file_deleted_after_listing_has_a_reason(tmp_path: Path) -> None:
    (ref,) = list_images(write(tmp_path, "a.png"))
    (tmp_path / "a.png").unlink()
    assert reason_of(ref) == "no such file or directory"


@posix
def test_file_without_permission_has_a_reason() -> None:
    with ordinary_user() as folder:
        write(folder, "good.png", "secret.png")
        (folder / "good.png").chmod(0o644)
        (folder / "secret.png").chmod(0)
        with without_rights():
            good, secret = list_images(folder)
            assert (value(good), reason_of(secret)) == (0, "permission denied")


@posix
def test_folder_and_archive_without_permission_are_rows() -> None:
    with ordinary_user() as folder:
        write(folder, "a.png", "closed/b.png", "z.png")
        write_zip(folder / "closed.zip", {"c.png": png()}).chmod(0)
        (folder / "closed").chmod(0)
        try:
            with without_rights():
                refs = list_images([folder, folder / "closed.zip"])
                reasons = {ref.path.removeprefix(f"{folder}/"): reason_of(ref) for ref in refs}
        finally:
            (folder / "closed").chmod(0o755)
    assert set(reasons) == {"a.png", "z.png", "closed", "closed.zip"}
    assert reasons["a.png"] == reasons["z.png"] == ""
    for name in ("closed", "closed.zip"):
        assert "permission denied" in reasons[name].lower()


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
    assert reason_of(missing) == "gone"


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
