"""A listing that goes on while its first images are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from ..exceptions import UsageError
from .image_refs import ImageRef, MissingRef


class Listing:
    """References as they are found; how many there will be is not known.

    Parameters
    ----------
    refs : iterable of ImageRef
        Read once.

    Examples
    --------
    >>> from featdiff.data.image_refs import FileRef
    >>> from featdiff.data.listing import Listing
    >>> listing = Listing(FileRef(f"{i}.png", f"{i}.png") for i in range(3))
    >>> [ref.path for ref in listing.first(2)], [ref.path for ref in listing]
    (['0.png', '1.png'], ['0.png', '1.png', '2.png'])
    """

    def __init__(self, refs: Iterable[ImageRef]) -> None:
        self._refs = iter(refs)
        self._seen: deque[ImageRef] = deque()  # looked at, and not given yet

    def __iter__(self) -> Iterator[ImageRef]:
        return self

    def __next__(self) -> ImageRef:
        return self._seen.popleft() if self._seen else next(self._refs)

    def first(self, count: int) -> list[ImageRef]:
        """The next so many, or all that are left; they will come all the same."""
        self._seen += islice(self._refs, max(0, count - len(self._seen)))
        return list(islice(self._seen, count))

    def check(self) -> None:
        """Refuse a listing that holds no image at all (``UsageError``)."""
        for ref in self._refs:
            self._seen.append(ref)
            if not isinstance(ref, MissingRef):
                return
        if not self._seen:
            raise UsageError("no images were named")
        if all(isinstance(ref, MissingRef) for ref in self._seen):
            first = self._seen[0]
            raise UsageError(f"{first.path}: {getattr(first, 'reason', '')}")
