"""Image references -> small pictures for people, decoded no larger than needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image

from ..exceptions import UnreadableImage
from ..runtime.cpus import available_cpus
from .decoding import MAX_PIXELS, decode, open_image
from .image_refs import ImageRef
from .limits import MAX_BYTES

# Pictures that are decoded ahead of their turn, for each thread.
_AHEAD = 4


def iter_thumbnails(
    refs: Iterable[ImageRef],
    side: int,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Image.Image | None]:
    """Decode images on several threads and shrink them.

    Parameters
    ----------
    refs : iterable of ImageRef
        Archives that can only be read front to back want their own order.
    side : int
        The longest side of a small picture, in pixels; smaller ones stay as they are.
    workers : int, optional
        Threads; by default one per CPU that this process may use, at most 16.
    max_pixels, max_bytes : int
        Larger images are not opened, larger files not read.

    Yields
    ------
    PIL image or None
        RGB, upright, in the order of ``refs``; None for an image that cannot be read.

    Examples
    --------
    >>> from PIL import Image
    >>> from featdiff.data.references import list_images
    >>> from featdiff.data.thumbnails import iter_thumbnails
    >>> [small.size for small in iter_thumbnails(list_images(Image.new("L", (400, 200))), side=100)]
    [(100, 50)]
    """
    workers = workers or min(available_cpus(), 16)
    pending: deque[Future[Image.Image | None]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="featdiff-thumbnails")
    try:
        for ref in refs:
            content = _read(ref, max_bytes) if ref.sequential else ref
            pending.append(pool.submit(_thumbnail, content, side, max_pixels, max_bytes))
            if len(pending) >= _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also on Ctrl-C and when the caller stops early
        pool.shutdown(wait=True, cancel_futures=True)


def _read(ref: ImageRef, max_bytes: int) -> bytes | Image.Image | None:
    try:
        return ref.read_within(max_bytes)
    except Exception:  # damaged archives raise nearly anything
        return None


def _thumbnail(
    source: ImageRef | bytes | Image.Image | None, side: int, max_pixels: int, max_bytes: int
) -> Image.Image | None:
    content = _read(source, max_bytes) if isinstance(source, ImageRef) else source
    if content is None:
        return None
    try:
        image = open_image(content, max_pixels) if isinstance(content, bytes) else content
        if isinstance(content, bytes):
            image.draft("RGB", (side, side))  # a JPEG is decoded at about this size at once
        small = decode(image, max_pixels).copy()
    except UnreadableImage:
        return None

    small.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return small
