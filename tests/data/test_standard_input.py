"""Paths on standard input."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from image_files import (
    below,
    png,
    reason_of,
    value,
    write,
    write_zip,
)

from featdiff.data.references import (
    list_images,
)

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
    assert [reason_of(ref) for ref in refs] == ["no such file or folder"]


def test_zero_bytes_on_stdin_are_a_row(tmp_path: Path) -> None:
    """As from ``find -print0``, or from a binary file by mistake."""
    (ref,) = list_images("-", io.BytesIO(b"a.png\0b.png"))
    assert reason_of(ref) == "no such file or folder"


def test_dash_as_a_path_object_is_a_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").write_bytes(png(3))
    (ref,) = list_images(Path("-"), io.BytesIO(b"nothing"))
    assert value(ref) == 3
