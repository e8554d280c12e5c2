"""Small image files, archives and references for the tests of ``featdiff/data``."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featdiff.data.batches import load
from featdiff.data.decoding import decode
from featdiff.data.references import HeldRef, ImageRef

WHITE = (255, 255, 255)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8 pixels of an RGB picture."""
    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def never(image: Image.Image) -> torch.Tensor:
    pytest.fail("this picture must not be decoded")


def encoded(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def pixels_of(data: bytes | Image.Image, **options: Any) -> np.ndarray:
    """(H, W, 3) uint8."""
    image = decode(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def colours(data: bytes | Image.Image) -> list[tuple[int, ...]]:
    """The pixels of the top row."""
    return [tuple(int(value) for value in pixel) for pixel in pixels_of(data)[0]]


def reason(data: bytes | Image.Image, **options: Any) -> str:
    loaded = load(HeldRef("x", data), to_tensor, **options)
    assert (loaded.pixels is None) == bool(loaded.reason)
    return loaded.reason


def noise(height: int = 40, width: int = 40, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def grey_refs(count: int) -> list[ImageRef]:
    """Pictures of grey 0, 1, 2 ..."""
    return [HeldRef(f"{i}", Image.new("RGB", (2, 2), (i, i, i))) for i in range(count)]


def png_header(width: int, height: int, depth: int = 8, rows: bytes = bytes(64)) -> bytes:
    """An RGB PNG file that claims a size, whatever pixels it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A little-endian EXIF block of (tag, type, count, value bytes), whether or not they make sense."""
    body, values = struct.pack("<H", len(entries)), b""
    first = 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        inline = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", first + len(values))
        body += struct.pack("<HHI", tag, kind, count) + inline
        values += value if len(value) > 4 else b""
    return b"Exif\0\0II*\0\x08\0\0\0" + body + bytes(4) + values


def rotated(orientation: int) -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack("<H", orientation)


posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX file names and links")
TAR_MODES = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


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


def reason_of(ref: ImageRef) -> str:
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
