"""Pictures, arrays, tensors, bytes and open files -> references to images."""

from __future__ import annotations

import inspect
import os
from typing import Any

import numpy as np
from PIL import Image

from ..exceptions import UnreadableImage, UsageError
from .image_refs import HeldRef, ImageRef, MissingRef, StreamRef, printable

#: Numbers of channels that a picture may have.
CHANNELS = (1, 3, 4)


def refs_in_memory(item: object, number: int) -> list[ImageRef]:
    """A picture, an array, a tensor, the content of a file, or an open file; of a stack of images, one reference each.

    Parameters
    ----------
    item : PIL image, array, tensor, bytes, or open binary file
    number : int
        Its position in the list that it came in, for its name.

    Returns
    -------
    list of ImageRef

    Raises
    ------
    UsageError
        Something else, or an array that cannot be an image whatever its shape means.
    """
    if isinstance(item, Image.Image):
        return [HeldRef(f"image[{number}]", item)]
    if isinstance(item, bytes | bytearray | memoryview):
        return [HeldRef(f"bytes[{number}]", bytes(item))]
    if is_open_file(item):
        return [stream_ref(item, f"file[{number}]")]

    if not is_array(item):
        raise UsageError(
            f"images cannot come from a {type(item).__name__}; give paths, PIL images, arrays, tensors, bytes or open "
            "files, or a dataset of them"
        )
    array: Any = item
    if array.ndim not in (2, 3, 4):
        raise UsageError(f"an image array has 2 to 4 dimensions, not {array.ndim}")

    label = f"array[{number}]"
    if array.ndim < 4:
        return [_array_ref(label, array)]
    return [_array_ref(f"{label}[{i}]", image) for i, image in enumerate(array)]


def is_file_content(item: object) -> bool:
    """Whether ``item`` is in the place of an image file: its bytes, or an open file."""
    return isinstance(item, bytes | bytearray | memoryview) or is_open_file(item)


def is_open_file(item: object) -> bool:
    """Whether ``item`` is an open file, a ``BytesIO`` or a stream; other things have a ``read`` of another kind."""
    if isinstance(item, ImageRef) or not callable(getattr(item, "read", None)):
        return False
    return callable(getattr(item, "seek", None)) or callable(getattr(item, "readable", None))


def stream_ref(stream: Any, label: str) -> ImageRef:
    """A reference to an open file, under its own name if it has one."""
    name = getattr(stream, "name", None) or getattr(stream, "filename", None)
    path = printable(name) if isinstance(name, str | os.PathLike) else label
    if inspect.iscoroutinefunction(stream.read):
        return MissingRef(path, "its read() must be awaited: give the bytes that come of it")
    return StreamRef(path, stream)


def is_array(item: object) -> bool:
    """Whether ``item`` is an array or a tensor."""
    return isinstance(item, np.ndarray) or is_tensor(item)


def is_tensor(item: object) -> bool:
    """Whether ``item`` is a torch tensor, told without importing torch."""
    return hasattr(item, "detach") and hasattr(item, "cpu")


def _array_ref(label: str, image: Any) -> ImageRef:
    try:
        return HeldRef(label, picture_of(image))
    except UnreadableImage as error:
        return MissingRef(label, str(error))


def picture_of(image: Any) -> Image.Image:
    """An array or tensor of one image -> a picture.

    uint8 is taken as it is, floats in [0, 1] are scaled to uint8. Of an array, the last dimension holds the channels if
    it is 1, 3 or 4 long, else the first, if that is; of a tensor the first, else the last. (H, W) is grey.

    Parameters
    ----------
    image : array or tensor of shape (H, W), (H, W, C) or (C, H, W)

    Returns
    -------
    PIL image

    Raises
    ------
    UnreadableImage
        Anything else; the message is the reason shown to users.

    Examples
    --------
    >>> picture_of(np.zeros((3, 10, 20), np.uint8)).size  # width and height
    (20, 10)
    """
    first_is_usual = is_tensor(image)
    if first_is_usual:
        tensor = image.detach().cpu()
        image = (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy has no bfloat16
    if image.ndim not in (2, 3):
        raise UnreadableImage(f"an image array has 2 or 3 dimensions, not {image.ndim}")

    image = _channels_last(image, first_is_usual)
    if 0 in image.shape:
        raise UnreadableImage("an empty array")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    return Image.fromarray(_to_uint8(image))


def _channels_last(image: np.ndarray, first_is_usual: bool) -> np.ndarray:
    """(H, W, C) from either order of dimensions; (H, W) as it is."""
    if image.ndim == 2:
        return image

    order = (0, 2) if first_is_usual else (2, 0)
    for axis in order:
        if image.shape[axis] in CHANNELS:
            return np.moveaxis(image, axis, -1)
    raise UnreadableImage(
        "an image is (H, W, C) or (C, H, W) with 1, 3 or 4 channels, not an array of shape "
        f"{tuple(int(side) for side in image.shape)}"
    )


def _to_uint8(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image

    if not np.issubdtype(image.dtype, np.floating):
        raise UnreadableImage(f"pixels are uint8 or floats in [0, 1], not {image.dtype}")
    if not np.isfinite(image).all():
        raise UnreadableImage("NaN or infinite pixels")
    if image.min() < 0 or image.max() > 1:
        raise UnreadableImage("float pixels must lie in [0, 1]; give a DataLoader for images already normalised")
    return np.round(image * 255).astype(np.uint8)
