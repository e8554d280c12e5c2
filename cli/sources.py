"""The images of a run: all of a list, of a listing that goes on while the first are scored, or of a stream."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import click

from .signals import ending_by_signal

if TYPE_CHECKING:
    from collections.abc import Callable

    from featdiff import Scores
    from featdiff.data.listing import Listing
    from featdiff.data.references import ImageRef
    from featdiff.data.streams import Stream

every_option = click.option(
    "--every", type=float, metavar="SECONDS", help="Of videos and streams, one frame in so many seconds [each frame]."
)

#: More than any listing has: how many images there will be is not known.
UNKNOWN = sys.maxsize


@dataclass
class Named:
    """Images as they were named on the command line.

    ``whole``: something needs the list of all of them, so that even remote ones are listed first; ``every``: of videos
    and streams, one frame in so many seconds; ``stream``: the camera stream that was named in their place.
    """

    images: tuple[str, ...]
    whole: bool
    every: float | None = None
    refs: list[ImageRef] = field(default_factory=list)
    listing: Listing | None = None
    stream: Stream | None = None

    @property
    def total(self) -> int:
        """How many there are, or :data:`UNKNOWN`."""
        return UNKNOWN if self.listing or self.stream else len(self.refs)

    def check(self) -> None:
        """Refuse a command that names none."""
        if not self.images:
            raise click.UsageError("Missing argument 'IMAGES...', or --features FILE.")

    def find(self) -> None:
        """List them, remote ones as far as is needed to see that there are any."""
        from featdiff.data.listing import Listing
        from featdiff.data.references import iter_images, list_images
        from featdiff.exceptions import UsageError
        from featdiff.files.remote import is_url

        if self._names_stream():
            self._connect()
            return
        if any(map(is_url, self.images)) and not self.whole:
            self.listing = Listing(iter_images(list(self.images), every=self.every))
            self.listing.check()
            return
        self.refs = list_images(list(self.images), every=self.every)
        if not self.refs:
            raise UsageError("there are no paths on standard input")

    def _names_stream(self) -> bool:
        from featdiff.data.streams import answers_with_stream, is_stream
        from featdiff.exceptions import UsageError

        if not any(map(is_stream, self.images)) and not (len(self.images) == 1 and answers_with_stream(*self.images)):
            return False
        if len(self.images) > 1:
            raise UsageError("a camera stream has no end: score it alone, and others by a command of their own")
        if self.whole:
            raise UsageError("--report, --figure and --copy-to need all images again, and a stream gives each once")
        return True

    def _connect(self) -> None:
        """Wait for the first frame (``FeatdiffError`` if there is none)."""
        from featdiff.data.streams import Stream
        from featdiff.exceptions import FeatdiffError

        self.stream = Stream(self.images[0], self.every)
        if problem := self.stream.problem():
            raise FeatdiffError(f"{self.stream.label}: {problem}")

    def scored(self, score: Callable[..., Iterator[Scores]], start: int, bars: Callable[..., None]) -> Iterator[Scores]:
        """What ``score`` gives of the images from a number on; a stream ends by Ctrl-C as well, and keeps its rows."""
        if not self.stream:
            rest = self.listing or self.refs[start:]  # those before were taken from a listing by names()
            # of a listing the total is not known
            yield from score(rest, (lambda stage, done, _: bars(stage, done, 0)) if self.listing else bars)
            return

        count = 0
        with ending_by_signal(self.stream.stop):
            for frames in self.stream:
                yield from score(frames, None)
                count += len(frames)
                bars("scoring", count, 0)

    def names(self, count: int) -> Iterator[str]:
        """Of the first so many, which are taken from a listing."""
        from featdiff.exceptions import UsageError

        if self.stream and count:
            raise UsageError("a camera stream cannot be gone on with: drop --resume, or name another file with -o")
        return (ref.path for ref in (islice(self.listing, count) if self.listing else self.refs[:count]))
