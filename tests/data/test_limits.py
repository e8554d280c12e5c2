"""Limits: bytes of one entry, and memory of all that is decoded at once."""

from __future__ import annotations

import bz2
import io
import os
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, noise, png, posix, reason_of, to_tensor, value, write, write_tar, write_zip
from PIL import Image

from featdiff.data.batches import iter_loaded, load
from featdiff.data.decoding import decode, open_image
from featdiff.data.formats import memory_of
from featdiff.data.limits import MAX_BYTES, Budget
from featdiff.data.references import FileRef, HeldRef, ImageRef, TarRef, ZipRef, list_images
from featdiff.exceptions import UnreadableImage

GIB = 1 << 30


def refused(ref: ImageRef, max_bytes: int) -> str:
    loaded = load(ref, to_tensor, max_bytes=max_bytes)
    assert loaded.pixels is None
    return loaded.reason


def sparse(file: Path, size: int) -> Path:
    with file.open("wb") as stream:
        stream.truncate(size)
    return file


# ---- bytes of one entry ----


@pytest.mark.parametrize("suffix", ["", ".zip", ".tar", ".tar.gz", ".tar.bz2"])
def test_larger_entries_are_refused_and_say_why(tmp_path: Path, suffix: str) -> None:
    """Exactly the limit is read."""
    size = len(png())
    if suffix == ".zip":
        (ref,) = list_images(write_zip(tmp_path / "data.zip", {"a.png": png(3)}))
    elif suffix:
        (ref,) = list_images(write_tar(tmp_path / f"data{suffix}", {"a.png": png(3)}))
    else:
        (ref,) = list_images(write(tmp_path, "a.png"))
    assert refused(ref, size - 1) == f"{size} bytes, more than the limit of {size - 1} (max_bytes)"
    assert load(ref, to_tensor, max_bytes=size).reason == ""
    (streamed,) = iter_loaded([ref], to_tensor, max_bytes=size - 1)
    assert "more than the limit" in streamed.reason


