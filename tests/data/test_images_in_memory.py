"""Pictures, arrays and tensors as images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from image_files import (
    reason_of,
    to_tensor,
)
from PIL import Image

from featdiff.data.batches import iter_loaded
from featdiff.data.decoding import decode
from featdiff.data.references import (
    list_images,
)
from featdiff.exceptions import UsageError

# ---- images in memory ----


def held(source: object) -> np.ndarray:
    """The decoded RGB pixels (H, W, 3) of the one image in ``source``."""
    (ref,) = list_images(source)
    return np.asarray(decode(ref.read()))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_pil_image(pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    assert np.array_equal(held(image), pixels)
    assert [ref.path for ref in list_images([image, image])] == ["image[0]", "image[1]"]


def test_arrays_of_uint8(pixels: np.ndarray) -> None:
    grey = pixels[:, :, 0]
    assert np.array_equal(held(pixels), pixels)
    assert np.array_equal(held(pixels[:, ::-1]), pixels[:, ::-1])
    assert np.array_equal(held(grey), np.stack([grey] * 3, axis=2))
    assert np.array_equal(held(grey[:, :, None]), np.stack([grey] * 3, axis=2))


def test_arrays_with_channels_first(pixels: np.ndarray) -> None:
    first = pixels.transpose(2, 0, 1)  # (3, 5, 7)
    assert np.array_equal(held(first), pixels)
    assert np.array_equal(held((first / 255).astype(np.float32)), pixels)
    assert np.array_equal(held(first[:1]), np.stack([pixels[:, :, 0]] * 3, axis=2))
    refs = list_images(np.stack([first, 255 - first]))
    assert [ref.path for ref in refs] == ["array[0][0]", "array[0][1]"]
    assert np.array_equal(np.asarray(decode(refs[1].read())), 255 - pixels)


def test_tensors_with_channels_last(pixels: np.ndarray) -> None:
    assert np.array_equal(held(torch.from_numpy(pixels)), pixels)
    refs = list_images(torch.from_numpy(np.stack([pixels, 255 - pixels])))
    assert np.array_equal(np.asarray(decode(refs[1].read())), 255 - pixels)


def test_of_two_possible_orders_an_array_has_its_channels_last_and_a_tensor_first() -> None:
    both = np.random.default_rng(1).integers(0, 256, (3, 8, 3), dtype=np.uint8)
    assert np.array_equal(held(both), both)
    assert np.array_equal(held(torch.from_numpy(both)), both.transpose(1, 2, 0))


def test_array_with_alpha_is_laid_on_white(pixels: np.ndarray) -> None:
    alpha = np.zeros((5, 7, 1), np.uint8)
    alpha[2:] = 255
    found = held(np.concatenate([pixels, alpha], axis=2))
    assert (found[:2] == 255).all()
    assert np.array_equal(found[2:], pixels[2:])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_arrays_of_floats_are_scaled_by_255(dtype: str) -> None:
    levels = np.arange(256).reshape(16, 16)
    assert np.array_equal(held((levels / 255).astype(dtype))[:, :, 1], levels)


def test_floats_use_a_fixed_scale_not_their_own_range() -> None:
    found = held(np.array([[0.2, 0.003, 0.999], [0.2, 0.2, 0.2]], np.float32))
    assert found[0, :, 0].tolist() == [51, 1, 255]  # rounded, not cut off


def test_array_batch(pixels: np.ndarray) -> None:
    refs = list_images(["-", np.stack([pixels, 255 - pixels])], io.BytesIO())
    assert [ref.path for ref in refs] == ["array[1][0]", "array[1][1]"]
    assert np.array_equal(np.asarray(decode(refs[1].read())), 255 - pixels)


def test_tensors(pixels: np.ndarray) -> None:
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    assert np.array_equal(held(chw), pixels)
    assert np.array_equal(held((chw / 255).requires_grad_()), pixels)
    assert np.array_equal(held(chw[:1]), np.stack([pixels[:, :, 0]] * 3, axis=2))
    assert np.array_equal(held(chw[0]), np.stack([pixels[:, :, 0]] * 3, axis=2))
    refs = list_images(torch.stack([chw, 255 - chw]))
    assert [ref.path for ref in refs] == ["array[0][0]", "array[0][1]"]
    assert np.array_equal(np.asarray(decode(refs[1].read())), 255 - pixels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_every_float_type(dtype: torch.dtype) -> None:
    image = torch.zeros(3, 4, 4, dtype=dtype)
    image[0] = 1
    assert (held(image) == [255, 0, 0]).all()


BAD_ARRAYS: dict[str, tuple[np.ndarray | torch.Tensor, str]] = {
    "above 1": (np.full((4, 4), 1.5), r"\[0, 1\]"),
    "below 0": (np.full((4, 4, 3), -0.01, np.float32), r"\[0, 1\]"),
    "nan": (np.full((4, 4), np.nan), "NaN"),
    "infinite": (np.full((4, 4), np.inf), "infinite"),
    "int64": (np.zeros((4, 4), np.int64), "int64"),
    "uint16": (np.zeros((4, 4), np.uint16), "uint16"),
    "bool": (np.zeros((4, 4), bool), "bool"),
    "complex": (np.zeros((4, 4), complex), "complex"),
    "two channels": (np.zeros((5, 6, 2), np.uint8), r"\(H, W, C\) or \(C, H, W\).*\(5, 6, 2\)"),
    "five channels": (np.zeros((5, 6, 7), np.uint8), r"\(H, W, C\) or \(C, H, W\).*\(5, 6, 7\)"),
    "tensor of two channels": (torch.zeros(2, 8, 9), r"\(H, W, C\) or \(C, H, W\).*\(2, 8, 9\)"),
    "no rows": (np.zeros((0, 4, 3), np.uint8), "empty"),
    "no columns": (torch.zeros(3, 4, 0), "empty"),
    "1-d": (np.zeros(4, np.uint8), "2 to 4 dimensions, not 1"),
    "5-d": (np.zeros((1, 1, 1, 4, 4), np.uint8), "2 to 4 dimensions, not 5"),
    "names": (np.array(["a.png"]), "dimensions"),
    "no images": (np.zeros((0, 4, 4, 3), np.uint8), "no images"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_array_that_is_no_image_alone_says_why(kind: str) -> None:
    """Given alone it may be refused at once, or be a row; the words must say what is wrong."""
    array, words = BAD_ARRAYS[kind]
    with pytest.raises(UsageError, match=words):
        refs = list_images(array)
        raise UsageError("; ".join(reason_of(ref) for ref in refs))


@pytest.mark.parametrize("kind", [kind for kind, (array, _) in BAD_ARRAYS.items() if array.ndim in (2, 3)])
def test_array_that_is_no_image_is_a_row_beside_others(kind: str) -> None:
    array, words = BAD_ARRAYS[kind]
    good, bad = list_images([np.zeros((4, 4), np.uint8), array])
    assert reason_of(good) == ""
    assert bad.path == "array[1]"
    with pytest.raises(UsageError, match=words):
        raise UsageError(reason_of(bad))


def test_one_bad_image_of_a_batch_is_a_row() -> None:
    batch = torch.zeros(3, 3, 4, 4)
    batch[1, 0, 0, 0] = float("nan")
    assert [bool(reason_of(ref)) for ref in list_images(batch)] == [False, True, False]


@pytest.mark.timeout(60)
def test_picture_opened_but_not_loaded_may_be_given_many_times() -> None:
    """Pillow reads the file on first use; two threads must not do that at once."""
    stream, tags = io.BytesIO(), Image.Exif()
    tags[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG", exif=tags)
    expected = to_tensor(decode(stream.getvalue()))
    for _ in range(10):
        refs = list_images([Image.open(io.BytesIO(stream.getvalue()))] * 6)
        loaded = list(iter_loaded(refs, to_tensor, workers=6))
        assert [item.reason for item in loaded] == [""] * 6
        assert all(torch.equal(item.pixels, expected) for item in loaded)  # type: ignore[arg-type]
