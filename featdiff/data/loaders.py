"""Whatever the user named -> batches: names of images, single images from a stream, or batches that are ready."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeGuard

from PIL import Image

from ..exceptions import UsageError
from .batches import Batch, LoadedImage, Stack, digest_of, iter_batches, iter_loaded
from .datasets import is_image, is_map_style, iter_refs
from .decoding import MAX_PIXELS, Transform
from .limits import MAX_BYTES
from .memory import is_array, is_file_content, is_tensor
from .references import ImageRef, list_images

if TYPE_CHECKING:
    from torch import Tensor


def read_batches(
    images: object,
    transform: Callable[[], Transform],
    size: int,
    known: Container[bytes] = (),
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> tuple[Iterator[Batch], int]:
    """Decoded batches of whatever the user named.

    Parameters
    ----------
    images : object
        As for :func:`featdiff.data.references.list_images`, or a loader or generator, see :func:`batches_from_stream`.
    transform : callable
        Gives the transform; called only if there is something to prepare.
    size : int
        Images of a stack, at most.
    known, workers, max_pixels, max_bytes
        As for :func:`iter_loaded`.

    Returns
    -------
    batches : iterator of Batch
    total : int
        How many images there are, 0 if unknown.
    """

    def prepare(refs: Iterable[ImageRef]) -> Iterator[Batch]:
        loaded = iter_loaded(refs, transform(), workers, max_pixels, known, ahead=2 * size, max_bytes=max_bytes)
        return iter_batches(loaded, size)

    if is_loader(images):
        return batches_from_stream(images, prepare, known), 0
    refs = list_images(images)
    return prepare(refs), len(refs)


def is_loader(source: object) -> TypeGuard[Iterable[object]]:
    """Whether ``source`` yields ready batches or images (a DataLoader, a generator) rather than naming images."""
    named = isinstance(source, str | os.PathLike | list | tuple | Mapping | Image.Image)
    if named or is_array(source) or is_file_content(source) or not hasattr(source, "__iter__"):
        return False
    return not is_map_style(source) or _begins_with_batch(source)


def _begins_with_batch(dataset: Any) -> bool:
    try:
        return is_batch(dataset[0])
    except Exception:  # becomes a row with a reason
        return False


def is_batch(item: object) -> bool:
    """Whether ``item`` is what a loader yields: preprocessed images, alone or with labels."""
    try:
        _pixels_of(item)
    except UsageError:
        return False
    return True


def _pixels_of(item: object) -> Tensor:
    """The images in an item of a loader (``UsageError`` if there are none)."""
    pixels: Any = item
    if isinstance(item, Mapping):
        pixels = item.get("pixel_values")  # as Hugging Face's processors call it
    elif isinstance(item, tuple | list) and item:
        pixels = item[0]

    if is_tensor(pixels) and pixels.ndim == 4 and pixels.is_floating_point():
        return pixels

    actual = type(item).__name__
    if is_tensor(pixels):
        actual = f"{pixels.dtype} of shape {tuple(pixels.shape)}"
    raise UsageError(
        "a loader must give preprocessed (B, C, H, W) float tensors, alone, first in a tuple, or as 'pixel_values', "
        f"not {actual}"
    )


def peek_size(loader: Iterable[object]) -> tuple[Iterable[object], tuple[int, ...] | None]:
    """A loader's batches, the first of them still included, and the size (C, H, W) of its images.

    The size is None if there are no batches, or if single images come, which are still to be prepared.
    """
    items = iter(loader)
    for first in items:
        whole = chain([first], items)
        if not is_batch(first) and is_image(first):
            return whole, None
        return whole, tuple(_pixels_of(first).shape[1:])
    return (), None


def batches_from_stream(
    stream: Iterable[object],
    prepare: Callable[[Iterable[ImageRef]], Iterator[Batch]],
    known: Container[bytes] = (),
) -> Iterator[Batch]:
    """Batches of an iterable that gives ready batches, or single images; its first item tells which.

    Parameters
    ----------
    stream : iterable
        Batches as for :func:`batches_from_loader`, or images as for :func:`featdiff.data.datasets.iter_refs`.
    prepare : callable
        Turns references to single images into batches.
    known : container of bytes, default ()
        Images of ready batches with these digests are not passed on.

    Yields
    ------
    Batch

    Raises
    ------
    UsageError
        Items of another kind.
    """
    items = iter(stream)
    for first in items:
        whole = chain([first], items)
        if not is_batch(first) and is_image(first):
            yield from prepare(iter_refs(whole))
        else:
            yield from batches_from_loader(whole, known)


def batches_from_loader(loader: Iterable[object], known: Container[bytes] = ()) -> Iterator[Batch]:
    """Batches that are preprocessed already.

    Parameters
    ----------
    loader : iterable
        Yields (B, C, H, W) float tensors, tuples that begin with one, or mappings that have one as ``pixel_values``.
        Its images are named ``loader[0]``, ``loader[1]`` ...
    known : container of bytes, default ()
        Images with these digests are not passed on.

    Yields
    ------
    Batch

    Raises
    ------
    UsageError
        A batch of another kind.
    """
    count = 0
    for item in loader:
        pixels = _pixels_of(item).detach().float()

        loaded = []
        for i, image in enumerate(pixels):
            digest = digest_of(image.contiguous().cpu().numpy().tobytes())
            loaded.append(LoadedImage(ImageRef(f"loader[{count + i}]"), digest))
        count += len(loaded)

        fresh = [i for i, image in enumerate(loaded) if image.digest not in known]
        yield Batch(loaded, [Stack(pixels[fresh], fresh)] if fresh else [])
