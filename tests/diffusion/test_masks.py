"""Masks: shapes, shares, and what inverting, drawing and scaling must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featdiff.diffusion.masks import MASKS, center, checkerboard, from_picture, make_masks, random_patches
from featdiff.exceptions import UsageError

SIZES = (4, 16, 28, 32, 33, 96)


def divisors(size: int) -> list[int]:
    return [n for n in range(2, size + 1) if size % n == 0]


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("size", "blocks"), [(size, blocks) for size in SIZES for blocks in divisors(size)])
def test_checkerboards_alternate_and_complete_each_other(size: int, blocks: int) -> None:
    even, odd = checkerboard(size, blocks), checkerboard(size, blocks, odd=True)
    assert even.shape == (size, size) and even.dtype == torch.bool
    assert torch.equal(even, ~odd)
    cell = size // blocks
    cells = even.reshape(blocks, cell, blocks, cell)
    assert (cells == cells[:, :1, :, :1]).all()  # each cell is of one kind
    board = cells[:, 0, :, 0]
    assert board[0, 0]
    assert (board[1:] != board[:-1]).all() and (board[:, 1:] != board[:, :-1]).all()
    assert even.sum() == (size * size + (cell * cell if blocks % 2 else 0)) // 2


@pytest.mark.parametrize("size", SIZES)
def test_the_centre_is_unknown_and_the_rim_known(size: int) -> None:
    known = center(size)
    quarter = size // 4
    assert int((~known).sum()) == (size - 2 * quarter) ** 2
    assert known[:quarter].all() and known[-quarter:].all() and known[:, :quarter].all() and known[:, -quarter:].all()
    assert torch.equal(known, known.T) and torch.equal(known, known.flip(0))


@pytest.mark.parametrize(
    ("size", "patch"), [(s, p) for s in SIZES for p in (1, 2, 4, 7, 8, 16) if s % p == 0 and s > p]
)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_random_patches_hide_the_share_that_is_asked_for(size: int, patch: int, ratio: float) -> None:
    known = random_patches(size, patch, ratio, source())
    side = size // patch
    cells = known.reshape(side, patch, side, patch)
    assert (cells == cells[:, :1, :, :1]).all()
    hidden = int((~cells[:, 0, :, 0]).sum())
    assert 0 <= hidden - ratio * side * side < 1
    assert torch.equal(known, random_patches(size, patch, ratio, source()))


def test_random_patches_differ_with_the_seed() -> None:
    boards = [random_patches(32, 4, 0.5, source(seed)) for seed in range(4)]
    assert not any(torch.equal(a, b) for i, a in enumerate(boards) for b in boards[:i])


def test_alternating_boards_invert_on_odd_repetitions() -> None:
    masks = make_masks("checkerboard_alt", 32, 5, blocks=4)
    assert masks.shape == (5, 32, 32)
    for i, mask in enumerate(masks):
        assert torch.equal(mask, checkerboard(32, 4, odd=i % 2 == 1))
    assert (make_masks("checkerboard", 32, 3, blocks=4) == checkerboard(32, 4)).all()


def test_random_masks_differ_between_repetitions_and_follow_the_seed() -> None:
    masks = make_masks("random", 32, 3, patch=8, seed=5)
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks, make_masks("random", 32, 3, patch=8, seed=5))
    assert not torch.equal(masks, make_masks("random", 32, 3, patch=8, seed=6))


@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_leaves_something_to_go_by_and_something_to_fill_in(kind: str) -> None:
    for mask in make_masks(kind, 32, 4):
        assert mask.any() and not mask.all()


def picture(file: Path, values: np.ndarray) -> Path:
    Image.fromarray(values.astype(np.uint8)).save(file)
    return file


def test_a_picture_is_a_mask_and_is_enlarged(tmp_path: Path) -> None:
    file = picture(tmp_path / "mask.png", np.array([[255, 0], [127, 128]]))
    assert from_picture(file, 2).tolist() == [[True, False], [False, True]]
    large = make_masks(str(file), 8, 2)
    assert large.shape == (2, 8, 8)
    assert large[1, :4, :4].all() and not large[1, :4, 4:].any() and large[1, 4:, 4:].all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "checkerboard", "blocks": 7}, ["mask_blocks 7", "32 pixels", "2, 4, 8, 16, 32"]),
        ({"kind": "checkerboard", "blocks": 1}, ["mask_blocks 1"]),
        ({"kind": "checkerboard", "blocks": 0}, ["mask_blocks 0"]),
        ({"kind": "checkerboard_alt", "blocks": True}, ["mask_blocks True"]),
        ({"kind": "random", "patch": 5}, ["mask_patch 5", "1, 2, 4, 8, 16"]),
        ({"kind": "random", "patch": 32}, ["mask_patch 32"]),
        ({"kind": "random", "ratio": 0.0}, ["mask_ratio", "0.0"]),
        ({"kind": "random", "ratio": 1.0}, ["mask_ratio", "1.0"]),
        ({"kind": "random", "patch": 16, "ratio": 0.99}, ["nothing to go by"]),
        ({"kind": "chekerboard"}, ["'chekerboard'", "did you mean checkerboard"]),
        ({"kind": "nowhere/mask.png"}, ["nowhere/mask.png", "path of a picture"]),
    ],
)
def test_masks_that_do_not_fit_are_refused(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        make_masks(size=32, repetitions=2, **arguments)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.eye(3) * 255, ["3 x 3", "must divide 32"]),
        (np.ones((8, 4)) * 255, ["4 x 8"]),
        (np.eye(64) * 255, ["64 x 64"]),
    ],
)
def test_pictures_that_cannot_be_masks_are_refused(tmp_path: Path, values: np.ndarray, words: list[str]) -> None:
    file = picture(tmp_path / "mask.png", values)
    with pytest.raises(UsageError) as error:
        from_picture(file, 32)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("shade", "word"), [(0, "go by"), (255, "fill in")])
def test_pictures_of_one_shade_are_refused(tmp_path: Path, shade: int, word: str) -> None:
    file = picture(tmp_path / "mask.png", np.full((8, 8), shade))
    with pytest.raises(UsageError, match=f"leaves nothing to {word} at 32 pixels"):
        make_masks(str(file), 32, 2)


def test_files_that_are_not_pictures_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mask.png"
    file.write_text("no picture")
    with pytest.raises(UsageError, match="not an image"):
        from_picture(file, 32)
    with pytest.raises(UsageError, match="cannot be read"):
        from_picture(tmp_path, 32)
