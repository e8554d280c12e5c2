"""Folders and prefixes that hold videos and Parquet files beside images: what is taken, and what is left out."""

from __future__ import annotations

import csv
import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from stores import s3_store
from videos import write_video

from featdiff import Detector
from featdiff.data.labels import list_labelled
from featdiff.data.references import MissingRef, iter_images, list_images
from featdiff.exceptions import UsageError

NAMES = [
    "a.png",
    "b.png",
    *(f"c.mp4#t={t}.000" for t in (0, 1, 2)),
    *(f"clips/d.MOV#t={t}.000" for t in (0, 1, 2)),
    *(f"f.parquet/{name}.png#row={i}" for i, name in enumerate("xyz")),
    "g.pq#row=0",
    "z.png",
]


@pytest.fixture
def folder(few_images: Path) -> Path:
    """Three images, two videos, two Parquet files of images, three tables of other things, an archive and a note."""
    root = few_images
    for name in "def":
        (root / f"{name}.png").unlink()
    (root / "c.png").rename(root / "z.png")
    content = [(root / f"{name}.png").read_bytes() for name in "abz"]

    write_video(root / "c.mp4", "libx264")
    (root / "clips").mkdir()
    write_video(root / "clips" / "d.MOV", "libx264")
    rows = [{"bytes": data, "path": f"{name}.png"} for data, name in zip(content, "xyz", strict=True)]
    pq.write_table(pa.table({"photo": rows, "label": [0, 1, 2]}), root / "f.parquet")
    pq.write_table(pa.table({"image": content[:1]}), root / "g.pq")

    pq.write_table(pa.table({"path": ["a.png"], "ood_score": [1.0]}), root / "scores.parquet")
    pq.write_table(pa.table({"sha256": [b"\x00" * 32], "name": ["a"]}), root / "digests.parquet")
    pq.write_table(pa.table({"point": [{"x": 1.0}], "geometry": [b"\x01\x02"]}), root / "places.parquet")
    with zipfile.ZipFile(root / "copies.zip", "w") as archive:
        archive.write(root / "a.png", "a.png")
    (root / ".hidden.mp4").write_bytes(b"x")
    (root / "notes.txt").write_text("x")
    return root


def test_a_folder_gives_all_its_images(folder: Path) -> None:
    assert [ref.path for ref in list_images(folder, every=1)] == [f"{folder}/{name}" for name in NAMES]
    assert len(list_images(folder)) == len(NAMES) - 6 + 2 * 90
    for ref in list_images(folder, every=1):
        assert ref.read()


def test_so_does_a_prefix_of_a_store(folder: Path) -> None:
    with s3_store() as client:
        client.create_bucket(Bucket="photos")
        for file in folder.rglob("*.*"):
            client.put_object(Bucket="photos", Key=f"new/{file.relative_to(folder)}", Body=file.read_bytes())
        refs = list_images("s3://photos/new", every=1)
        assert [ref.path for ref in refs] == [f"s3://photos/new/{name}" for name in NAMES]
        assert len({bytes(ref.read()) for ref in refs if "parquet" in ref.path}) == 3


def test_a_table_that_a_pattern_names_has_a_reason(folder: Path) -> None:
    (reason,) = [ref.reason for ref in iter_images(str(folder / "s*.parquet")) if isinstance(ref, MissingRef)]
    assert "no column of images" in reason


def test_a_folder_of_tables_holds_no_image(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (folder / "scores.parquet").rename(tmp_path / "tables" / "scores.parquet")
    for source in (tmp_path / "tables", f"file://{tmp_path}/tables"):
        with pytest.raises(UsageError, match="no images in this folder"):
            list_images(source)


def test_damaged_ones_are_rows_with_a_reason(folder: Path) -> None:
    (folder / "c.mp4").write_bytes(b"no video")
    (folder / "f.parquet").write_bytes(b"no Parquet")
    missing = [ref for ref in list_images(folder, every=1) if isinstance(ref, MissingRef)]
    assert [ref.path for ref in missing] == [f"{folder}/c.mp4", f"{folder}/f.parquet"]
    assert "video cannot be read" in missing[0].reason
    assert "Parquet file cannot be read" in missing[1].reason


def test_missing_packages_end_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    refs = list_images(folder)
    missing = {Path(ref.path).name: ref.reason for ref in refs if isinstance(ref, MissingRef)}
    assert set(missing) == {"c.mp4", "d.MOV"}
    assert missing["c.mp4"] == "reading video needs PyAV: pip install 'featdiff[video]'"
    assert len(refs) == 3 + 4 + 2
    with pytest.raises(UsageError, match=r"c\.mp4: reading video needs PyAV"):
        list_images(folder / "c.mp4")


def test_a_wrong_number_of_seconds_is_refused_in_folders_too(folder: Path) -> None:
    with pytest.raises(UsageError, match="above 0"):
        list_images(folder, every=-1)


def test_frames_have_the_class_of_their_video(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "classes"
    root.mkdir()
    folder.rename(root / "one")
    (root / "one" / "clips").rename(root / "two")
    refs, labels, classes = list_labelled(root)
    assert classes == ["one", "two"]
    assert len(refs) == 3 + 4 + 2 * 90
    assert list(labels) == [0] * (3 + 4 + 90) + [1] * 90


def test_mixed_folders_are_scored(
    featdiff_cli: Callable[..., Result], tiny_model: Path, tiny_detector: Detector, folder: Path, tmp_path: Path
) -> None:
    result = featdiff_cli("score", folder, "--every", 1, "-m", tiny_model)
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["path"] for row in rows] == [f"{folder}/{name}" for name in NAMES]
    scores = {row["path"].rpartition("few/")[2]: float(row["ood_score"]) for row in rows}
    assert scores["f.parquet/x.png#row=0"] == pytest.approx(scores["a.png"], abs=1e-5)
    assert scores["c.mp4#t=1.000"] == pytest.approx(scores["clips/d.MOV#t=1.000"], abs=1e-5)

    listed = featdiff_cli("manifest", folder, "--every", 1, "-o", tmp_path / "manifest.parquet")
    assert listed.exit_code == 0, listed.output
    assert pq.read_table(tmp_path / "manifest.parquet")["uri"].to_pylist() == sorted(row["path"] for row in rows)
