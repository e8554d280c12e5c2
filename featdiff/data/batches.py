"""References -> batches of decoded, transformed images, in order and in parallel. Knows no model.

Decoding runs in threads: Pillow releases the GIL while it decodes and resizes, nothing is forked or spawned,
and the reader can itself be used inside a worker process of any kind.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..exceptions import UnreadableImage, one_line
from ..files.retries import no_more_tries
from ..runtime.cpus import available_cpus
from ..runtime.waiting import WAITED
from .decoding import MAX_PIXELS, Transform, decode, open_image, reduce
from .formats import memory_of, note_on_pages
from .limits import MAX_BYTES, MEMORY, check_bytes
from .memory import is_tensor
from .references import HeldRef, ImageRef, MissingRef

if TYPE_CHECKING:
    from torch import Tensor

# Pillow reads the file behind an open picture on first use, which two threads must not do at once.
_PICTURES = threading.Lock()
# Bytes of images that were read ahead, in order, and wait for a thread; what threads decode has a limit of its own.
_WAITING = 256_000_000
# Bytes that Pillow keeps for a pixel, of most kinds.
_PIXEL = 4
# A batch of images of several shapes may be larger by this factor.
_MIXED = 4


@dataclass(frozen=True)
class LoadedImage:
    """One image after reading.

    Attributes
    ----------
    ref : ImageRef
        Where it came from.
    digest : bytes
        A hash of its content, 16 bytes; empty when nothing could be read.
    pixels : Tensor, optional
        (3, H, W); an array, if the transform gives arrays; a tuple of these, if it prepares for several networks. None
        if the image is unreadable, or if its digest was known.
    reason : str
        Why it is unreadable; empty if it is not.
    note : str
        What is to be told of a readable image, such as that it is one page of several.
    size : (int, int)
        Width and height of the upright picture, as it is in the file; (0, 0) if it was not decoded.
    """

    ref: ImageRef
    digest: bytes = b""
    pixels: Tensor | None = None
    reason: str = ""
    note: str = ""
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Stack:
    """Decoded images of one shape.

    Attributes
    ----------
    pixels : Tensor of shape (B, C, H, W)
        Or an array, if the transform gives arrays; a tuple, if it gives tuples.
    positions : list of int
        Where in the batch these images stand, ascending.
    """

    pixels: Tensor
    positions: list[int]


@dataclass(frozen=True)
class Batch:
    """Some images, and the pixels of those that were decoded.

    Attributes
    ----------
    loaded : list of LoadedImage
        All images, unreadable and known ones among them. The pixels are in ``stacks``.
    stacks : list of Stack
        Decoded images, those of one shape together.
    """

    loaded: list[LoadedImage]
    stacks: list[Stack]

    @property
    def decoded(self) -> list[int]:
        """Positions of the decoded images, ascending."""
        return sorted(position for stack in self.stacks for position in stack.positions)


def load(
    ref: ImageRef,
    transform: Transform,
    max_pixels: int = MAX_PIXELS,
    known: Container[bytes] = (),
    max_bytes: int = MAX_BYTES,
) -> LoadedImage:
    """Read, hash, decode and transform one image; a failure is a reason, never an exception.

    It waits until the images that other threads decode leave enough memory.

    Parameters
    ----------
    ref : ImageRef
    transform : callable
        PIL image -> (3, H, W). If it has a method ``draft`` (width, height of an upright picture -> the least width and
        height that it needs), a large JPEG may be decoded at reduced size. Then its second argument is the place of the
        whole picture in the decoded one: (left, top, right, bottom) in pixels and their fractions.
    max_pixels : int, default 89,478,485
        Larger pictures are refused.
    known : container of bytes, default ()
        Images with these digests are not decoded.
    max_bytes : int, default 512,000,000
        Larger files are refused.

    Returns
    -------
    LoadedImage
    """
    digest = b""
    try:
        length = ref.bytes_to_read()
        check_bytes(length, max_bytes)
        with MEMORY.reading(length or 0):
            content = ref.read_within(max_bytes) if length is None else ref.read()
            if isinstance(content, Image.Image):
                return _load_picture(ref, content, transform, max_pixels, known)

            digest = digest_of(content)
            if digest in known:
                return LoadedImage(ref, digest)
            image = open_image(content, max_pixels)
            note = note_on_pages(content, image)
            in_file = image.width * image.height
            reduced = reduce(image, transform.draft) if hasattr(transform, "draft") else None
            with MEMORY.decoding(memory_of(image, in_file)):
                picture = decode(image, max_pixels)
                size = reduced.size if reduced else picture.size
                pixels = transform(picture, reduced.box) if reduced else transform(picture)
                del image, picture  # free before others may take as much
            return LoadedImage(ref, digest, pixels, note=note, size=size)

    except UnreadableImage as error:
        return LoadedImage(ref, digest, reason=str(error))
    except MemoryError:
        return LoadedImage(ref, digest, reason="not enough memory")
    except OSError as error:
        return LoadedImage(ref, digest, reason=(error.strerror or one_line(error)).lower())
    except Exception as error:  # damaged archives raise zlib and zip errors; one bad file must not end the run
        return LoadedImage(ref, digest, reason=f"cannot be read: {one_line(error)}")


def _load_picture(
    ref: ImageRef, content: Image.Image, transform: Transform, max_pixels: int, known: Container[bytes]
) -> LoadedImage:
    """A picture that was open already."""
    with _PICTURES:
        need = memory_of(content)
    with MEMORY.decoding(need):
        with _PICTURES:
            picture = decode(content, max_pixels)
        digest = digest_of(str(picture.size).encode(), picture.tobytes())  # equal pixels, whatever the mode was
        if digest in known:
            return LoadedImage(ref, digest)
        pixels = transform(picture)
        size = picture.size
        del picture
    return LoadedImage(ref, digest, pixels, size=size)


def digest_of(*parts: bytes) -> bytes:
    """A hash of content, 16 bytes, by which features are found in the cache."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def iter_loaded(
    refs: Iterable[ImageRef],
    transform: Transform,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    known: Container[bytes] = (),
    ahead: int = 64,
    max_bytes: int = MAX_BYTES,
) -> Iterator[LoadedImage]:
    """Load images on several threads; they come in the order of ``refs``.

    Parameters
    ----------
    refs : iterable of ImageRef
        A stream is read as far ahead as images are held.
    transform, max_pixels, known, max_bytes
        As for :func:`load`.
    workers : int, optional
        Threads; by default one per CPU that this process may use, at most 16.
    ahead : int, default 64
        At most this many images are held at once; fewer if those that wait to be decoded are large.

    Yields
    ------
    LoadedImage
    """
    workers = workers or min(available_cpus(), 16)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="featdiff-decode")
    pending: deque[tuple[Future[LoadedImage], int]] = deque()
    waiting = 0  # bytes of pending images
    try:
        for ref in refs:
            held = _in_order(ref, max_bytes) if ref.sequential else ref
            size = _size_of(held)
            pending.append((pool.submit(_load_held, ref, held, transform, max_pixels, known, max_bytes), size))
            waiting += size
            del held

            while len(pending) >= ahead or (waiting > _WAITING and pending):
                future, size = pending.popleft()
                yield WAITED.during(future.result)
                waiting -= size

        while pending:
            yield WAITED.during(pending.popleft()[0].result)
    except BaseException:  # Ctrl-C, or the caller stops early
        with no_more_tries():
            pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(ref: ImageRef, max_bytes: int) -> ImageRef:
    """Read on the calling thread: datasets, and archives that can only be read front to back, are read in order."""
    try:
        return WAITED.during(lambda: ref.held(max_bytes))
    except UnreadableImage as error:
        return MissingRef(ref.path, str(error))
    except MemoryError:
        return MissingRef(ref.path, "not enough memory")
    except Exception as error:  # damaged archives raise nearly anything
        return MissingRef(ref.path, f"cannot be read: {one_line(error)}")


