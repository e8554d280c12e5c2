"""A small built-in image set, so that everything can be tried with no download and no folder.

In-domain: disjoint square tiles of the two photographs that scikit-learn ships (a temple, a flower).
Far OOD: scikit-learn's handwritten digits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

TILE = 32  # pixels; gives 520 tiles
_TEST_SHARE = 4  # every fourth tile is kept for testing
# Of the set in which some images are odd: digits, and tiles among them, evenly spread over both photographs.
_MIXED_DIGITS = 120
_ODD, _ODD_STEP = 8, 16


def tiles() -> tuple[dict[str, Image.Image], dict[str, Image.Image]]:
    """The in-domain tiles. Neighbouring tiles look alike, but no pixel is in two of them.

    Returns
    -------
    train, test : dict of str to PIL image
        390 and 130 tiles, by file name.

    Examples
    --------
    >>> train, test = tiles()
    >>> len(train), len(test)
    (390, 130)
    """
    from sklearn.datasets import load_sample_images

    data = load_sample_images()
    train: dict[str, Image.Image] = {}
    test: dict[str, Image.Image] = {}
    for file, photograph in zip(data.filenames, data.images, strict=True):
        rows = photograph.shape[0] // TILE
        columns = photograph.shape[1] // TILE
        for number in range(rows * columns):
            row, column = divmod(number, columns)
            tile = photograph[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]

            group = test if number % _TEST_SHARE == 0 else train
            group[f"{Path(file).stem}_{row:02d}_{column:02d}.png"] = Image.fromarray(tile)
    return train, test


def digits(count: int = 200) -> dict[str, Image.Image]:
    """Handwritten digits (8 x 8, grey), enlarged to the size of the tiles.

    Parameters
    ----------
    count : int, default 200
        How many; at most 1,797.

    Returns
    -------
    dict of str to PIL image
        By file name.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    arrays = (np.asarray(data.images[:count]) * (255 / 16)).astype(np.uint8)

    images = {}
    for i, (array, label) in enumerate(zip(arrays, data.target[:count], strict=True)):
        name = f"digit_{i:04d}_{label}.png"
        images[name] = Image.fromarray(array).resize((TILE, TILE), Image.Resampling.BICUBIC)
    return images


def mixed() -> dict[str, Image.Image]:
    """Digits with a few tiles among them: a set in which some images are odd.

    Returns
    -------
    dict of str to PIL image
        120 digits and 8 of the test tiles, by file name.

    Examples
    --------
    >>> names = list(mixed())
    >>> len(names), sum(name.startswith("digit") for name in names)
    (128, 120)
    """
    _, test = tiles()
    return dict(list(test.items())[::_ODD_STEP][:_ODD]) | digits(_MIXED_DIGITS)


def write(folder: Path) -> dict[str, Path]:
    """Write tiles and digits as PNG files.

    Parameters
    ----------
    folder : Path
        Made when missing.

    Returns
    -------
    dict of str to Path
        The folders ``train``, ``test`` and ``digits`` below ``folder``, by name.
    """
    train, test = tiles()
    folders = {}
    for name, images in (("train", train), ("test", test), ("digits", digits())):
        folders[name] = write_images(images, folder / name)
    return folders


def write_images(images: dict[str, Image.Image], folder: Path) -> Path:
    """Write images by file name into a folder, which is made when missing; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, image in images.items():
        image.save(folder / file)
    return folder
