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
        if self._forgotten:
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
        table = [column.copy() for column in self._table]  # other threads look up in the old one
        for number, content in shards:
            halves = np.frombuffer(content, _HALF).reshape(-1, 2)
            start = len(table[0])
            for column in table:  # grown where it lies; many small parts would leave holes as large as themselves
                column.resize((start + len(halves), *column.shape[1:]), refcheck=False)
            table[0][start:], table[1][start:] = halves.T
            table[2][start:] = np.stack([np.full(len(halves), number), np.arange(len(halves))], axis=1)
        self._sort(table)

    def forget(self, shard: int) -> None:
        """Drop what is in a shard; what another shard holds as well is found there."""
        self._forgotten.add(shard)

    def _fold(self) -> None:
        halves = np.frombuffer(b"".join(self._new), _HALF).reshape(-1, 2).astype(np.uint64)
        places = np.array(list(self._new.values()), np.int32)
        new = (halves[:, 0], halves[:, 1], places)
        self._sort([np.concatenate((self._table[i], new[i])) for i in range(len(new))])
        self._new = {}  # last: until now they are found here

    def _sort(self, table: list[np.ndarray]) -> None:
        """Make the table of these heads, tails and places; the list gives them up, lest all be in memory twice."""
        order = _ascending(table[0], table[1])
        for i in range(len(table)):
            table[i] = table[i][order]
        self._table = table[0], table[1], table[2]


def _ascending(heads: np.ndarray, tails: np.ndarray) -> np.ndarray:
    """The order in which digests ascend; of equal ones, that which was added first comes first.

    Sorting by heads alone takes a sixth of the time, and hardly any memory; few of them are equal.
    """
    order = np.argsort(heads)
    ascending = heads[order]
    equal = ascending[1:] == ascending[:-1]
    if equal.any():
        tied = np.flatnonzero(np.append(equal, False) | np.append(False, equal))
        some = order[tied]
        order[tied] = some[np.lexsort((some, tails[some], heads[some]))]
    return order