def _size_of(ref: ImageRef) -> int:
    """Bytes that a reference keeps in memory."""
    if not isinstance(ref, HeldRef):
        return 0
    content = ref.content
    return len(content) if isinstance(content, bytes) else content.width * content.height * _PIXEL


def _load_held(
    ref: ImageRef,
    held: ImageRef,
    transform: Transform,
    max_pixels: int,
    known: Container[bytes],
    max_bytes: int,
) -> LoadedImage:
    """Load what may have been read already; the result refers to the original, so that the bytes can be freed."""
    if held.path != ref.path:  # its name was known only after reading
        ref = replace(ref, path=held.path)
    return replace(load(held, transform, max_pixels, known, max_bytes), ref=ref)


def iter_batches(loaded: Iterator[LoadedImage], size: int) -> Iterator[Batch]:
    """Group loaded images into batches, in their order.

    Parameters
    ----------
    loaded : iterator of LoadedImage
    size : int
        A stack has at most this many images. A batch has one stack if all its decoded images have one shape, else at
        most four times as many decoded images, so that stacks are fuller. It has at most 16 times as many images in
        all.

    Yields
    ------
    Batch
    """
    group: list[LoadedImage] = []
    by_shape: dict[tuple[Any, ...], list[int]] = {}
    decoded = 0
    for item in loaded:
        if item.pixels is not None:
            by_shape.setdefault(_shape_of(item.pixels), []).append(len(group))
            decoded += 1
        group.append(item)

        limit = size if len(by_shape) <= 1 else _MIXED * size
        if decoded >= limit or len(group) == 16 * size:
            yield _batch(group, by_shape, size)
            group = []
            by_shape = {}
            decoded = 0
    if group:
        yield _batch(group, by_shape, size)


def _batch(group: list[LoadedImage], by_shape: Mapping[tuple[Any, ...], list[int]], size: int) -> Batch:
    """Images as a batch; ``group`` gives up their pixels, so that they are held once."""
    stacks = []
    for positions in by_shape.values():
        for start in range(0, len(positions), size):
            part = positions[start : start + size]
            images = [pixels for i in part if (pixels := group[i].pixels) is not None]
            stacks.append(Stack(_stacked(images), part))
            for i in part:
                group[i] = replace(group[i], pixels=None)
    return Batch(group, stacks)


def _shape_of(pixels: Any) -> tuple[Any, ...]:
    """The shape of an image; of a tuple that of each."""
    return tuple(map(_shape_of, pixels)) if isinstance(pixels, tuple) else tuple(pixels.shape)


def _stacked(images: list[Any]) -> Any:
    """Images (C, H, W) -> (B, C, H, W); of arrays an array, of tuples a tuple."""
    if isinstance(images[0], tuple):
        return tuple(_stacked(list(part)) for part in zip(*images, strict=True))
    if not is_tensor(images[0]):
        arrays: Any = np.stack(images)
        return arrays
    import torch

    return torch.stack(images)
