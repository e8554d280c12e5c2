"""The images in a model's bank as people know them: their paths, and small pictures if wanted.

A model that keeps them can name and show the normal images that are like a new one. Pictures are JPEG files of at most
96 pixels a side, 16 MB in all. Both are stored as bytes in ``model.safetensors``.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.batches import iter_loaded, load
from ..data.decoding import decode
from ..data.references import FileRef, ImageRef, list_images, split_archive
from ..exceptions import ModelError, UnreadableImage
from ..features.extraction import Extraction
from ..files.strict_json import parse_json
from ..runtime.progress import Progress
from ..verdicts.explanation import Neighbor
from .config import EncoderSettings

#: Longest side of a small picture that a model keeps, in pixels, and the quality of its JPEG.
SIDE = 96
_QUALITY = 70
#: Bytes of all small pictures of a model; what does not fit is left out.
MOST_BYTES = 16_000_000
# Where the pictures would not fit, the side is smaller: bytes that one of SIDE pixels needs, about.
_USUAL_BYTES = 3_500
# Bytes of a path as they are written, at most.
_LONGEST_PATH = 1 << 16
# Tensors of a saved model.
_PATHS = "bank_paths"
_PICTURES = "bank_thumbnails"
_ENDS = "bank_thumbnail_ends"


@dataclass(frozen=True)
class BankImages:
    """What is kept of the images in a bank, in the order of its rows.

    Parameters
    ----------
    digests : ndarray of shape (n, 16) of uint8
        Their contents.
    paths : tuple of str, default ()
        As they were given at training; empty if none are kept.
    thumbnails : tuple of bytes, default ()
        JPEG files; an empty one where none could be made, and nothing at all if none are kept.
    """

    digests: np.ndarray
    paths: tuple[str, ...] = ()
    thumbnails: tuple[bytes, ...] = ()

    @classmethod
    def of(
        cls,
        images: object,
        extraction: Extraction,
        digests: np.ndarray,
        settings: EncoderSettings,
        progress: Progress | None = None,
    ) -> BankImages:
        """What these settings keep of the images of a bank.

        Parameters
        ----------
        images : object
            What the detector is fitted on. Small pictures are made of a list of references only: others cannot be
            read again.
        extraction : Extraction
            What was read of them.
        digests : ndarray of shape (n, 16)
            Contents of the bank.
        settings : EncoderSettings
        progress : callable (stage, done, total), optional
        """
        if not settings.keep_paths:
            return cls(digests)
        first: dict[bytes, int] = {}
        for i, digest in enumerate(extraction.digests):
            first.setdefault(digest, i)
        rows = [first[digest.tobytes()] for digest in digests]
        paths = tuple(extraction.paths[i] for i in rows)

        if not settings.keep_thumbnails:
            return cls(digests, paths)
        if not isinstance(images, list):
            return cls(digests, paths, (b"",) * len(rows))
        refs = [images[extraction.positions[i]] for i in rows]
        return cls(digests, paths, tuple(make_thumbnails(refs, digests, settings, progress)))

    @classmethod
    def together(cls, digests: np.ndarray, parts: Sequence[BankImages]) -> BankImages:
        """What several banks keep of these images (n, 16), in this order; small pictures while there is space."""
        place = {digest.tobytes(): (part, row) for part in parts for row, digest in enumerate(part.digests)}
        paths = []
        thumbnails = []
        left = MOST_BYTES
        for i, digest in enumerate(digests):
            part, row = place.get(digest.tobytes(), (None, 0))
            paths.append(part.paths[row] if part and part.paths else f"image {i + 1}")
            picture = part.thumbnails[row] if part and part.thumbnails else b""
            thumbnails.append(picture if len(picture) <= left else b"")
            left -= len(thumbnails[-1])
        with_paths = any(part.paths for part in parts)
        with_thumbnails = any(part.thumbnails for part in parts)
        return cls(digests, tuple(paths) if with_paths else (), tuple(thumbnails) if with_thumbnails else ())

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored."""
        tensors = {}
        if self.paths:
            tensors[_PATHS] = _as_tensor(zlib.compress(json.dumps(self.paths).encode(), 9))  # they are much alike
        if self.thumbnails:
            tensors[_PICTURES] = _as_tensor(b"".join(self.thumbnails))
            tensors[_ENDS] = torch.tensor([len(data) for data in self.thumbnails]).cumsum(0)
        return tensors

    @classmethod
    def take(
        cls, tensors: dict[str, Tensor], digests: np.ndarray, settings: EncoderSettings, folder: Path
    ) -> BankImages:
        """Remove them from a saved model's tensors, and check them (``ModelError``).

        Parameters
        ----------
        tensors : dict
        digests : ndarray of shape (n, 16)
            Contents of the bank.
        settings : EncoderSettings
            Which say what is kept.
        folder : Path
            Of the model, for messages.
        """
        rows = len(digests)
        paths: tuple[str, ...] = ()
        thumbnails: tuple[bytes, ...] = ()
        if settings.keep_paths and rows:
            paths = _paths_in(tensors.pop(_PATHS, None), rows, folder)
        if settings.keep_thumbnails and rows:
            thumbnails = _thumbnails_in(tensors.pop(_PICTURES, None), tensors.pop(_ENDS, None), rows, folder)
        return cls(digests, paths, thumbnails)

    def neighbor(self, row: int, distance: float, settings: EncoderSettings) -> Neighbor:
        """An image of the bank, with a small picture: the one that is kept, or one made of the file at its path.

        A file that holds something else by now is not shown.

        Parameters
        ----------
        row : int
        distance : float
        settings : EncoderSettings
            Limits on what is read.
        """
        path = self.paths[row] if self.paths else f"image {row + 1}"
        kept = self.thumbnails[row] if self.thumbnails else b""
        picture = _open(kept) if kept else None
        if picture is None and self.paths:
            picture = _picture_at(path, self.digests[row].tobytes(), settings)
        return Neighbor(path, distance, picture)


