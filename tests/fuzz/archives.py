"""Zip and tar archives with hostile members, lying headers and damage."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zipfile
from pathlib import Path

from image_files import TAR_MODES, link

from featdiff.exceptions import UsageError

from .harness import Target
from .images import seeds
from .mutators import EXTREMES, mutate
from .place import Place, check_good, check_rows, require

#: Names that lead out of a folder, or into trouble.
HOSTILE = (
    "../outside.png",
    "a/../../outside.png",
    "/etc/outside.png",
    "/outside.png",
    "C:\\outside.png",
    "..\\outside.png",
    "\x1b[31mred.png",
    "=cmd.png",
    "line\nbreak.png",
    "x" * 300 + ".png",
    "deep/" * 200 + "x.png",
    "folder.png/inside.png",
)
#: Those of them that are said to be refused.
OUTSIDE = HOSTILE[:4]
_SUFFIXES = (".zip", ".zip", ".zip", *TAR_MODES)
_FACTS = "facts.json"


def make(rng: random.Random, folder: Path, place: Place) -> None:
    """One archive, and a file of facts: which members are good, and which need a reason."""
    members = {f"good/{file.name}": file.read_bytes() for file in place.good}
    files = seeds()
    for name in rng.sample(sorted(files), 3):
        members[f"damaged/{name}"] = mutate(files[name], rng)
    hostile = rng.sample(HOSTILE, rng.randrange(4))
    for name in hostile:
        members[name] = rng.choice(list(files.values()))

    suffix = rng.choice(_SUFFIXES)
    data = _zip(members, rng) if suffix == ".zip" else _tar(members, suffix, rng)
    good = list(members)[: len(place.good)]
    outside = [name for name in hostile if name in OUTSIDE]

    damage = rng.choice(("none", "none", "bytes", "bytes", "sizes", "cut"))
    if damage == "cut" and suffix == ".tar":
        data = data[: _last_header(data) + 512 + 10]  # the header of the last member, and the first of its bytes
    elif damage == "sizes":
        data = _lying_sizes(data, suffix, rng)
        good = []
    elif damage != "none":
        data = mutate(data, rng)
        good = []

    (folder / f"archive{suffix}").write_bytes(data)
    (folder / _FACTS).write_text(json.dumps({"good": good, "outside": outside if good else []}))


def _zip(members: dict[str, bytes], rng: random.Random) -> bytes:
    stream = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, data)
        if rng.random() < 0.2:
            archive.writestr("damaged/bomb.png", bytes(rng.choice((1 << 20, 64 << 20))), zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def _tar(members: dict[str, bytes], suffix: str, rng: random.Random) -> bytes:
    stream = io.BytesIO()
    layout = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=stream, mode=TAR_MODES[suffix], format=layout) as archive:
        for info in rng.sample(_links(), 3):
            archive.addfile(info)
        for name, data in members.items():
            for _ in range(2 if name.startswith("damaged") and rng.random() < 0.2 else 1):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _links() -> list[tarfile.TarInfo]:
    """Members that are no files: links to themselves, to each other, to nothing and out of the archive; a device."""
    return [
        link("links/self.png", tarfile.SYMTYPE, "self.png"),
        link("links/hard.png", tarfile.LNKTYPE, "links/hard.png"),
        link("links/nothing.png", tarfile.LNKTYPE, "links/nowhere.png"),
        link("links/passwd.png", tarfile.SYMTYPE, "/etc/passwd"),
        link("links/up.png", tarfile.SYMTYPE, "../../../../etc/hostname"),
        link("links/device.png", tarfile.CHRTYPE),
        link("links/pipe.png", tarfile.FIFOTYPE),
    ]


def _headers(data: bytes) -> list[int]:
    return [start for start in range(0, len(data) - 511, 512) if data[start + 257 : start + 262] == b"ustar"]


def _last_header(data: bytes) -> int:
    return _headers(data)[-1]


def _lying_sizes(data: bytes, suffix: str, rng: random.Random) -> bytes:
    """Another size of a member, in a header whose checksum is right; compressed archives are damaged anywhere."""
    if suffix == ".zip":
        start = data.rfind(b"PK\x01\x02")
        at = start + rng.choice((20, 24))  # packed, or unpacked
        return data[:at] + struct.pack("<I", rng.choice(EXTREMES)) + data[at + 4 :]
    if suffix != ".tar":
        return mutate(data, rng)

    start = rng.choice(_headers(data))
    size = rng.choice((b"-0000000100\0", b"77777777777\0", b"\xff" * 12, b"\x80" + bytes(7) + b"\xff" * 4, b"0" * 12))
    header = bytearray(data[start : start + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


def check(folder: Path, place: Place) -> int:
    (archive,) = folder.glob("archive*")
    facts = json.loads((folder / _FACTS).read_text())
    try:
        scores = place.detector.score(str(archive))
    except UsageError as error:  # nothing in it could be listed
        require(not facts["good"] and str(archive) in str(error), str(error))
        return 0
    check_rows(scores)
    require(len(scores) > 0, "no row")

    rows = dict(zip(facts["good"], place.rows, strict=False))
    check_good(scores, rows)
    for row in scores:
        require("/links/" not in row.path or row.status != "ok", f"{row.path} is a link, and was scored")
    for name in facts["outside"]:
        listed = [row for row in scores if name.lstrip("/") in row.path]
        require(bool(listed), f"the member {name!r} is not listed")
        require(all(row.status != "ok" for row in listed), f"the member {name!r} was scored")
    return len(scores)


TARGET = Target("archives", make, check)
