"""File names of any bytes, in rows, error lines and lists."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import random
import re
from pathlib import Path

from .harness import Target
from .place import Place, command, parse_jsonl, require

#: Damaged and good files of a case.
FILES = 8
_PIECES = (
    *("a", "b c", "é", "雪", "\u202egnp", "\u200b", "\ufeff", "\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\x7f", "\b\b"),
    *("\n", "\r", "\t", "\r\n", "\v", "\u2028", '"', "'", ",", ";", "%s", "{0}", "[x]", "*", "?", "\\", "\\n", "$(x)"),
    *("=1+1", "+1", "-1", "@x", "=cmd|' /C calc'!A0", "-", "--force", "..", "~", "#", "nan", "archive.zip", ".png"),
)
#: What no terminal should get: control characters but for the line break, and marks that turn text round.
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def make(rng: random.Random, folder: Path, place: Place) -> None:
    images = folder / "images"
    images.mkdir()
    for number in range(FILES):
        good = rng.choice(place.good).read_bytes()
        content = good + bytes([number]) if rng.random() < 0.5 else good[:30]  # after its end, a PNG file may go on
        with contextlib.suppress(OSError):  # a name that this file system does not take
            Path(os.fsdecode(os.fsencode(images) + b"/" + _name(rng))).write_bytes(content)


def _name(rng: random.Random) -> bytes:
    """A name of up to 255 bytes that ends like an image."""
    kind = rng.random()
    if kind < 0.2:
        stem = rng.randbytes(rng.randrange(1, 30))
    elif kind < 0.3:
        stem = rng.choice("ax=\u96ea").encode() * 251
    else:
        stem = "".join(rng.choice(_PIECES) for _ in range(rng.randint(1, 4))).encode()
    stem = stem.replace(b"/", b"_").replace(b"\0", b"_")[:251]
    return (b"x" if stem.startswith(b".") else b"") + stem[:250] + b".png"


def check(folder: Path, place: Place) -> int:
    images = folder / "images"
    count = len(list(images.iterdir()))
    options = ("-m", place.model, "--weights", place.weights)
    expected = sorted(place.detector.score(str(images)).path)
    require(len(expected) == count, f"{len(expected)} rows for {count} files")

    with contextlib.chdir(images):  # so that a name stands at the beginning of its cell
        for format_ in ("csv", "jsonl", "table"):
            done = command("score", *_arguments(images), *options, "--format", format_)
            _check_terminal(done.stderr)
            if format_ == "csv":
                _check_csv(done.stdout_bytes, count)
            elif format_ == "jsonl":
                paths = [row["path"] for row in parse_jsonl(done.stdout_bytes.decode())]
                require(len(paths) == count, f"jsonl: {len(paths)} rows for {count} files")
            else:
                _check_terminal(done.stdout)
                require(len(done.stdout.splitlines()) == count + 1, "the table has lines too many")

        for name in _arguments(images):  # errors that name a file
            for arguments in (("info", name), ("train", "--config", name), ("score", "x.png", "-m", name)):
                done = command(*arguments)
                _check_terminal(done.stderr)
                require(len(done.stderr.splitlines()) == 1, f"an error of several lines: {done.stderr!r}")
    return count


def _arguments(images: Path) -> list[str]:
    """The names as arguments, ``./`` before those that look like options or patterns."""
    names = sorted(os.listdir(images))
    return [f"./{name}" if name.startswith("-") else name for name in names]


def _check_terminal(text: str) -> None:
    found = _CONTROL.search(text)
    require(
        found is None,
        f"a control character reaches the terminal: {text[max(0, found.start() - 30) :][:60]!r}" if found else "",
    )


def _check_csv(data: bytes, count: int) -> None:
    """It parses back, and no cell of text is a formula or holds an escape sequence."""
    rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    require(len(rows) == count, f"csv: {len(rows)} rows for {count} files")
    for row in rows:
        require(None not in row and None not in row.values(), f"csv: a row of another length: {row}")
        require(row["status"] in ("ok", "unreadable", "error"), f"csv: {row}")
        for cell in (row["path"], row["reason"]):
            require(not cell.startswith(("=", "+", "-", "@")), f"csv: a cell is a formula: {cell!r}")
            require("\x1b" not in cell, f"csv: a cell holds an escape sequence: {cell!r}")


TARGET = Target("file_names", make, check)
