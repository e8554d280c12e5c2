"""Features on disk: found by content, never lost to a damaged file or a full disk."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from small_stores import VECTORS, WIDTH, digest, digests, everything, fill, one_line, remount
from torch import Tensor

from featdiff.exceptions import DamagedCache, FeatdiffError
from featdiff.features import store as store_module
from featdiff.features.store import FeatureStore
from featdiff.files.cache import default_cache

# ---------------------------------------- store and table


def test_round_trip_through_the_disk(tmp_path: Path) -> None:
    fill(tmp_path / "deep" / "store", range(20))
    store = FeatureStore(tmp_path / "deep" / "store", WIDTH)
    assert len(store) == 20
    assert all(digest(number) in store for number in range(20))
    assert digest(20) not in store and b"" not in store and "text" not in store
    order = [7, 0, 19, 7, 3]
    table = store.table(digests(order))
    assert len(table) == 5
    np.testing.assert_array_equal(everything(table), VECTORS[order])


def test_table_writes_what_is_pending(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, WIDTH)
    store.add(digest(1), VECTORS[1])
    assert digest(1) in store and len(store) == 1
    assert len(FeatureStore(tmp_path, WIDTH)) == 0  # nothing on disk yet
    np.testing.assert_array_equal(everything(store.table(digests([1]))), VECTORS[[1]])
    assert len(FeatureStore(tmp_path, WIDTH)) == 1


def test_flush_of_nothing_writes_nothing(tmp_path: Path) -> None:
    FeatureStore(tmp_path, WIDTH).flush()
    fill(tmp_path, range(3)).flush()
    assert len(list(tmp_path.glob("*.digests"))) == 1


def test_table_random_access(tmp_path: Path) -> None:
    for numbers in (range(20), range(20, 25), range(25, 60)):
        store = fill(tmp_path, numbers)
    rng = np.random.default_rng(1)
    order = rng.permutation(60)
    table = store.table(digests(order.tolist()))
    for rows in (
        rng.integers(0, 60, 200),  # repeated, in no order, from all shards
        np.array([59, 0]),
        np.array([-1, -60]),
        np.arange(60) % 7 == 0,
        np.array([], dtype=np.int64),
    ):
        found = table[rows]
        assert isinstance(found, Tensor) and found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), VECTORS[order][rows])
    with pytest.raises(IndexError):
        table[np.array([60])]


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (1000, [7])])
def test_chunks_are_all_rows_in_order(size: int, lengths: list[int], tmp_path: Path) -> None:
    table = fill(tmp_path, range(7)).table(digests(range(6, -1, -1)))
    parts = list(table.chunks(size))
    assert [len(part) for part in parts] == lengths
    np.testing.assert_array_equal(torch.cat(parts).numpy(), VECTORS[6::-1])


def test_empty_table(tmp_path: Path) -> None:
    table = FeatureStore(tmp_path, WIDTH).table([])
    assert len(table) == 0 and list(table.chunks()) == []
    assert table[np.array([], dtype=np.int64)].shape == (0, WIDTH)


def test_shards_are_cut_by_size_and_memory_mapped(tmp_path: Path) -> None:
    """Eight vectors of half a megabyte fill a shard; what is written is not held in memory."""
    width = 1 << 17
    store = FeatureStore(tmp_path, width)
    for number in range(19):
        store.add(digest(number), np.full(width, number, dtype=np.float32))
    assert len(list(tmp_path.glob("*.digests"))) == 2
    assert len(FeatureStore(tmp_path, width)) == 16
    for table in (store.table(digests(range(19))), FeatureStore(tmp_path, width).table(digests(range(19)))):
        assert len(table.shards) == 3
        assert all(isinstance(shard, np.memmap) and shard.mode == "r" for shard in table.shards)
        assert table[np.array([18, 7, 8])][:, ::50_000].tolist() == [[18.0] * 3, [7.0] * 3, [8.0] * 3]


def test_one_content_is_kept_once(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, WIDTH)
    for vector in (VECTORS[1], VECTORS[2]):  # before and after it is written, the first stays
        store.add(digest(1), vector)
    store.flush()
    store.add(digest(1), VECTORS[3])
    store.flush()
    again = FeatureStore(tmp_path, WIDTH)
    again.add(digest(1), VECTORS[4])
    assert len(store) == len(again) == 1
    np.testing.assert_array_equal(everything(again.table(digests([1, 1]))), VECTORS[[1, 1]])
    assert len(list(tmp_path.glob("*.digests"))) == 1


def test_vectors_of_other_float_types_are_kept_as_float32(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, WIDTH)
    store.add(digest(1), VECTORS[1].astype(np.float64))
    assert everything(store.table(digests([1]))).dtype == np.float32
    np.testing.assert_array_equal(everything(store.table(digests([1]))), VECTORS[[1]])


def test_caller_may_reuse_its_buffer(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, WIDTH)
    buffer = VECTORS[1].copy()
    store.add(digest(1), buffer)
    buffer[:] = 0
    np.testing.assert_array_equal(everything(store.table(digests([1]))), VECTORS[[1]])


def test_second_store_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    fill(tmp_path, range(10))
    store = fill(tmp_path, range(5, 20))
    assert len(store) == 20
    np.testing.assert_array_equal(everything(store.table(digests(range(20)))), VECTORS[:20])
    assert len(FeatureStore(tmp_path, WIDTH)) == 20


def test_two_stores_on_one_folder_at_once(tmp_path: Path) -> None:
    first, second = FeatureStore(tmp_path, WIDTH), FeatureStore(tmp_path, WIDTH)
    for number in range(0, 30):
        first.add(digest(number), VECTORS[number])
        second.add(digest(number + 15), VECTORS[number + 15])
        if number % 4 == 0:
            first.flush()
        if number % 3 == 0:
            second.flush()
    np.testing.assert_array_equal(everything(first.table(digests(range(30)))), VECTORS[:30])
    np.testing.assert_array_equal(everything(second.table(digests(range(15, 45)))), VECTORS[15:45])
    union = FeatureStore(tmp_path, WIDTH)
    assert len(union) == 45
    np.testing.assert_array_equal(everything(union.table(digests(range(45)))), VECTORS[:45])


def test_tables_outlive_later_writing(tmp_path: Path) -> None:
    store = fill(tmp_path, range(5))
    table = store.table(digests(range(5)))
    store.add(digest(9), VECTORS[9])
    store.flush()
    np.testing.assert_array_equal(everything(table), VECTORS[:5])


# ---------------------------------------- damaged and foreign files


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, array=np.ones(3))
    return stream.getvalue()


def open_header(content: bytes) -> bytes:
    """One bit of the header's text has flipped, so that a bracket stays open."""
    return content.replace(b"}", b"{", 1)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "zero bytes": lambda content: b"",
    "three bytes": lambda content: content[:3],
    "half a header": lambda content: content[:50],
    "one byte short": lambda content: content[:-1],
    "text": lambda content: b"not an array\n" * 9,
    "magic changed": lambda content: b"\xff" + content[1:],
    "open header": open_header,
    "shape changed": lambda content: content.replace(b"(5, ", b"(6, "),
    "type changed": lambda content: content.replace(b"<f4", b"<i4").replace(b"|u1", b"<u2"),
    "zip": lambda content: npz(),
    "broken zip": lambda content: b"PK\x03\x04" + content[4:],
    "one number": lambda content: npy(np.array(1.0)),
    "another shape": lambda content: npy(np.zeros((4, 4), dtype=np.float32)),
    "zeros": lambda content: bytes(len(content)),
}


