"""References -> batches of decoded, transformed images, in order and in parallel. Knows no model.

Decoding runs in threads: Pillow releases the GIL while it decodes and resizes, nothing is forked or spawned,
and the reader can itself be used inside a worker process of any kind."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..exceptions import UnreadableImage, UsageError
from .decoding import MAX_PIXELS, Transform, _one_line, decode
from .references import HeldRef, ImageRef, MissingRef

# Pillow reads the file behind an open picture on first use, which two threads must not do at once.
_PICTURES = threading.Lock()


@dataclass(frozen=True)
class LoadedImage:
    """One image after reading: ``pixels`` (3, H, W), or None with a ``reason``, or None because it is known.

    ``digest`` is a 16-byte hash of the content (empty when nothing could be read).
    """

    ref: ImageRef
    digest: bytes = b""
    pixels: Tensor | None = None
    reason: str = ""


@dataclass(frozen=True)
class Batch:
    """``pixels`` (B, 3, H, W) of the images ``loaded[i]`` for i in ``decoded``, in the same order."""

    loaded: list[LoadedImage]
    pixels: Tensor | None
    decoded: list[int]


def load(
    ref: ImageRef,
    transform: Transform,
    max_pixels: int = MAX_PIXELS,
    known: Container[bytes] = (),
) -> LoadedImage:
    """Read, hash, decode and transform one image; a failure is a reason, never an exception.

    Content whose digest is in ``known`` is not decoded.
    """
    digest = b""
    try:
        content, picture = ref.read(), None
        if isinstance(content, Image.Image):
            with _PICTURES:
                picture = decode(content, max_pixels)  # equal pixels, equal digest, whatever the mode
        digest = _digest(picture or content)
        if digest in known:
            return LoadedImage(ref, digest)
        return LoadedImage(ref, digest, transform(picture or decode(content, max_pixels)))
    except UnreadableImage as error:
        return LoadedImage(ref, digest, reason=str(error))
    except OSError as error:
        return LoadedImage(ref, digest, reason=(error.strerror or _one_line(error)).lower())
    except Exception as error:  # damaged archives raise zlib and zip errors; one bad file must not end the run
        return LoadedImage(ref, digest, reason=f"cannot be read: {_one_line(error)}")


def _digest(content: bytes | Image.Image) -> bytes:
    hasher = hashlib.blake2b(digest_size=16)
    if isinstance(content, Image.Image):
        hasher.update(str(content.size).encode())
        content = content.tobytes()
    hasher.update(content)
    return hasher.digest()


def iter_loaded(
    refs: Sequence[ImageRef],
    transform: Transform,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    known: Container[bytes] = (),
    ahead: int = 64,
) -> Iterator[LoadedImage]:
    """Load ``refs`` on ``workers`` threads (default: one per core, at most 16), yielding in the order given.

    At most ``ahead`` images are held at once.
    """
    workers = workers or min(os.cpu_count() or 1, 16)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="featdiff-decode")
    pending: deque[Future[LoadedImage]] = deque()
    try:
        for ref in refs:
            if ref.sequential:
                pending.append(pool.submit(_load_held, ref, _in_order(ref), transform, max_pixels, known))
            else:
                pending.append(pool.submit(load, ref, transform, max_pixels, known))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also on Ctrl-C and when the caller stops early
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(ref: ImageRef) -> ImageRef:
    """Read on the calling thread, so that an archive that can only be read front to back is."""
    try:
        return HeldRef(ref.path, ref.read())
    except Exception as error:  # damaged archives raise nearly anything
        return MissingRef(ref.path, f"cannot be read: {_one_line(error)}")


def _load_held(
    ref: ImageRef, held: ImageRef, transform: Transform, max_pixels: int, known: Container[bytes]
) -> LoadedImage:
    return replace(load(held, transform, max_pixels, known), ref=ref)  # the bytes are not kept


def iter_batches(loaded: Iterator[LoadedImage], size: int) -> Iterator[Batch]:
    """Group loaded images so that each batch holds at most ``size`` decoded ones and 16 times as many in all."""
    group: list[LoadedImage] = []
    decoded: list[int] = []
    for item in loaded:
        if item.pixels is not None:
            decoded.append(len(group))
        group.append(item)
        if len(decoded) == size or len(group) == 16 * size:
            yield _batch(group, decoded)
            group, decoded = [], []
    if group:
        yield _batch(group, decoded)


def _batch(group: list[LoadedImage], decoded: list[int]) -> Batch:
    stack = [pixels for i in decoded if (pixels := group[i].pixels) is not None]
    return Batch(group, torch.stack(stack) if stack else None, decoded)


def is_loader(source: object) -> TypeGuard[Iterable[object]]:
    """Whether ``source`` gives ready batches (a DataLoader, a generator) rather than naming images."""
    named = isinstance(source, str | os.PathLike | list | tuple | np.ndarray | Tensor | Image.Image)
    return hasattr(source, "__iter__") and not named


def is_batch(item: object) -> bool:
    """Whether ``item`` is what a loader would give: preprocessed images, alone or with labels."""
    try:
        _pixels_of(item)
    except UsageError:
        return False
    return True


def _pixels_of(item: object) -> Tensor:
    """The images in what a loader gives (``UsageError`` if there are none)."""
    if isinstance(item, Mapping):
        found: object = item.get("pixel_values")  # as Hugging Face's processors call it
    else:
        found = item[0] if isinstance(item, tuple | list) and item else item
    if not isinstance(found, Tensor) or found.dim() != 4 or not found.is_floating_point():
        what = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(item).__name__
        raise UsageError(
            f"a loader must give preprocessed (B, C, H, W) float tensors, alone, first in a tuple, or as "
            f"'pixel_values', not {what}"
        )
    return found


def peek_size(loader: Iterable[object]) -> tuple[Iterable[object], tuple[int, ...] | None]:
    """A loader's batches, and (C, H, W) of the first; None if there is none."""
    batches = iter(loader)
    for first in batches:
        return chain([first], batches), tuple(_pixels_of(first).shape[1:])
    return (), None


def batches_from_loader(loader: Iterable[object], known: Container[bytes] = ()) -> Iterator[Batch]:
    """Batches that are already preprocessed: (B, C, H, W) tensors, tuples that begin with one, or mappings that have
    one as ``pixel_values``.

    Images are named ``loader[0]``, ``loader[1]`` ...; those whose digest is in ``known`` are not passed on.

    Raises
    ------
    UsageError
        A batch of another kind.
    """
    count = 0
    for item in loader:
        loaded = []
        pixels = _pixels_of(item).detach().float()
        for i, image in enumerate(pixels):
            digest = hashlib.blake2b(image.contiguous().cpu().numpy().tobytes(), digest_size=16).digest()
            loaded.append(LoadedImage(ImageRef(f"loader[{count + i}]"), digest))
        count += len(loaded)
        fresh = [i for i, image in enumerate(loaded) if image.digest not in known]
        yield Batch(loaded, pixels[fresh] if fresh else None, fresh)
