"""References -> decoded, transformed image tensors, in order and in parallel. Knows no model.

Decoding runs in threads: Pillow releases the GIL while it decodes and resizes, nothing is forked or spawned,
and the reader can itself be used inside a worker process of any kind.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import threading
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeGuard

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from .exceptions import UnreadableImage, UsageError
from .sources import HeldRef, ImageRef, MissingRef

Transform = Callable[[Image.Image], Tensor]

#: Larger pictures are refused before a pixel is decoded (Pillow's own warning level).
MAX_PIXELS = 89_478_485
#: Resizing the short side of a thinner picture to a model's size would need gigabytes.
MAX_ASPECT = 300
# Pillow reads the file behind an open picture on first use, which two threads must not do at once.
_PICTURES = threading.Lock()
# Only formats that decode in-process: Pillow would hand EPS files to Ghostscript.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")


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


def decode(data: bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded bytes (or an open picture) -> an upright 8-bit RGB picture.

    First frame of animations; EXIF rotation applied; transparency laid on white; 16-bit grey scaled to 8 bits;
    32-bit floats must lie in [0, 1].

    Raises
    ------
    UnreadableImage
        Not an image, damaged, or larger than ``max_pixels``. The message is the reason shown to users.
    """
    try:
        image = data if isinstance(data, Image.Image) else _open(data, max_pixels)
        _check_size(image.size, max_pixels)
        return _upright(_to_rgb(image), _orientation(image))
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image in a format that can be decoded") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter if warnings are errors
        raise UnreadableImage(f"more than the limit of {max_pixels:,} pixels (--max-pixels)") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise UnreadableImage(f"damaged image: {_one_line(error)}") from None


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise UnreadableImage("empty file (0 bytes)")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's limit is global; raised only when the user asks for more
    return Image.open(io.BytesIO(data), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of ``_FORMATS`` that this build of Pillow can open."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels, more than the limit of {max_pixels:,} (--max-pixels)")
    if min(size) == 0 or max(size) > MAX_ASPECT * min(size):
        raise UnreadableImage(f"{width} x {height} pixels: too thin to be resized (limit 1:{MAX_ASPECT})")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """16-bit grey (Pillow modes I, I;16*) or float grey -> 8-bit grey by a fixed scale, never per image."""
    values = np.array(image, dtype=np.float32)
    if isinstance(hidden := image.info.get("transparency"), int):
        values[values == hidden] = 65535
    top = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise UnreadableImage(f"grey values outside 0..{top:g}")
    return Image.fromarray(np.round(values * (255 / top)).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; damaged EXIF counts as none."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
        return found if isinstance(found, int) else 1
    except Exception:  # cameras and editors write tags of any kind
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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


def short_sides(refs: Sequence[ImageRef]) -> np.ndarray:
    """Shorter side of each picture in pixels (N,), from its header; NaN where there is none."""
    sides = np.full(len(refs), np.nan)
    for i, ref in enumerate(refs):
        try:
            content = ref.read()
            picture = content if isinstance(content, Image.Image) else _open(content, MAX_PIXELS)
            sides[i] = min(picture.size)
        except Exception:  # whatever is wrong with it is reported when it is scored
            continue
    return sides


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


class Downscale:
    """Shrink a picture so that its short side is at most ``size`` pixels (protocol ``matched``)."""

    def __init__(self, size: int, then: Transform) -> None:
        self.size, self.then = size, then

    def __call__(self, image: Image.Image) -> Tensor:
        short = min(image.size)
        if short > self.size:
            width, height = (max(1, round(side * self.size / short)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return self.then(image)
