"""The images of a run: all of a list, or of a listing that goes on while the first are scored."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from featdiff.data.listing import Listing
    from featdiff.data.references import ImageRef

every_option = click.option(
    "--every", type=float, metavar="SECONDS", help="Of videos, one frame in so many seconds [each frame]."
)

#: More than any listing has: how many images there will be is not known.
UNKNOWN = sys.maxsize


@dataclass
class Named:
    """Images as they were named on the command line.

    ``whole``: something needs the list of all of them, so that even remote ones are listed first; ``every``: of videos,
    one frame in so many seconds.
    """

    images: tuple[str, ...]
    whole: bool
    every: float | None = None
    refs: list[ImageRef] = field(default_factory=list)
    listing: Listing | None = None

    @property
    def total(self) -> int:
        """How many there are, or :data:`UNKNOWN`."""
        return UNKNOWN if self.listing else len(self.refs)

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

        if any(map(is_url, self.images)) and not self.whole:
            self.listing = Listing(iter_images(list(self.images), every=self.every))
            self.listing.check()
            return
        self.refs = list_images(list(self.images), every=self.every)
        if not self.refs:
            raise UsageError("there are no paths on standard input")

    def names(self, count: int) -> Iterator[str]:
        """Of the first so many, which are taken from a listing."""
        return (ref.path for ref in (islice(self.listing, count) if self.listing else self.refs[:count]))

    def rest(self, start: int) -> Listing | list[ImageRef]:
        """Those from a number on, whose forerunners were taken by :meth:`names`."""
        return self.listing or self.refs[start:]

    def progress(self, bars: Callable[[str, int, int], None]) -> Any:
        """What reports how far the run is; of a listing the total is not known."""
        if not self.listing:
            return bars
        return lambda stage, done, total: bars(stage, done, 0)
