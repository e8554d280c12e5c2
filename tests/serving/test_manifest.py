"""Manifests: sorted, each name once, written whole, and refused when they are something else."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from helpers import fails

from featdiff.data.image_refs import FileRef, HeldRef, MissingRef
from featdiff.data.references import list_images
from featdiff.exceptions import FeatdiffError, UsageError
from featdiff.serving import manifest as rooms
from featdiff.serving.manifest import LazyRefs, Manifest, write_manifest

Cli = Callable[..., Result]


def refs(*names: str) -> list[MissingRef]:
    return [MissingRef(name, "only a name") for name in names]


def rows(file: object) -> dict[str, list[object]]:
    return dict(pq.read_table(str(file)).to_pydict())


def test_the_command_lists_what_score_would_read(featdiff_cli: Cli, few_images: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.parquet"
    done = featdiff_cli("manifest", few_images, few_images / "c.png", "-o", file)
    assert done.exit_code == 0
    assert done.stderr == f"6 entries in {file}, 1 named more than once\n"
    listed = list_images(few_images)
    expected = [ref.path for ref in listed]
    sizes = [Path(name).stat().st_size for name in expected]
    assert rows(file) == {"id": list(range(6)), "uri": expected, "size": sizes}
    assert Manifest(str(file)).block(0, 10).refs() == listed


def test_what_holds_no_image_is_a_row_and_is_told(featdiff_cli: Cli, few_images: Path, tmp_path: Path) -> None:
    done = featdiff_cli("manifest", few_images, tmp_path / "gone", "-o", tmp_path / "m.parquet")
    assert done.exit_code == 3
    assert f"  {tmp_path / 'gone'}: no such file or folder" in done.stderr
    uris = rows(tmp_path / "m.parquet")["uri"]
    assert len(uris) == 7 and str(tmp_path / "gone") in uris
    fails(featdiff_cli("manifest", few_images, "-o", tmp_path / "no" / "m.parquet"), 2, "--output", "no folder")


def test_members_of_archives_are_found_again(sample_folders: dict[str, Path], tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted(sample_folders["test"].iterdir())[:3]:
            archive.write(file, f"x/{file.name}")
    listed = list_images(tmp_path / "a.zip")
    write_manifest(listed, str(tmp_path / "m.parquet"))
    found = Manifest(str(tmp_path / "m.parquet")).block(0, 5).refs()
    assert [ref.read() for ref in found] == [ref.read() for ref in listed]


def test_more_names_than_memory_takes_are_sorted_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_IN_MEMORY", 7), ("_MOST_FILES", 3), ("_BUFFERED", 2), ("_GROUP", 10)):
        monkeypatch.setattr(rooms, name, value)
    names = [f"{i * 37 % 101:03}-ü" for i in range(101)]
    written = write_manifest(refs(*names, *names[:9]), str(tmp_path / "m.parquet"))
    assert (written.rows, written.copies) == (101, 9)
    manifest = Manifest(str(tmp_path / "m.parquet"))
    assert manifest.rows == 101 and manifest.blocks(25) == 5
    blocks = [manifest.block(number, 25) for number in range(5)]  # across groups of rows
    assert [uri for block in blocks for uri in block.uris] == sorted(names)
    assert [number for block in blocks for number in block.ids] == list(range(101))
    assert [LazyRefs(manifest)[i].path for i in (0, 50, 100)] == [sorted(names)[i] for i in (0, 50, 100)]


def test_memory_does_not_grow_with_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "_BUFFERED", 20)
    monkeypatch.setattr(rooms, "_IN_MEMORY", 2_000)
    monkeypatch.setattr(rooms, "_GROUP", 1_000)

    def peak(count: int) -> int:
        tracemalloc.start()
        names = (MissingRef(f"bucket/folder/{i * 7919 % count:09}.jpg", "") for i in range(count))
        write_manifest(names, str(tmp_path / "m.parquet"))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(40_000) < 2.5 * peak(8_000)


def test_it_is_written_whole_or_not_at_all(mounted: Callable[[Path, str], Path], tmp_path: Path) -> None:
    disk = mounted(tmp_path / "disk", "64k")
    file = disk / "m.parquet"
    write_manifest(refs("a"), str(file))
    before = file.read_bytes()
    with pytest.raises(FeatdiffError, match="m.parquet cannot be written: No space left on device"):
        write_manifest((MissingRef(f"{i * 2654435761 % 2**32:064b}", "") for i in range(20_000)), str(file))
    assert file.read_bytes() == before
    assert [path.name for path in disk.iterdir()] == ["m.parquet"]


def test_urls() -> None:
    write_manifest(refs("b", "a"), "memory://manifests/m.parquet")
    assert Manifest("memory://manifests/m.parquet").block(0, 2).uris == ["a", "b"]


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["all of it", "its footer"])
def test_an_edited_manifest_has_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(rooms, "_HASHED_BYTES", limit)
    file = str(tmp_path / "m.parquet")
    write_manifest(refs("a", "b", "c"), file)
    before = Manifest(file).digest
    assert Manifest(file).digest == before
    write_manifest(refs("a", "b", "d"), file)
    assert Manifest(file).digest != before


def test_images_in_memory_have_no_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is in memory"):
        write_manifest([HeldRef("array[0]", b"")], str(tmp_path / "m.parquet"))
    assert list(tmp_path.iterdir()) == []


def table(ids: list[int], uris: list[str | None]) -> pa.Table:
    return pa.table({"id": ids, "uri": uris, "size": pa.array([None] * len(ids), pa.int64())})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"path,score\n", "is no manifest"),
        (pa.table({"uri": ["a"]}), "lacks id and size"),
        (table([], []), "holds no images"),
        (table([0, 1], ["b", "a"]), "must ascend"),
        (table([0, 1], ["a", "a"]), "must ascend"),
        (table([1, 0], ["a", "b"]), "must ascend"),
        (table([0, 1], ["a", None]), "must ascend"),
    ],
    ids=["text", "columns", "empty", "order", "twice", "ids", "none"],
)
def test_what_is_no_manifest_is_refused(
    featdiff_cli: Cli, tiny_model: Path, tmp_path: Path, content: bytes | pa.Table, words: str
) -> None:
    file = tmp_path / "m.parquet"
    file.write_bytes(content) if isinstance(content, bytes) else pq.write_table(content, file)
    fails(featdiff_cli("score", "-q", "--manifest", file, "--out", tmp_path / "out", "-m", tiny_model), 2, words)


def test_a_manifest_that_is_gone(featdiff_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    missing = tmp_path / "m.parquet"
    done = featdiff_cli("score", "-q", "--manifest", missing, "--out", tmp_path / "out", "-m", tiny_model)
    fails(done, 1, f"the manifest {missing} cannot be read: No such file or directory")


def test_a_filtered_manifest_is_one(tmp_path: Path) -> None:
    """Ids need not be dense, so that a part of a manifest can be scored."""
    pq.write_table(table([3, 8], ["a", "b"]), tmp_path / "m.parquet")
    block = Manifest(str(tmp_path / "m.parquet")).block(0, 5)
    assert block.ids.tolist() == [3, 8]
    assert block.refs() == [FileRef("a", "a"), FileRef("b", "b")]