# ---- small pictures ----


def make_thumbnails(
    refs: Sequence[ImageRef], digests: np.ndarray, settings: EncoderSettings, progress: Progress | None = None
) -> list[bytes]:
    """Decode these images once more, and make a JPEG file of at most 96 pixels a side of each.

    Sides are smaller for a large bank, so that it stays below 16 MB in all.

    Parameters
    ----------
    refs : sequence of ImageRef
    digests : ndarray of shape (n, 16)
        Contents that they had when they were read first.
    settings : EncoderSettings
        Threads, and limits on what is read.
    progress : callable (stage, done, total), optional

    Returns
    -------
    list of bytes
        Empty for an image that cannot be read again, that holds something else by now, or for which no space is left.
    """
    share = MOST_BYTES / max(1, len(refs)) / _USUAL_BYTES
    encode = _Encoder(max(16, int(SIDE * min(1.0, share) ** 0.5)))
    loaded = iter_loaded(refs, encode, settings.workers, settings.max_pixels, max_bytes=settings.max_bytes)

    thumbnails = []
    used = 0
    for done, (item, digest) in enumerate(zip(loaded, digests, strict=True), 1):
        data = b""
        if item.pixels is not None and item.digest == digest.tobytes():
            data = item.pixels.numpy().tobytes()
        if used + len(data) > MOST_BYTES:
            data = b""
        used += len(data)
        thumbnails.append(data)
        if progress:
            progress("thumbnails", done, len(refs))
    return thumbnails


class _Encoder:
    """A transform, in the sense of :mod:`featdiff.data.batches`: RGB picture -> bytes of a small JPEG file (n,)."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, picture: Image.Image) -> Tensor:
        stream = io.BytesIO()
        shrunk(picture, self.side).save(stream, "JPEG", quality=_QUALITY)
        return _as_tensor(stream.getvalue())


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """A copy of at most ``side`` pixels a side."""
    copy = picture.copy()
    copy.thumbnail((side, side), Image.Resampling.BICUBIC)
    return copy


def _open(data: bytes) -> Image.Image | None:
    """The picture in a JPEG file that a model holds; None if it is damaged."""
    try:
        return decode(data, SIDE * SIDE)
    except UnreadableImage:
        return None


def _picture_at(path: str, digest: bytes, settings: EncoderSettings) -> Image.Image | None:
    """A small picture of the file at a path, or in a zip archive, if it holds this content still."""
    pictures: list[Image.Image] = []

    def keep(picture: Image.Image) -> Tensor:
        pictures.append(shrunk(picture, SIDE))
        return torch.empty(0)

    ref = _file_at(path)
    if ref is None or load(ref, keep, settings.max_pixels, max_bytes=settings.max_bytes).digest != digest:
        return None
    return pictures[0] if pictures else None


def _file_at(path: str) -> ImageRef | None:
    """The file, or the member of a zip archive, at a path; None if there is none."""
    if os.path.isfile(path):
        return FileRef(path, path)
    inside = split_archive(path)
    if inside is None or not inside[0].lower().endswith(".zip"):  # of a tar, all that stands before would be read
        return None
    return next((ref for ref in list_images(path) if ref.path == path), None)


# ---- bytes in tensors ----


def _as_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))


def _paths_in(stored: Tensor | None, rows: int, folder: Path) -> tuple[str, ...]:
    reader = zlib.decompressobj()
    try:
        text = reader.decompress(_bytes_of(stored), rows * _LONGEST_PATH)
        paths = parse_json(text) if reader.eof else None
    except (ValueError, zlib.error):
        paths = None
    if not isinstance(paths, list) or len(paths) != rows or not all(isinstance(path, str) for path in paths):
        raise ModelError(f"the model at {folder} is damaged: the paths of its bank are not those it was saved with")
    return tuple(paths)


def _thumbnails_in(stored: Tensor | None, ends: Tensor | None, rows: int, folder: Path) -> tuple[bytes, ...]:
    damaged = ModelError(
        f"the model at {folder} is damaged: the thumbnails of its bank are not those it was saved with"
    )
    try:
        data = _bytes_of(stored)
    except ValueError:
        raise damaged from None
    if len(data) > MOST_BYTES or ends is None or ends.dtype != torch.int64 or ends.shape != (rows,):
        raise damaged
    limits = [0, *ends.tolist()]
    if limits != sorted(limits) or limits[-1] != len(data):
        raise damaged
    return tuple(data[start:end] for start, end in zip(limits, limits[1:], strict=False))


def _bytes_of(stored: Tensor | None) -> bytes:
    """The bytes in a stored tensor (``ValueError`` if it holds something else)."""
    if stored is None or stored.dtype != torch.uint8 or stored.dim() != 1:
        raise ValueError("no bytes")
    return stored.numpy().tobytes()
