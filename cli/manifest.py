"""``featdiff manifest``."""

from __future__ import annotations

from pathlib import Path

import click

from .main import EXIT_UNREADABLE
from .options import quiet_option
from .progress import list_unreadable, saying
from .sources import every_option
from .speech import say


@click.command("manifest")
@click.argument("images", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    default="manifest.parquet",
    show_default=True,
    metavar="FILE",
    help="A Parquet file, or a URL.",
)
@every_option
@quiet_option
def command(images: tuple[str, ...], output: str, every: float | None, quiet: bool) -> int:
    """List IMAGES in a Parquet file of id, uri and size, sorted by uri, for featdiff score --manifest.

    IMAGES are what featdiff score takes: files, folders, globs, archives, URLs, or - for paths on stdin. Each is listed
    once, and none is opened but archives, videos and Parquet files.

    \b
    Example: featdiff manifest images/ -o manifest.parquet
    """
    from itertools import chain

    from featdiff.data.references import iter_images
    from featdiff.data.streams import is_stream
    from featdiff.exceptions import UsageError
    from featdiff.files.remote import is_url
    from featdiff.serving.manifest import write_manifest

    if not is_url(output) and not Path(output).absolute().parent.is_dir():
        raise UsageError(f"no folder {Path(output).parent} for {Path(output).name}", argument="output")
    if any(map(is_stream, images)):
        raise UsageError("a camera stream has no end: give it to featdiff score itself")
    with saying("listing images", quiet):
        # one source after the other: of several at once, iter_images would keep all names in memory
        written = write_manifest(chain.from_iterable(iter_images(image, every=every) for image in images), output)

    copies = f", {written.copies:,} named more than once" if written.copies else ""
    say(f"{written.rows:,} {'entry' if written.rows == 1 else 'entries'} in {output}{copies}", quiet)
    if written.missing_count:
        say(f"{written.missing_count:,} of them hold no image; scoring gives them a row with a reason:", quiet)
        list_unreadable(written.missing, quiet, what="")
    return EXIT_UNREADABLE if written.missing_count else 0
