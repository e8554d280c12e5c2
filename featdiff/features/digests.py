"""Where the vectors of many images are: a sorted table of digests, of which each takes 24 bytes of memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

#: Length of a digest.
DIGEST_BYTES = 16
# New digests stay in a dict until there are so many; each takes ten times the memory there.
_NEW = 500_000
_HALF = np.dtype(">u8")

#: Shard and row.
Place = tuple[int, int]


class DigestIndex:
    """Digest -> shard and row. Of several places of one digest, the one that was added first counts.

    Examples
    --------
    >>> from featdiff.features.digests import DigestIndex
    >>> index = DigestIndex()
    >>> index.add_shards([(0, b"a" * 16 + b"b" * 16), (1, b"b" * 16)])
    >>> index.add(b"c" * 16, (2, 0))
    >>> index.find(b"b" * 16), index.find(b"c" * 16), index.find(b"d" * 16), len(index)
    ((0, 1), (2, 0), None, 3)
    >>> index.forget(0)
    >>> index.find(b"a" * 16), index.find(b"b" * 16)
    (None, (1, 0))
    """

    def __init__(self) -> None:
        self._new: dict[bytes, Place] = {}
        # halves of each digest, sorted, and places; replaced at once, for other threads look digests up
        self._table = np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty((0, 2), np.int32)
        self._forgotten: set[int] = set()

    def __len__(self) -> int:
        """How many different digests there are."""
        first, second, places = self._table
        lives = ~np.isin(places[:, 0], list(self._forgotten))
        first, second = first[lives], second[lives]
        repeated = (first[1:] == first[:-1]) & (second[1:] == second[:-1])
        return len(first) - int(repeated.sum()) + sum(self._sorted(digest) is None for digest in self._new)

    def find(self, digest: bytes) -> Place | None:
        """Its place; None if it has none."""
        place = self._new.get(digest)
        if place is not None and place[0] not in self._forgotten:
            return place
        return self._sorted(digest)

    def _sorted(self, digest: bytes) -> Place | None:
        if len(digest) != DIGEST_BYTES:
            return None
        first, second, places = self._table
        head, tail = np.uint64(int.from_bytes(digest[:8])), np.uint64(int.from_bytes(digest[8:]))
        at = int(np.searchsorted(first, head))
        while at < len(first) and first[at] == head:
            shard, row = places[at].tolist()
            if second[at] == tail and shard not in self._forgotten:
                return shard, row
            at += 1
        return None

    def find_all(self, digests: Sequence[bytes]) -> np.ndarray:
        """Places (N, 2) of N digests; -1 where there is none."""
        where = np.full((len(digests), 2), -1, np.int32)
        for i, digest in enumerate(digests):
            place = self.find(digest)
            if place is not None:
                where[i] = place
        return where

    def add(self, digest: bytes, place: Place) -> None:
        """Add one that :meth:`find` does not find."""
        if len(self._new) >= _NEW:
            self._fold()
        self._new[digest] = place

    def add_shards(self, shards: Iterable[tuple[int, bytes]]) -> None:
        """Add whole shards: the number of each, and the digests of its rows, end to end."""
        numbers: list[int] = []
        contents: list[bytes] = []
        for number, content in shards:
            numbers.append(number)
            contents.append(content)
        lengths = [len(content) // DIGEST_BYTES for content in contents]
        places = np.empty((sum(lengths), 2), np.int32)
        places[:, 0] = np.repeat(numbers, lengths)
        places[:, 1] = np.concatenate([np.arange(length) for length in lengths] or [np.empty(0)])
        self._merge(b"".join(contents), places)

    def forget(self, shard: int) -> None:
        """Drop what is in a shard; what another shard holds as well is found there."""
        self._forgotten.add(shard)

    def _fold(self) -> None:
        places = np.array(list(self._new.values()), np.int32).reshape(-1, 2)
        self._merge(b"".join(self._new), places)
        self._new = {}  # last: until now they are found here

    def _merge(self, content: bytes, places: np.ndarray) -> None:
        halves = np.frombuffer(content, _HALF).reshape(-1, 2)
        before, before_second, before_places = self._table
        first = np.concatenate([before, halves[:, 0].astype(np.uint64)])
        second = np.concatenate([before_second, halves[:, 1].astype(np.uint64)])
        order = np.lexsort((second, first))  # stable: what was added first stays first
        self._table = first[order], second[order], np.concatenate([before_places, places])[order]
