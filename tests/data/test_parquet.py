"""Images in rows of Parquet files, and in what the libraries of datasets give; here and in a store."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from stores import faulty_server, s3_store

from featdiff import Detector
from featdiff.data.references import MissingRef, iter_images, list_images, ref_of
from featdiff.exceptions import UsageError

datasets = pytest.importorskip("datasets")


def picture(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))


def content(number: int) -> bytes:
    data = io.BytesIO()
    picture(number).save(data, "PNG")
    return data.getvalue()


COUNT = 50
ROWS = [{"bytes": content(i), "path": f"folder/c{i}.png"} for i in range(COUNT)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """50 rows in three groups."""
    pq.write_table(pa.table({"label": range(COUNT), "image": ROWS}), tmp_path / "rows.parquet", row_group_size=20)
    return tmp_path / "rows.parquet"


@pytest.fixture(scope="module")
def expected(tiny_detector: Detector) -> list[float]:
    return [float(score) for score in tiny_detector.score([picture(i) for i in range(COUNT)]).ood_score]


# ---- Parquet ----


def test_rows_keep_their_names(file: Path) -> None:
    refs = list_images(file)
    assert [ref.path for ref in refs] == [f"{file}/folder/c{i}.png#row={i}" for i in range(COUNT)]
    assert [ref.read() for ref in refs] == [row["bytes"] for row in ROWS]


def test_rows_can_be_read_in_any_order_and_elsewhere(file: Path) -> None:
    refs = pickle.loads(pickle.dumps(list_images(str(file))))
    for i in (49, 3, 2, 40, 39, 21, 0, 19, 20):
        assert refs[i].read() == content(i)
        assert ref_of(refs[i].path) == refs[i]
        assert ref_of(refs[i].path).read() == content(i)


def test_rows_are_scored_like_the_pictures(tiny_detector: Detector, file: Path, expected: list[float]) -> None:
    scores = tiny_detector.score(file)
    assert list(scores.ood_score) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({"jpg": [row["bytes"] for row in ROWS[:2]], "__key__": ["a", "b"]}, ["/a#row=0", "/b#row=1"]),
        ({"number": [1, 2], "anything": [row["bytes"] for row in ROWS[:2]]}, ["#row=0", "#row=1"]),
        ({"id": [7, 8], "img": [{"bytes": row["bytes"]} for row in ROWS[:2]]}, ["/7#row=0", "/8#row=1"]),
    ],
)
def test_other_columns(tmp_path: Path, columns: dict[str, list[Any]], names: list[str]) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), file)
    refs = list_images(file)
    assert [ref.path for ref in refs] == [f"{file}{name}" for name in names]
    assert [ref.read() for ref in refs] == [content(0), content(1)]


def test_rows_without_bytes_have_a_reason(tiny_detector: Detector, tmp_path: Path) -> None:
    rows = [{"bytes": None, "path": "/etc/passwd"}, ROWS[0], None, {"bytes": b"no image", "path": None}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "rows.parquet")
    scores = tiny_detector.score(tmp_path / "rows.parquet")
    assert scores.status == ["unreadable", "ok", "unreadable", "unreadable"]
    assert scores.reason[0] == "no bytes in this row, only the path /etc/passwd"
    assert scores.reason[2] == "an empty row"


def test_a_damaged_file_gives_its_good_rows(tiny_detector: Detector, file: Path, expected: list[float]) -> None:
    """The pages of the second row group are overwritten."""
    data = bytearray(file.read_bytes())
    column = pq.ParquetFile(file).metadata.row_group(1).column(1)
    assert column.path_in_schema == "image.bytes"
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 4000] = bytes(4000)
    file.write_bytes(data)

    scores = tiny_detector.score(file)
    assert scores.status == ["ok"] * 20 + ["unreadable"] * 20 + ["ok"] * 10
    assert all("Parquet file cannot be read from here on" in reason for reason in scores.reason[20:40])
    np.testing.assert_allclose(scores.ood_score[:20], expected[:20], rtol=1e-5)
    np.testing.assert_allclose(scores.ood_score[40:], expected[40:], rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-20], "Parquet file cannot be read"),
        (lambda data: b"", "Parquet file cannot be read"),
        (lambda data: b"no parquet", "Parquet file cannot be read"),
    ],
)
def test_a_file_that_is_none(file: Path, damage: Any, words: str) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UsageError, match=words):
        list_images(file)
    assert isinstance(list_images([file, picture(0)])[0], MissingRef)


def test_a_file_without_pictures(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1.0, 2.0]}), tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match="no column of images"):
        list_images(tmp_path / "rows.parquet")


def test_rows_and_shards_in_a_store(tiny_detector: Detector, file: Path, expected: list[float]) -> None:
    """Parquet files and tars by a pattern, as hubs lay them out."""
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for i in range(20):
            for suffix, data in (("png", content(i)), ("cls", b"1")):
                member = tarfile.TarInfo(f"sample{i:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    with s3_store() as s3:
        s3.create_bucket(Bucket="hub")
        s3.put_object(Bucket="hub", Key="data/train-00000.parquet", Body=file.read_bytes())
        s3.put_object(Bucket="hub", Key="data/shard-0.tar", Body=shard.getvalue())
        scores = tiny_detector.score("s3://hub/data/*.parquet")
        assert scores.path[3] == "s3://hub/data/train-00000.parquet/folder/c3.png#row=3"
        assert list(scores.ood_score) == pytest.approx(expected, rel=1e-5)

        scores = tiny_detector.score("s3://hub/data/shard-*.tar")
        assert scores.path == [f"s3://hub/data/shard-0.tar/sample{i:03d}.png" for i in range(20)]
        assert list(scores.ood_score) == pytest.approx(expected[:20], rel=1e-5)
        assert ref_of(scores.path[7]).read() == content(7)

    with faulty_server() as server:
        server.files["shard.tar"] = shard.getvalue()
        scores = tiny_detector.score(f"{server.url}/ok/shard.tar")
        assert list(scores.ood_score) == pytest.approx(expected[:20], rel=1e-5)


# ---- what libraries of datasets give ----


@pytest.fixture
def hugging_face(tmp_path: Path) -> Any:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": ROWS, "label": list(range(COUNT))}, features=features)


def test_a_dataset_of_hugging_face(tiny_detector: Detector, hugging_face: Any, expected: list[float]) -> None:
    raw = hugging_face.cast_column("image", datasets.Image(decode=False))
    for source in (hugging_face, raw, hugging_face.to_iterable_dataset(), raw.to_iterable_dataset()):
        assert list(tiny_detector.score(source).ood_score) == pytest.approx(expected, rel=1e-5)
    assert tiny_detector.score(raw).path[3] == "folder/c3.png"


def test_its_parquet_file(tiny_detector: Detector, hugging_face: Any, tmp_path: Path, expected: list[float]) -> None:
    hugging_face.to_parquet(tmp_path / "hf.parquet")
    scores = tiny_detector.score(tmp_path / "hf.parquet")
    assert scores.path[3].endswith("c3.png#row=3")
    assert list(scores.ood_score) == pytest.approx(expected, rel=1e-5)


def test_web_datasets(tiny_detector: Detector, tmp_path: Path, expected: list[float]) -> None:
    """A shard as its library writes it; featdiff reads the tar, and takes what its own pipeline gives."""
    webdataset = pytest.importorskip("webdataset")
    file = tmp_path / "shard-000.tar"
    with webdataset.TarWriter(str(file)) as shard:
        for i in range(20):
            shard.write({"__key__": f"sample{i:03d}", "png": content(i), "json": {"label": i}})

    scores = tiny_detector.score(file)
    assert scores.path == [f"{file}/sample{i:03d}.png" for i in range(20)]
    assert list(scores.ood_score) == pytest.approx(expected[:20], rel=1e-5)

    pipeline = webdataset.WebDataset(str(file), shardshuffle=False).decode("pil").to_tuple("png", "json")
    assert list(tiny_detector.score(pipeline).ood_score) == pytest.approx(expected[:20], rel=1e-5)


def test_torch_datasets_and_generators(tiny_detector: Detector, tmp_path: Path, expected: list[float]) -> None:
    import torch
    from torchvision.datasets import ImageFolder

    class Numbered(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, number: int) -> tuple[Image.Image, int]:
            return picture(number), 0

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Image.Image]:
            return map(picture, range(10))

    (tmp_path / "one").mkdir()
    for i in range(10):
        (tmp_path / "one" / f"{i}.png").write_bytes(content(i))
    for source in (Numbered(), Stream(), map(picture, range(10)), ImageFolder(str(tmp_path)), iter_images(tmp_path)):
        assert list(tiny_detector.score(source).ood_score) == pytest.approx(expected[:10], rel=1e-5)
