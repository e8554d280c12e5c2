"""Where rows and reports go, and in which format."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .speech import say
from .tables import output_width

if TYPE_CHECKING:
    from featdiff import Scores


class RemoteFile(type(Path())):  # type: ignore[misc]
    """A file beside the cache that is put at a URL when it is whole.

    ``url``: where it goes; empty in paths that were made from this one.
    """

    url = ""


def output_file(name: str) -> Path | None:
    """The file that ``-o`` names: of a URL a :class:`RemoteFile`; None for ``-``, standard output."""
    from featdiff.files.remote import is_url

    if not is_url(name):
        return None if name == "-" else Path(name)

    from featdiff.files.cache import default_cache
    from featdiff.files.remote import check_writable

    check_writable(name)  # better asked before the long work
    folder = default_cache() / "outputs" / hashlib.sha256(name.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    file = RemoteFile(folder / name.rpartition("/")[2])
    file.url = name
    return file


def deliver(output: Path | None, quiet: bool = False) -> None:
    """Put a whole file at the URL that it is for; if that fails, it stays where it is (``FeatdiffError``)."""
    from featdiff.exceptions import FeatdiffError, one_line
    from featdiff.files.remote import put_file

    url = getattr(output, "url", "")
    if output is None or not url:
        return
    try:
        put_file(output, url)
    except (OSError, FeatdiffError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise FeatdiffError(f"{url}: {reason}; all rows are in {output}: move them there yourself") from None
    output.unlink()
    say(f"All rows are in {url}", quiet)


#: Ending of a file of rows -> format.
ROWS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "table"}


def choose_format(output: Path | None, asked: str | None, endings: Mapping[str, str] = ROWS) -> str:
    """The format that was asked for, or that of a file's ending; without a file, a table on a terminal, else CSV.

    A name without an ending gets the first format of ``endings``; an ending that is not among them is refused
    (``UsageError``).
    """
    from featdiff.exceptions import UsageError

    if asked:
        return asked
    if output is None:
        return "table" if sys.stdout.isatty() else "csv"
    if not output.suffix:
        return next(iter(endings.values()))
    if output.suffix.lower() not in endings:
        raise UsageError(
            f"{output}: the ending {output.suffix} says no format: use {', '.join(endings)}, or name one with --format",
            argument="output",
        )
    return endings[output.suffix.lower()]


def is_stream(output: Path | None) -> bool:
    """Whether rows go to standard output, a device or a pipe, where nothing can be renamed."""
    return output is None or (output.exists() and not output.is_file() and not output.is_dir())


def write_rows(output: Path | None, format_: str, scores: Scores, raw_csv: bool = False) -> None:
    """Write all rows at once; a file is written whole or not at all."""
    from featdiff.files.atomic import write_output
    from featdiff.report.writers import open_writer

    data = io.BytesIO()
    width = output_width(0) if output is None else 0
    writer = open_writer(format_, data, raw_csv=raw_csv, width=width or None)
    writer.write(scores)
    writer.close()
    if output is None:
        sys.stdout.buffer.write(data.getvalue())
        sys.stdout.buffer.flush()
    else:
        write_output(output, data.getvalue())
        deliver(output, quiet=True)
