"""Where rows go, and in which format."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_BY_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv", ".txt": "table"}


def guess_format(output: Path | None, asked: str | None) -> str:
    """The format that was asked for, or that of a file's name; on a terminal a table, else CSV."""
    if asked:
        return asked
    if output is not None:
        return _BY_SUFFIX.get(output.suffix.lower(), "csv")
    return "table" if sys.stdout.isatty() else "csv"


@contextmanager
def open_output(output: Path | None) -> Iterator[IO[bytes]]:
    """A file, or standard output."""
    if output is None:
        yield sys.stdout.buffer
        return
    with output.open("wb") as file:
        yield file
