"""The built-in sample set: disjoint tiles of two photographs, and digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from featdiff.data import samples


def place(name: str) -> tuple[str, int, int]:
    """``china_03_12.png`` -> (photograph, row, column)."""
    photograph, row, column = Path(name).stem.split("_")
    return photograph, int(row), int(column)


@pytest.fixture(scope="module")
def tiles() -> tuple[dict[str, Image.Image], dict[str, Image.Image]]:
    return samples.tiles()


def test_numbers_of_tiles(tiles: tuple[dict[str, Image.Image], dict[str, Image.Image]]) -> None:
    train, test = tiles
    assert (len(train), len(test)) == (390, 130)
    assert {place(name)[0] for name in train} == {place(name)[0] for name in test} == {"china", "flower"}


def test_each_tile_is_the_named_place_of_its_photograph(
    tiles: tuple[dict[str, Image.Image], dict[str, Image.Image]],
) -> None:
    data = load_sample_images()
    photographs = {Path(f).stem: image for f, image in zip(data.filenames, data.images, strict=True)}
    for name, tile in {**tiles[0], **tiles[1]}.items():
        photograph, row, column = place(name)
        there = photographs[photograph][32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        assert tile.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(tile), there)


def test_no_place_and_no_content_is_both_in_train_and_test(
    tiles: tuple[dict[str, Image.Image], dict[str, Image.Image]],
) -> None:
    """Tiles stand on a grid of their own size, so different places share no pixel."""
    train, test = tiles
    assert not set(train) & set(test)
    assert not {tile.tobytes() for tile in train.values()} & {tile.tobytes() for tile in test.values()}


def test_tiles_are_the_same_every_time(
    tiles: tuple[dict[str, Image.Image], dict[str, Image.Image]],
) -> None:
    again = samples.tiles()
    for one, other in zip(tiles, again, strict=True):
        assert list(one) == list(other)
        assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_digits_have_the_size_of_tiles_and_their_label_in_the_name() -> None:
    found = samples.digits(20)
    labels = load_digits().target
    assert list(found)[:3] == ["digit_0000_0.png", "digit_0001_1.png", "digit_0002_2.png"]
    for i, (name, image) in enumerate(found.items()):
        assert name == f"digit_{i:04d}_{labels[i]}.png"
        assert (image.size, image.mode) == ((32, 32), "L")
        pixels = np.asarray(image)
        assert pixels.min() < 30 and pixels.max() > 225  # the whole range of grey is used


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (1, 1), (200, 200), (5000, 1797)])
def test_number_of_digits(asked: int, given: int) -> None:
    assert len(samples.digits(asked)) == given


def test_a_few_tiles_among_digits(tmp_path: Path) -> None:
    mixed = samples.mixed()
    odd = [name for name in mixed if not name.startswith("digit_")]
    assert (len(mixed), len(odd)) == (128, 8)
    assert {place(name)[0] for name in odd} == {"china", "flower"}
    assert {name: image.tobytes() for name, image in samples.digits(120).items()}.items() <= {
        name: image.tobytes() for name, image in mixed.items()
    }.items()

    folder = samples.write_images(mixed, tmp_path / "new" / "mixed")
    assert sorted(file.name for file in folder.iterdir()) == sorted(mixed)
    with Image.open(folder / odd[0]) as stored:
        np.testing.assert_array_equal(np.asarray(stored), np.asarray(mixed[odd[0]]))


def test_written_files_hold_the_pixels(sample_folders: dict[str, Path]) -> None:
    train, test = samples.tiles()
    sets = {"train": train, "test": test, "digits": samples.digits()}
    assert set(sample_folders) == set(sets)
    for name, images in sets.items():
        assert sorted(file.name for file in sample_folders[name].iterdir()) == sorted(images)
        first = next(iter(images))
        with Image.open(sample_folders[name] / first) as stored:
            np.testing.assert_array_equal(np.asarray(stored), np.asarray(images[first]))


def test_writing_twice_gives_the_same_files(sample_folders: dict[str, Path]) -> None:
    root = sample_folders["train"].parent
    before = {file: file.read_bytes() for file in root.rglob("*.png")}
    assert samples.write(root) == sample_folders
    assert {file: file.read_bytes() for file in root.rglob("*.png")} == before