def test_images_in_memory_and_items_of_datasets_have_the_limit_too(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    data = png()

    class Items:
        def __init__(self, item: object) -> None:
            self.item = item

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> object:
            return self.item

    items = [Items(data), Items(str(tmp_path / "a.png")), Items({"image": {"bytes": data, "path": None}})]
    for source in [data, io.BytesIO(data), *items, Items(io.BytesIO(data))]:
        (loaded,) = iter_loaded(list_images(source), to_tensor, max_bytes=len(data) - 1)
        assert "(max_bytes)" in loaded.reason
        (loaded,) = iter_loaded(list_images(source), to_tensor, max_bytes=len(data))
        assert loaded.reason == ""


def test_a_reference_of_the_users_own_has_the_limit_after_reading() -> None:
    class Own(ImageRef):
        def read(self) -> bytes:
            return png()

    assert "(max_bytes)" in refused(Own("x"), 10)
    assert load(Own("x"), to_tensor).reason == ""


@posix
def test_huge_sparse_file_is_refused_unread(tmp_path: Path) -> None:
    file = sparse(tmp_path / "a.png", 30 * GIB)
    start = time.perf_counter()
    assert (
        reason_of(FileRef("a.png", str(file)))
        == f"{30 * GIB:,} bytes, more than the limit of {MAX_BYTES:,} (max_bytes)"
    )
    assert time.perf_counter() - start < 5


def test_member_of_a_zip_that_is_larger_than_it_says_is_not_read_on(tmp_path: Path) -> None:
    """64 MB of zeros that claim to be 100 bytes."""
    archive = write_lying_zip(tmp_path / "data.zip", zipfile.ZIP_DEFLATED, 64 << 20)
    ref = ZipRef("a.png", str(archive), "a.png")
    assert ref.bytes_to_read() == 100
    assert added_memory(f"load(ZipRef('a', {str(archive)!r}, 'a.png'), None)") < 30e6
    assert "CRC" in reason_of(ref)


def write_lying_zip(archive: Path, method: int, size: int) -> Path:
    with zipfile.ZipFile(archive, "w", method) as file, file.open("a.png", "w") as stream:
        for _ in range(size >> 20):
            stream.write(bytes(1 << 20))
    data = bytearray(archive.read_bytes())
    start = data.index(b"PK\x01\x02")
    data[start + 24 : start + 28] = struct.pack("<I", 100)
    archive.write_bytes(data)
    return archive


def test_bzip2_in_a_zip_is_unpacked_little_by_little(tmp_path: Path) -> None:
    archive = write_lying_zip(tmp_path / "data.zip", zipfile.ZIP_BZIP2, 640 << 20)
    assert archive.stat().st_size < 10_000
    assert added_memory(f"load(ZipRef('a', {str(archive)!r}, 'a.png'), None)") < 300e6


def test_bzip2_and_lzma_in_a_zip_are_read(tmp_path: Path) -> None:
    data = encoded(noise(100, 100))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        with zipfile.ZipFile(tmp_path / f"{method}.zip", "w", method) as file:
            file.writestr("a.png", data)
        (ref,) = list_images(tmp_path / f"{method}.zip")
        assert ref.read() == data


def added_memory(code: str) -> float:
    """Bytes by which a line makes the memory of a new process grow at its largest."""
    lines = [
        "import resource",
        "from featdiff.data.batches import load",
        "from featdiff.data.references import *",
        "largest = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
        "before = largest()",
        code,
        "print(largest() - before)",
    ]
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return int(result.stdout) * 1024


def header_of_size(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header whose size is written as a signed binary number."""
    info = tarfile.TarInfo("b.png")
    info.type = kind
    header = bytearray(info.tobuf())
    header[124:136] = (size % (1 << 96)).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", [".tar", ".tar.bz2"])
@pytest.mark.parametrize("size", [-512, -1, -(10**9), 10**6, 10 * GIB])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_false_size_in_a_tar_is_a_row_and_members_before_it_are_kept(
    tmp_path: Path, suffix: str, size: int, kind: bytes
) -> None:
    whole = write_tar(tmp_path / "good.tar", {"a.png": png(7)}).read_bytes()
    data = whole[: 512 + 512] + header_of_size(size, kind) + png(8).ljust(512, b"\0") + bytes(1024)
    archive = tmp_path / f"bad{suffix}"
    archive.write_bytes(data if suffix == ".tar" else bz2.compress(data))

    refs = list_images(archive)
    assert (refs[0].path, value(refs[0])) == (f"{archive}/a.png", 7)
    assert len(refs) >= 2
    assert all(reason_of(ref) for ref in refs[1:])
    assert refs[-1].path == str(archive)
    assert "archive cannot be read to its end: " in reason_of(refs[-1])


def test_sparse_member_of_a_tar_has_the_limit(tmp_path: Path) -> None:
    """GNU tar writes a hole of any size in a few bytes."""
    info = tarfile.TarInfo("a.png")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % (5 * GIB)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    (ref,) = list_images(tmp_path / "a.tar")
    assert f"{5 * GIB:,} bytes, more than the limit" in reason_of(ref)


def test_a_stretch_of_a_tar_that_ends_early_is_a_row(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", {"a.png": png()})
    assert "ends in the middle of it" in reason_of(TarRef("x", str(archive), 512, 10**6))


# ---- memory of all that is decoded at once ----


def test_threads_wait_until_there_is_room() -> None:
    budget = Budget(100)
    now = most = 0
    lock = threading.Lock()

    def work(size: int) -> int:
        nonlocal now, most
        with budget.reading(5), budget.decoding(size):
            with lock:
                now += size
                most = max(most, now)
            time.sleep(0.005)
            with lock:
                now -= size
        return size

    sizes = [20, 30, 40, 10] * 10
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, sizes)) == sizes
    assert 40 < most <= 100


@pytest.mark.timeout(60)
def test_what_is_larger_than_the_budget_goes_alone_and_none_waits_for_ever() -> None:
    budget = Budget(100)
    inside: list[int] = []
    together: list[tuple[int, ...]] = []

    def work(size: int) -> None:
        with budget.reading(size // 4), budget.decoding(size):
            inside.append(size)
            together.append(tuple(inside))
            time.sleep(0.002)
            inside.remove(size)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [400, 10, 900, 300, 20, 20, 500, 10] * 5))
    assert len(together) == 40
    assert all(max(sizes) <= 100 or len(sizes) == 1 for sizes in together)


def test_an_error_gives_its_room_back() -> None:
    budget = Budget(100)
    with pytest.raises(ValueError, match="bad"), budget.reading(50), budget.decoding(200):
        raise ValueError("bad")
    with budget.reading(50), budget.decoding(50):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="measures as Linux does")
@pytest.mark.parametrize(("mode", "bytes_of_a_pixel"), [("RGBA", 8), ("I;16", 6)])
def test_memory_of_a_picture_is_told_by_its_header(tmp_path: Path, mode: str, bytes_of_a_pixel: int) -> None:
    side = 4000
    file = tmp_path / "a.png"
    Image.new(mode, (side, side)).save(file)
    need = memory_of(open_image(file.read_bytes()))
    assert need == bytes_of_a_pixel * side**2 + 24_000_000
    found = added_memory(f"from featdiff.data.decoding import decode; decode(open({str(file)!r}, 'rb').read())")
    assert found < need + 20e6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F"])
def test_conversion_by_strips_changes_no_pixel(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.random.default_rng(0).integers(0, 65536, (37, 53))
    if mode == "F":
        picture = Image.fromarray((grey / 65535).astype(np.float32))
    elif mode.startswith("I"):
        picture = Image.fromarray(grey.astype(np.int32 if mode == "I" else np.uint16))
        picture = picture.convert(mode) if mode != picture.mode else picture
    else:
        picture = noise(37, 53)
        picture = Image.merge("LAB", picture.split()) if mode == "LAB" else picture.convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray((grey // 256).astype(np.uint8)))
    whole = np.asarray(decode(picture))
    monkeypatch.setattr("featdiff.data.decoding._STRIP", 53 * 5)
    assert np.array_equal(np.asarray(decode(picture)), whole)


def test_grey_values_out_of_range_in_one_strip_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featdiff.data.decoding._STRIP", 100)
    values = np.zeros((20, 20), np.float32)
    values[19, 19] = 1.5
    with pytest.raises(UnreadableImage, match=r"grey values outside 0..1"):
        decode(Image.fromarray(values))


def test_images_read_ahead_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of large images is read no further than a few."""
    monkeypatch.setattr("featdiff.data.batches._WAITING", 4 * 40 * 40 * 3)
    made = 0

    def stream() -> object:
        nonlocal made
        for number in range(30):
            made += 1
            yield HeldRef(str(number), noise(40, 40, number))

    furthest = 0
    for done, item in enumerate(iter_loaded(stream(), to_tensor, workers=2, ahead=64)):  # type: ignore[arg-type]
        assert item.ref.path == str(done)
        furthest = max(furthest, made - done)
    assert 2 <= furthest <= 5
    assert made == 30


def test_a_forked_process_begins_with_nothing_held() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    code = (
        "import os\nfrom featdiff.data.limits import MEMORY\n"
        "with MEMORY.reading(MEMORY.limit), MEMORY.decoding(MEMORY.limit):\n"
        "    if child := os.fork():\n        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "    else:\n        os._exit(MEMORY._held)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "0\n"
