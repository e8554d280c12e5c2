"""Damage to bytes: each mutator takes the bytes and a seeded generator, and returns other bytes."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence

from image_files import exif, rotated

Mutator = Callable[[bytes, random.Random], bytes]
#: Numbers at which parsers go wrong.
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_JPEG_START = b"\xff\xd8"
_PNG_START = b"\x89PNG\r\n\x1a\n"


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes] = (), mutators: Sequence[Mutator] = ()) -> bytes:
    """One to three mutations; ``others`` are files that may be spliced in."""
    chosen = list(mutators or EVERYWHERE)
    if others:
        chosen.append(lambda content, rng: splice(content, rng.choice(others), rng))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(chosen)(data, rng)
    return data


def _stretch(data: bytes, rng: random.Random) -> tuple[int, int]:
    """Start and end of a part: often a few bytes, at times much of the file."""
    start = rng.randrange(len(data) + 1)
    longest = rng.choice((4, 64, 1024, len(data)))
    return start, min(len(data), start + rng.randint(1, max(1, longest)))


# ---- for files of any kind ----


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 64)) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def delete(data: bytes, rng: random.Random) -> bytes:
    start, end = _stretch(data, rng)
    return data[:start] + data[end:]


def duplicate(data: bytes, rng: random.Random) -> bytes:
    start, end = _stretch(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 1, 20)) + data[end:]


def zero(data: bytes, rng: random.Random) -> bytes:
    start, end = _stretch(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def noise(data: bytes, rng: random.Random) -> bytes:
    start, end = _stretch(data, rng)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def swap(data: bytes, rng: random.Random) -> bytes:
    first, second, third = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:first] + data[second:third] + data[first:second] + data[third:]


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((bytes(100), rng.randbytes(1000), data))


def number(data: bytes, rng: random.Random) -> bytes:
    """An extreme number in place of two or four bytes, half of the time in the first hundred bytes."""
    kind = rng.choice(("<H", ">H", "<I", ">I"))
    size = struct.calcsize(kind)
    end = len(data) if rng.random() < 0.5 else min(len(data), 100)
    start = rng.randrange(max(1, end - size + 1))
    value = rng.choice(EXTREMES) & (256**size - 1)
    return data[:start] + struct.pack(kind, value) + data[start + size :]


def splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """The beginning of one file and the end of another."""
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


EVERYWHERE: tuple[Mutator, ...] = (flip_bits, truncate, delete, duplicate, zero, noise, swap, append, number)


# ---- for image files ----


def png_chunks(data: bytes) -> list[bytes]:
    """The chunks of a PNG file, each with its length and checksum."""
    chunks = []
    start = len(_PNG_START)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        chunks.append(data[start:end])
        start = end
    return chunks


def png(data: bytes, rng: random.Random) -> bytes:
    """Another order, length or content of a chunk of a PNG file; the checksum fits the content."""
    chunks = png_chunks(data)
    if not data.startswith(_PNG_START) or not chunks:
        return flip_bits(data, rng)

    i = rng.randrange(len(chunks))
    how = rng.choice(("drop", "repeat", "swap", "length", "content", "content"))
    if how == "drop":
        del chunks[i]
    elif how == "repeat":
        chunks.insert(i, chunks[i])
    elif how == "swap":
        rng.shuffle(chunks)
    elif how == "length":
        chunks[i] = struct.pack(">I", rng.choice(EXTREMES)) + chunks[i][4:]
    else:
        body = chunks[i][4:8] + number(flip_bits(chunks[i][8:-4], rng), rng)
        chunks[i] = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return _PNG_START + b"".join(chunks)


def jpeg_segment(data: bytes, rng: random.Random) -> bytes:
    """Another length of a segment of a JPEG file, or another marker."""
    markers = [i for i in range(2, len(data) - 4) if data[i] == 0xFF and data[i + 1] not in (0, 0xFF)]
    if not data.startswith(_JPEG_START) or not markers:
        return number(data, rng)

    start = rng.choice(markers)
    if rng.random() < 0.5:
        return data[: start + 2] + struct.pack(">H", rng.randrange(65536)) + data[start + 4 :]
    return data[: start + 1] + bytes([rng.randrange(256)]) + data[start + 2 :]


def jpeg_exif(data: bytes, rng: random.Random) -> bytes:
    """A block of EXIF of any tags, types and counts at the beginning of a JPEG file."""
    if not data.startswith(_JPEG_START):
        return number(data, rng)

    entries = [rotated(rng.choice((0, 1, 3, 6, 8, 9, 65535)))]
    for _ in range(rng.randrange(6)):
        tag = rng.choice((0x010F, 0x0112, 0x8769, 0x8825, 0xA005, rng.randrange(65536)))
        entries.append((tag, rng.randrange(16), rng.choice(EXTREMES), rng.randbytes(rng.randrange(12))))
    block = exif(*entries)
    if rng.random() < 0.3:
        block = flip_bits(block, rng)
    return _JPEG_START + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


IN_IMAGES: tuple[Mutator, ...] = (*EVERYWHERE, png, jpeg_segment, jpeg_exif)
