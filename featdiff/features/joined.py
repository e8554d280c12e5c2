"""Several encoders that look at the same picture: one decoding, a preprocessing and a pass for each, one row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.decoding import Transform
from ..exceptions import UsageError
from .extractor import FeatureExtractor
from .store import Features


class JoinedTransform:
    """A decoded picture -> what each of several networks takes, as a tuple.

    Parameters
    ----------
    transforms : sequence of callables
        RGB picture -> (3, H, W). A large JPEG is decoded at reduced size where all of them allow it, as large as the
        one that needs the most.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = tuple(transforms)
        if all(hasattr(transform, "draft") for transform in self.transforms):
            self.draft = self._draft

    def __call__(self, picture: Image.Image, *place: Any) -> tuple[Any, ...]:
        return tuple(transform(picture, *place) for transform in self.transforms)

    def _draft(self, width: int, height: int) -> tuple[int, int]:
        needs: Any = [transform.draft(width, height) for transform in self.transforms]  # type: ignore[attr-defined]
        widths, heights = zip(*needs, strict=True)
        return max(widths), max(heights)


class JoinedExtractor:
    """Rows of several extractors, side by side.

    Parameters
    ----------
    extractors : sequence of FeatureExtractor

    Attributes
    ----------
    columns : list of slice
        Where in a row those of each lie.
    """

    def __init__(self, extractors: Sequence[FeatureExtractor]) -> None:
        self.extractors = tuple(extractors)
        ends = np.cumsum([0, *(extractor.width for extractor in self.extractors)]).tolist()
        self.columns = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]

    @property
    def device(self) -> torch.device:
        """Where rows are computed."""
        return self.extractors[0].device

    @property
    def width(self) -> int:
        """Length of a row."""
        return int(self.columns[-1].stop)

    @property
    def transform(self) -> Transform:
        """RGB picture -> what each extractor takes; made once for each call, so ask once for many pictures."""
        return JoinedTransform([extractor.transform for extractor in self.extractors])

    def key(self, variant: str = "") -> str:
        """A short hash of everything that decides the numbers."""
        facts = json.dumps([extractor.key(variant) for extractor in self.extractors])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def __call__(self, pixels: Any) -> Tensor:
        """Preprocessed images, (B, C, H, W) for each extractor -> (B, ``width``).

        Raises
        ------
        UsageError
            One tensor in place of one for each: these were prepared by somebody else.
        """
        if not isinstance(pixels, tuple):
            raise UsageError(
                "each of several encoders prepares pictures in its own way: give images, no batches that are ready",
                argument="images",
            )
        rows = [extractor(part) for extractor, part in zip(self.extractors, pixels, strict=True)]
        return torch.cat(rows, dim=1)

    def with_heat(self, pixels: Any) -> tuple[Tensor, None]:
        """The same rows; several encoders have no local score."""
        return self(pixels), None

    def split(self, rows: Tensor) -> list[Tensor]:
        """Rows (B, ``width``) -> those of each extractor."""
        return [rows[:, columns] for columns in self.columns]


class Columns(Features):
    """Some columns of other features.

    Parameters
    ----------
    features : Features
        Rows (N, D).
    columns : slice
    """

    def __init__(self, features: Features, columns: slice) -> None:
        self._features = features
        self._columns = columns

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, indices: np.ndarray | slice) -> Tensor:
        return self._features[indices][:, self._columns].contiguous()
