"""Datasets and streams of images: torch datasets, ImageFolder, rows of Hugging Face, generators."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import encoded, to_tensor
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from featdiff.data.batches import Batch, LoadedImage, iter_batches, iter_loaded, load
from featdiff.data.datasets import is_map_style, iter_refs
from featdiff.data.image_refs import HeldRef, ImageRef
from featdiff.data.loaders import batches_from_stream, is_loader
from featdiff.data.references import list_images
from featdiff.exceptions import UsageError


def grey(value: int) -> Image.Image:
    return Image.new("L", (4, 4), value)


class Items(Dataset[Any]):
    """A map-style dataset of these items; one that is an exception is raised."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.threads: set[int] = set()
        self.order: list[int] = []

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.threads.add(threading.get_ident())
        self.order.append(index)
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


class Rows:
    """What the tests need of a Hugging Face ``Dataset``: length, rows by number, and iteration."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def loaded_from(source: object) -> list[LoadedImage]:
    return list(iter_loaded(list_images(source), to_tensor, workers=3))


def values(loaded: list[LoadedImage]) -> list[int | None]:
    """The grey value of each image; None where it could not be read."""
    return [None if item.pixels is None else int(item.pixels[0, 0, 0]) for item in loaded]


KINDS: dict[str, Callable[[int, Path], object]] = {
    "picture": lambda value, _: grey(value),
    "labelled": lambda value, _: (grey(value), 7),
    "list": lambda value, _: [grey(value), 7],
    "image": lambda value, _: {"image": grey(value), "label": 7},
    "img": lambda value, _: {"img": grey(value), "fine_label": 7},
    "bytes": lambda value, _: encoded(grey(value)),
    "bytes in a row": lambda value, _: {"image": encoded(grey(value))},
    "array": lambda value, _: np.full((4, 4, 3), value, np.uint8),
    "channels first": lambda value, _: np.full((3, 5, 5), value, np.uint8),
    "tensor": lambda value, _: (torch.full((3, 5, 5), value, dtype=torch.uint8), 7),
    "undecoded": lambda value, _: {"image": {"bytes": encoded(grey(value)), "path": None}},
    "path": lambda value, folder: folder / f"{value}.png",
    "text": lambda value, folder: str(folder / f"{value}.png"),
    "undecoded file": lambda value, folder: {"image": {"bytes": None, "path": str(folder / f"{value}.png")}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for value in (10, 20, 30):
        grey(value).save(tmp_path / f"{value}.png")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_items_of_every_kind(kind: str, folder: Path) -> None:
    items = [KINDS[kind](value, folder) for value in (10, 20, 30)]
    named = kind in ("path", "text", "undecoded file")
    names = [f"{folder}/{value}.png" if named else f"dataset[{i}]" for i, value in enumerate((10, 20, 30))]

    listed = loaded_from(Items(items))
    streamed = list(iter_loaded(iter_refs(item for item in items), to_tensor, workers=3))
    for loaded in (listed, streamed):
        assert values(loaded) == [10, 20, 30], [item.reason for item in loaded]
        assert [item.ref.path for item in loaded] == names
    assert [item.digest for item in listed] == [item.digest for item in streamed]


def test_pictures_have_the_digest_of_their_pixels() -> None:
    expected = load(HeldRef("x", grey(10)), to_tensor).digest
    coloured = grey(10).convert("RGB")
    assert [item.digest for item in loaded_from(Items([grey(10), coloured]))] == [expected, expected]


def test_rows_are_named_by_their_path_where_they_have_one() -> None:
    data = encoded(grey(10))
    rows = [
        {"image": {"bytes": data, "path": "a/1.png"}},
        {"image": grey(10), "path": "a/2.png"},
        {"image": {"bytes": data, "path": None}},
        {"image": grey(10), "path": 3},
        {"bytes": data, "path": "a/3.png"},
    ]
    expected = ["a/1.png", "a/2.png", "dataset[2]", "dataset[3]", "a/3.png"]
    assert [item.ref.path for item in loaded_from(Rows(rows))] == expected
    assert [ref.path for ref in iter_refs(rows)] == expected


BAD: list[tuple[object, str]] = [
    (ValueError("no such\nmember"), "cannot be read: no such member"),
    (OSError(2, "No such file or directory"), "cannot be read: [errno 2] no such file or directory"),
    (None, "not an image but a NoneType"),
    (7, "not an image but a int"),
    ({"label": 1}, "no picture under 'image' or 'img'"),
    ({"image": None, "label": 1}, "no picture under 'image' or 'img'"),
    ({"image": {"bytes": None, "path": None}}, "no picture under 'image' or 'img'"),
    (b"no picture", "not an image in a format that can be decoded"),
    ("missing.png", "no such file or directory"),
    (np.zeros((5, 6, 2), np.uint8), "not an array of shape (5, 6, 2)"),
    (np.zeros((2, 5, 6, 3), np.uint8), "2 or 3 dimensions, not 4"),
    (np.full((5, 6), 1.5), "float pixels must lie in [0, 1]"),
    (torch.zeros(3, 5, 6), "a float tensor"),
]


@pytest.mark.parametrize(("item", "words"), BAD, ids=lambda value: type(value).__name__)
def test_a_bad_item_is_a_row_with_a_reason(item: object, words: str) -> None:
    loaded = loaded_from(Items([grey(10), item, grey(30)]))
    assert values(loaded) == [10, None, 30]
    assert words in loaded[1].reason.lower() or words in loaded[1].reason

    if not isinstance(item, Exception):
        loaded = list(iter_loaded(iter_refs([grey(10), item, grey(30)]), to_tensor))
        assert values(loaded) == [10, None, 30]
        assert words in loaded[1].reason


def test_a_first_item_that_fails_is_a_row() -> None:
    loaded = loaded_from(Items([RuntimeError("broken"), grey(20)]))
    assert [item.reason for item in loaded] == ["cannot be read: broken", ""]
    assert not is_loader(Rows([{"label": 1}, {"image": grey(2)}]))


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.zeros(4, 3, 8, 9), torch.zeros(4)),
        Items([{"image": torch.zeros(3, 8, 9)}]),
        Items([{"pixel_values": torch.zeros(3, 8, 9), "label": 1}]),
    ],
    ids=["tensors", "rows", "processed"],
)
def test_prepared_tensors_are_refused_with_both_ways_out(dataset: Any) -> None:
    with pytest.raises(UsageError, match=r"\(3, 8, 9\).*DataLoader.*transform") as error:
        list_images(dataset)
    assert "\n" not in str(error.value)
    if not isinstance(dataset[0], dict) or "image" in dataset[0]:
        with pytest.raises(UsageError, match=r"\(3, 8, 9\).*DataLoader.*transform"):
            next(iter_refs(dataset[i] for i in range(1)))


def test_a_dataset_is_read_once_in_order_on_one_thread() -> None:
    dataset = Items([grey(value) for value in range(60)])
    refs = list_images(dataset)
    assert all(ref.sequential for ref in refs)
    dataset.order.clear()  # the first item was looked at
    assert values(list(iter_loaded(refs, to_tensor, workers=8))) == [*range(60)]
    assert dataset.order == [*range(60)]
    assert dataset.threads == {threading.get_ident()}


def test_a_dataset_beside_other_images_keeps_its_rows(folder: Path) -> None:
    same = Items([grey(10), grey(10)])
    refs = list_images([folder / "10.png", same, Items([grey(30)])])
    assert [ref.path for ref in refs] == [f"{folder}/10.png", "dataset[1][0]", "dataset[1][1]", "dataset[2][0]"]


def test_an_empty_dataset_holds_no_images() -> None:
    with pytest.raises(UsageError, match="no images"):
        list_images(Items([]))


# ---- ImageFolder ----


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for i, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for j in range(3):
            grey(100 * i + j).save(tmp_path / name / f"{j}.png")
    return tmp_path


def test_image_folder_is_as_good_as_the_folder(classes: Path) -> None:
    """The same names, the same digests (so the same features in the cache), and decoded in parallel."""
    plain = loaded_from(classes)
    loaded = loaded_from(ImageFolder(str(classes)))
    assert [item.ref.path for item in loaded] == [item.ref.path for item in plain]
    assert [item.digest for item in loaded] == [item.digest for item in plain]
    assert not any(ref.sequential for ref in list_images(ImageFolder(str(classes))))


def test_image_folder_with_a_transform_goes_through_it(classes: Path) -> None:
    inverted = ImageFolder(str(classes), transform=lambda picture: picture.point(lambda value: 255 - value))
    loaded = loaded_from(inverted)
    assert values(loaded) == [255, 254, 253, 155, 154, 153]
    assert [item.ref.path for item in loaded] == [path for path, _ in inverted.samples]
    assert all(item.ref.sequential for item in loaded)


def test_image_folder_with_a_loader_of_its_own_goes_through_it(classes: Path) -> None:
    loaded = loaded_from(ImageFolder(str(classes), loader=lambda path: grey(int(Path(path).stem) + 50)))
    assert values(loaded) == [50, 51, 52, 50, 51, 52]


def test_image_folder_of_tensors_is_refused(classes: Path) -> None:
    with pytest.raises(UsageError, match=r"\(3, 4, 4\).*drop its transform"):
        list_images(ImageFolder(str(classes), transform=v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32)])))


def test_a_part_of_an_image_folder_has_its_names_and_a_row_for_each_item(classes: Path) -> None:
    whole = ImageFolder(str(classes))
    loaded = loaded_from(Subset(whole, [4, 1, 4]))
    assert values(loaded) == [101, 1, 101]
    assert [item.ref.path for item in loaded] == [whole.samples[i][0] for i in (4, 1, 4)]


def test_a_broken_file_in_an_image_folder_is_a_row(classes: Path) -> None:
    (classes / "a" / "1.png").write_bytes(b"\x89PNG nothing")
    for dataset in (ImageFolder(str(classes)), ImageFolder(str(classes), transform=lambda picture: picture)):
        assert values(loaded_from(dataset)) == [0, None, 2, 100, 101, 102]


# ---- streams ----


def prepare(refs: Any) -> Iterator[Batch]:
    return iter_batches(iter_loaded(refs, to_tensor, workers=2, ahead=4), 2)


def greys_of(stream: Any) -> list[int | None]:
    """The grey value of each image of a stream; None where it could not be read."""
    found: list[int | None] = []
    for batch in batches_from_stream(stream, prepare):
        own: list[int | None] = [None] * len(batch.loaded)
        for stack in batch.stacks:
            for position, pixels in zip(stack.positions, stack.pixels, strict=True):
                own[position] = int(pixels[0, 0, 0])
        found += own
    return found


def test_nothing_of_a_generator_is_lost_by_looking() -> None:
    assert greys_of(grey(value) for value in range(5)) == [0, 1, 2, 3, 4]
    ready = torch.rand(7, 3, 4, 4)
    (*batches,) = batches_from_stream(iter(ready.split(3)), prepare)
    assert torch.equal(torch.cat([stack.pixels for batch in batches for stack in batch.stacks]), ready)
    assert greys_of(iter([])) == []


def test_a_stream_is_read_no_further_than_needed() -> None:
    read: list[int] = []

    def stream() -> Iterator[Image.Image]:
        for value in range(1000):
            read.append(value)
            yield grey(value % 256)

    batches = batches_from_stream(stream(), prepare)
    assert read == []
    next(batches)
    assert 2 <= len(read) <= 8


def test_a_loader_of_single_pictures_is_a_stream() -> None:
    dataset = Items([(grey(value), value) for value in (3, 5)])
    assert greys_of(DataLoader(dataset, batch_size=None, collate_fn=lambda item: item)) == [3, 5]


@pytest.mark.parametrize("item", [7, None, {"label": 1}, torch.zeros(2, 3, 4, 4, dtype=torch.uint8)])
def test_a_stream_of_something_else_is_refused(item: object) -> None:
    with pytest.raises(UsageError, match=r"a loader must give .*\(B, C, H, W\)"):
        greys_of(iter([item]))


def test_a_stream_cannot_be_listed() -> None:
    with pytest.raises(UsageError, match="read only once"):
        list_images(grey(value) for value in range(3))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Items([grey(1)]), True),
        (Rows([{"image": grey(1)}]), True),
        (TensorDataset(torch.zeros(2, 3, 4, 4)), True),
        (DataLoader(TensorDataset(torch.zeros(2, 3, 4, 4))), False),
        ((item for item in [grey(1)]), False),
        ([grey(1)], False),
        ({"train": [grey(1)]}, False),
        ("images/", False),
        (b"images/", False),
        (np.zeros((2, 4, 4, 3)), False),
        (torch.zeros(2, 3, 4, 4), False),
        (grey(1), False),
        (None, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_a_map_style_dataset(source: object, expected: bool) -> None:
    assert is_map_style(source) is expected


def test_a_sequence_of_ready_batches_is_still_a_loader() -> None:
    assert is_loader(Rows([torch.zeros(2, 3, 4, 4)]))  # type: ignore[list-item]
    assert not is_loader(Rows([{"image": grey(1)}]))
    assert not is_loader({"train": Rows([])})


def test_a_reference_of_ones_own_needs_no_more_than_read() -> None:
    class Own(ImageRef):
        def read(self) -> Image.Image:
            return grey(9)

    assert values(list(iter_loaded([Own("x"), Own("y")], to_tensor))) == [9, 9]
    assert len(list_images([Own("x"), Own("y"), Own("x")])) == 2
