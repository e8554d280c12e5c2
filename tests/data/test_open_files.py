"""Bytes and open files as images; HEIC; several pages."""

from __future__ import annotations

import io
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded, noise, png, posix, reason, reason_of, to_tensor, value, write
from PIL import Image

from featdiff.data.batches import iter_loaded, load
from featdiff.data.datasets import is_map_style, iter_refs
from featdiff.data.decoding import decode
from featdiff.data.loaders import is_loader
from featdiff.data.references import HeldRef, list_images
from featdiff.exceptions import UsageError

KINDS = {"bytes": bytes, "bytearray": bytearray, "memoryview": memoryview, "BytesIO": io.BytesIO}


@pytest.mark.parametrize("kind", KINDS)
def test_content_of_a_file_is_an_image_everywhere(kind: str) -> None:
    """Alone, in a list, as items of a stream, and with labels."""
    make = KINDS[kind]
    label = "file" if kind == "BytesIO" else "bytes"
    for source in (make(png(7)), [make(png(7))]):
        assert not is_loader(source) and not is_map_style(source)
        (loaded,) = iter_loaded(list_images(source), to_tensor)
        assert (loaded.ref.path, loaded.reason) == (f"{label}[0]", "")
        assert loaded.pixels is not None and int(loaded.pixels.max()) == 7

    stream = (item for item in [make(png(1)), (make(png(2)), "label"), {"image": make(png(3))}])
    loaded_ = list(iter_loaded(iter_refs(stream), to_tensor))
    assert [int(item.pixels.max()) for item in loaded_ if item.pixels is not None] == [1, 2, 3]


def test_open_file_has_its_name_and_is_read_from_its_start(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        file.seek(20)
        (ref,) = list_images(file)
        assert ref.path == str(tmp_path / "a.png")
        for _ in range(2):
            (loaded,) = iter_loaded([ref], to_tensor)
            assert loaded.reason == ""
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            (loaded,) = iter_loaded(list_images(mapped), to_tensor)
            assert loaded.reason == ""
    assert "closed file" in reason_of(ref)


@posix
def test_stream_that_cannot_go_back_is_read_from_where_it_is() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as stream:
        stream.write(png(9))
    with os.fdopen(reading, "rb") as stream:
        (ref,) = list_images(stream)
        assert ref.path == "file[0]"
        assert value(ref) == 9


@posix
def test_stream_without_an_end_has_the_limit() -> None:
    with open("/dev/zero", "rb") as file:
        (loaded,) = iter_loaded(list_images(file), to_tensor, max_bytes=1000)
    assert loaded.reason == "more bytes than the limit of 1,000 (max_bytes)"


def test_two_open_files_of_one_name_are_two_images() -> None:
    files = [io.BytesIO(png(1)), io.BytesIO(png(2))]
    for file in files:
        file.name = "upload.png"  # type: ignore[attr-defined]
    loaded = list(iter_loaded(list_images([*files, files[0]]), to_tensor))
    assert [item.ref.path for item in loaded] == ["upload.png"] * 2
    assert [int(item.pixels.max()) for item in loaded if item.pixels is not None] == [1, 2]


class Awaited:
    filename = "upload.png"

    async def read(self, size: int = -1) -> bytes:
        return png()

    async def seek(self, place: int) -> None: ...


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (io.StringIO("text"), "a file opened as text: open it with mode 'rb'"),
        (b"", "empty file (0 bytes)"),
        (io.BytesIO(b"text"), "not an image in a format that can be decoded"),
        (memoryview(np.zeros((2, 2))), "not an image in a format that can be decoded"),
        (Awaited(), "its read() must be awaited: give the bytes that come of it"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_open_and_no_image_has_a_reason(source: object, words: str) -> None:
    (_, loaded) = iter_loaded(list_images([png(), source]), to_tensor)
    assert loaded.reason == words


@pytest.mark.parametrize("source", [None, 3, 1.5, object(), {"a": 1}, {b"a"}, print, torch.nn.Linear(1, 1)])
def test_what_cannot_be_an_image_is_one_clear_line(source: object) -> None:
    with pytest.raises(
        UsageError, match="^images cannot come from a .*; give paths, PIL images, arrays, tensors, bytes"
    ):
        list_images(source)


# ---- HEIC ----


def heic() -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 90))).save(stream, quality=100)
    return stream.getvalue()


def test_heic_is_read_where_its_package_is_installed() -> None:
    picture = decode(heic())
    assert (picture.mode, picture.size) == ("RGB", (64, 48))
    assert np.abs(np.asarray(picture).astype(int) - [200, 30, 90]).max() < 6


def test_heic_says_which_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic()
    from featdiff.data import formats

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    formats._can_open_heif.cache_clear()
    try:
        assert reason(data) == "a HEIC photograph; to read these: pip install 'featdiff[heif]'"
    finally:
        formats._can_open_heif.cache_clear()


# ---- several pages ----


def pages(*sizes: tuple[int, int], **options: object) -> bytes:
    first, *others = (noise(height, width, height) for height, width in sizes)
    return encoded(first, "TIFF", save_all=True, append_images=others, **options)


def test_several_pages_are_told_and_the_first_is_read() -> None:
    first = noise(20, 20, 20)
    loaded = load(HeldRef("x", pages((20, 20), (30, 30), (20, 20))), to_tensor)
    assert (loaded.reason, loaded.note) == ("", "page 1 of 3 was read")
    assert loaded.pixels is not None and torch.equal(loaded.pixels, to_tensor(first))


@pytest.mark.parametrize("data", [pages((20, 20)), encoded(noise()), encoded(noise(), "JPEG")])
def test_of_one_page_nothing_is_told(data: bytes) -> None:
    assert load(HeldRef("x", data), to_tensor).note == ""


def test_smaller_copies_are_no_pages() -> None:
    """As cameras and maps have; tag 254 marks them."""
    assert load(HeldRef("x", pages((40, 40), (20, 20), tiffinfo={254: 1})), to_tensor).note == ""