#: What leaves a file of digests as it is.
OF_ARRAYS = ("open header", "shape changed", "type changed")
DAMAGED = [("vectors", kind) for kind in DAMAGE] + [("digests", kind) for kind in DAMAGE if kind not in OF_ARRAYS]


@pytest.mark.parametrize(("part", "kind"), DAMAGED)
def test_damaged_shard_is_removed_and_computed_again(kind: str, part: str, tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    (file,) = tmp_path.glob(f"*.{part}*")
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
    fill(tmp_path / "other", range(5, 8))
    for whole in (tmp_path / "other").iterdir():
        shutil.move(whole, tmp_path)

    with pytest.warns(DamagedCache, match=f"{file.name} was damaged .* computed again") as caught:
        store = FeatureStore(tmp_path, WIDTH)
    assert len(caught) == 1
    assert len(list(tmp_path.glob("*.vectors.npy"))) == len(list(tmp_path.glob("*.digests"))) == 1
    assert len(store) == 3
    for number in range(8):
        assert (digest(number) in store) == (number >= 5)
        store.add(digest(number), VECTORS[number])
    np.testing.assert_array_equal(everything(store.table(digests(range(8)))), VECTORS[:8])
    np.testing.assert_array_equal(everything(FeatureStore(tmp_path, WIDTH).table(digests(range(8)))), VECTORS[:8])


@pytest.mark.parametrize("part", ["vectors", "digests"])
@pytest.mark.parametrize("mapped", [False, True])
def test_flipped_bit_in_any_region_is_found(
    part: str, mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the header, the numbers, the digests or the checksums; of small shards, which are read, and of mapped ones."""
    monkeypatch.setattr(store_module, "_MAPPED_BYTES", 0 if mapped else 1 << 30)
    numbers = range(5)
    for place in range(0, 288 if part == "vectors" else 144, 7):
        fill(tmp_path, numbers)
        (file,) = tmp_path.glob(f"*.{part}*")
        data = bytearray(file.read_bytes())
        data[place] ^= 1 << place % 8
        file.write_bytes(data)

        with pytest.warns(DamagedCache, match=file.name):
            store = FeatureStore(tmp_path, WIDTH)
            assert not any(digest(number) in store for number in numbers)
        assert list(tmp_path.iterdir()) == []  # said once
        for number in numbers:
            store.add(digest(number), VECTORS[number])
        np.testing.assert_array_equal(everything(store.table(digests(numbers))), VECTORS[:5])
        shutil.rmtree(tmp_path)


def test_vectors_of_two_shards_that_were_exchanged_are_found(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    fill(tmp_path, range(5, 10))
    one, two = tmp_path.glob("*.vectors.npy")
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    store = FeatureStore(tmp_path, WIDTH)
    with pytest.warns(DamagedCache) as caught:
        assert not any(digest(number) in store for number in range(10))
    assert len(caught) == 2


def damaged(tmp_path: Path) -> FeatureStore:
    """A store of two shards: numbers 0 .. 4 are whole, and a bit of the numbers 5 .. 9 is another."""
    fill(tmp_path, range(5))
    whole = {*tmp_path.iterdir()}
    fill(tmp_path, range(5, 10))
    (file,) = (file for file in {*tmp_path.iterdir()} - whole if file.suffix == ".npy")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return FeatureStore(tmp_path, WIDTH)


@pytest.mark.filterwarnings("error")
def test_only_shards_that_are_used_are_read(tmp_path: Path) -> None:
    store = damaged(tmp_path)
    assert digest(3) in store and len(store) == 10
    np.testing.assert_array_equal(everything(store.table(digests(range(5)))), VECTORS[:5])
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.warns(DamagedCache):
        assert digest(7) not in store
    assert len(store) == 5 and len(list(tmp_path.iterdir())) == 2
    assert len(FeatureStore(tmp_path, WIDTH)) == 5


def test_table_says_that_features_are_gone(tmp_path: Path) -> None:
    store = damaged(tmp_path)
    with pytest.warns(DamagedCache), pytest.raises(FeatdiffError, match="features of 5 of 10 images") as error:
        store.table(digests(range(10)))
    assert str(tmp_path) in one_line(error)


def test_many_threads_find_the_same_damage_once(tmp_path: Path) -> None:
    store = damaged(tmp_path)
    asked = [number % 10 for number in range(200)]
    with pytest.warns(DamagedCache) as caught, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: digest(number) in store, asked))
    assert found == [number < 5 for number in asked]
    assert len(caught) == 1


@pytest.mark.filterwarnings("error")
def test_shard_that_another_run_has_removed_is_not_called_damaged(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    store = FeatureStore(tmp_path, WIDTH)
    for file in tmp_path.iterdir():
        file.unlink()
    assert digest(1) not in store and len(store) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("part", ["vectors", "digests"])
def test_shard_with_one_file_gone_is_ignored(part: str, tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    for file in tmp_path.glob(f"*.{part}*"):
        file.unlink()
    assert len(FeatureStore(tmp_path, WIDTH)) == 0


@pytest.mark.filterwarnings("error")
def test_foreign_things_in_the_folder_are_ignored(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "notes.digests").write_text("mine")
    (tmp_path / f"{'0' * 32}.digests").mkdir()
    (tmp_path / f"{'1' * 32}.digests").symlink_to("nowhere")
    (tmp_path / ".0123.tmp").write_bytes(b"half written")
    np.save(tmp_path / f"{'2' * 32}.digests.npy", np.zeros((3, 16), dtype=np.uint8))  # an older version's
    store = FeatureStore(tmp_path, WIDTH)
    assert len(store) == 5
    np.testing.assert_array_equal(everything(store.table(digests(range(5)))), VECTORS[:5])
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "notes.digests").read_text() == "mine"


@pytest.mark.filterwarnings("error")
def test_shards_of_another_width_are_ignored(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    assert len(FeatureStore(tmp_path, WIDTH + 1)) == 0
    assert len(FeatureStore(tmp_path, WIDTH)) == 5


# ---------------------------------------- disks that do not take it


def test_full_disk_keeps_earlier_shards(small_disk: Path) -> None:
    """One line says what to do; once there is space, the same store goes on."""
    folder, width = small_disk / "features", 1024
    store = FeatureStore(folder, width)
    for number in range(20):  # 80 KiB
        store.add(digest(number), np.full(width, number, dtype=np.float32))
    store.flush()
    for number in range(20, 80):  # 240 KiB
        store.add(digest(number), np.full(width, number, dtype=np.float32))
    for _ in range(2):
        with pytest.raises(FeatdiffError) as error:
            store.flush()
        text = one_line(error)
        assert str(folder) in text and "No space left" in text and "another cache" in text
    assert sorted(file.suffix for file in folder.iterdir()) == [".digests", ".npy"]  # no remains
    again = FeatureStore(folder, width)
    assert len(again) == 20
    assert again.table(digests([19, 0]))[np.array([0, 1])][:, ::500].tolist() == [[19.0] * 3, [0.0] * 3]
    remount(small_disk, "size=4m")
    store.flush()
    assert len(FeatureStore(folder, width)) == 80
    assert store.table(digests(range(80)))[np.array([79, 3])][:, ::500].tolist() == [[79.0] * 3, [3.0] * 3]


def test_disk_that_fills_between_the_two_files_of_a_shard(small_disk: Path) -> None:
    """Vectors without digests are of no use to anyone: they do not stay on a full disk."""
    width = 1024
    store = FeatureStore(small_disk, width)
    for number in range(40):
        store.add(digest(number), np.full(width, number, dtype=np.float32))
    (small_disk / "other").write_bytes(bytes(23 * 4096))  # leaves 41 of 64 pages: the vectors, and no more
    with pytest.raises(FeatdiffError, match="No space left"):
        store.flush()
    assert [file.name for file in small_disk.iterdir()] == ["other"]


def test_cache_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FeatdiffError) as error:
            FeatureStore(folder, WIDTH)
        assert str(folder) in one_line(error) and "another cache" in one_line(error)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_cache_folder_without_permission(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "cache", WIDTH)
    store.add(digest(1), VECTORS[1])
    (tmp_path / "cache").chmod(0o500)
    try:
        with pytest.raises(FeatdiffError, match="Permission denied"):
            store.flush()
        with pytest.raises(FeatdiffError, match="Permission denied"):
            FeatureStore(tmp_path / "cache" / "below", WIDTH)
    finally:
        (tmp_path / "cache").chmod(0o700)


@pytest.mark.parametrize("instead", ["nothing", "a file"])
def test_cache_folder_that_goes_away_during_a_run(instead: str, tmp_path: Path) -> None:
    store = fill(tmp_path / "cache", range(3))
    shutil.rmtree(tmp_path / "cache")
    if instead == "a file":
        (tmp_path / "cache").write_text("not a folder")
    store.add(digest(9), VECTORS[9])
    with pytest.raises(FeatdiffError) as error:
        store.flush()
    assert str(tmp_path / "cache") in one_line(error)


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEATDIFF_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("FEATDIFF_CACHE")
    assert default_cache().name == "featdiff" and default_cache().is_absolute()


_MANY_SHARDS = """
import resource, sys
from pathlib import Path
import numpy as np
import featdiff.features.store as store
hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 4096)
resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
store._SHARD_BYTES, store._MAPPED_BYTES = 1280, 512  # shards of 10 vectors, which are mapped; their digests are read
kept = store.FeatureStore(Path(sys.argv[1]), 32)
digests = [i.to_bytes(16, "big") for i in range(3200)]
for i, digest in enumerate(digests):
    kept.add(digest, np.full(32, i))
again = store.FeatureStore(Path(sys.argv[1]), 32)
assert len(again) == 3200
for table in (kept.table(digests), again.table(digests)):
    assert [int(row[0]) for row in table[np.arange(3200)]] == list(range(3200))
print(len(list(Path(sys.argv[1]).glob("*.vectors.npy"))))
"""


def test_more_shards_than_a_process_may_open_at_first(tmp_path: Path) -> None:
    """320 mapped shards under a limit of 150 files: the limit is raised as far as the system grants."""
    run = subprocess.run([sys.executable, "-c", _MANY_SHARDS, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["320"]


def test_too_many_open_files_is_one_clear_line(tmp_path: Path) -> None:
    """When the system grants no more."""
    code = _MANY_SHARDS.replace("(150, hard)", "(150, 150)")
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 1
    assert "FeatdiffError" in run.stderr.splitlines()[-1] and "ulimit -n" in run.stderr.splitlines()[-1]
