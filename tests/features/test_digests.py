"""The index of a feature store: a sorted table that gives what a dict would."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from featdiff.features import digests
from featdiff.features.digests import DIGEST_BYTES, DigestIndex


def digest(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=DIGEST_BYTES).digest()


@pytest.mark.parametrize("new", [1, 7, 1000])
def test_it_finds_what_a_dict_finds(monkeypatch: pytest.MonkeyPatch, new: int) -> None:
    monkeypatch.setattr(digests, "_NEW", new)
    rng = np.random.default_rng(0)
    index = DigestIndex()
    known: dict[bytes, tuple[int, int]] = {}
    shards = []
    for shard in range(5):
        numbers = rng.integers(0, 40, 20)  # many in several shards
        shards.append((shard, b"".join(map(digest, numbers))))
        for row, number in enumerate(numbers):
            known.setdefault(digest(number), (shard, row))
    index.add_shards(shards)
    for row in range(30):
        known[digest(100 + row)] = (5, row)
        index.add(digest(100 + row), (5, row))

    assert len(index) == len(known)
    everything = [digest(number) for number in range(140)]
    assert [index.find(each) for each in everything] == [known.get(each) for each in everything]
    expected = [known.get(each, (-1, -1)) for each in everything]
    np.testing.assert_array_equal(index.find_all(everything), expected)
    assert index.find(b"short") is None


def test_what_a_dropped_shard_held_is_found_in_another() -> None:
    index = DigestIndex()
    index.add_shards([(0, digest(1) + digest(2)), (1, digest(2) + digest(3))])
    assert index.find(digest(2)) == (0, 1)
    index.forget(0)
    assert [index.find(digest(i)) for i in (1, 2, 3)] == [None, (1, 0), (1, 1)]
    assert len(index) == 2
    index.add(digest(1), (2, 0))
    assert index.find(digest(1)) == (2, 0)


def test_digests_that_begin_alike_and_those_that_end_in_zeros() -> None:
    same = [b"\xff" * 8 + bytes(7) + bytes([i]) for i in (3, 0, 2, 1)]
    index = DigestIndex()
    index.add_shards([(7, b"".join(same))])
    assert [index.find(each) for each in same] == [(7, 0), (7, 1), (7, 2), (7, 3)]
    assert index.find(b"\xff" * 8 + bytes(7) + b"\x04") is None


def test_memory_of_a_million_digests() -> None:
    import tracemalloc

    content = np.random.default_rng(0).bytes(DIGEST_BYTES * 1_000_000)
    tracemalloc.start()
    index = DigestIndex()
    index.add_shards([(0, content)])
    now, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == 1_000_000
    assert now < 25e6  # 24 bytes each; a dict of bytes would take 200
    assert most < 90e6
