"""Where outliers are made: the vectors of each layer brought to length 1, side by side, all layers counting alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..exceptions import UsageError
from ..features.layout import LOGITS


class Space:
    """Rows of an extractor <-> vectors in which distances are measured.

    Each block of columns (a layer, or its deviations) has length 1, and all are divided by the square root of their
    number, so that a joined vector has length 1 and Euclidean distances lie in [0, 2].

    Parameters
    ----------
    columns : mapping of names to slices
        The blocks: :attr:`featdiff.features.extractor.FeatureExtractor.columns`. Logits, which come last in a row,
        are left out: they follow from the pre-logits.
    rows : (N, D)
        In-domain rows. Blocks in which nothing is negative here (means behind a ReLU, deviations) never will be: no
        image gives anything else there.
    """

    def __init__(self, columns: Mapping[str, slice], rows: Tensor) -> None:
        self.columns = {name: part for name, part in columns.items() if name != LOGITS}
        self.width = max(part.stop for part in self.columns.values())
        self._widths = (self.width, max(part.stop for part in columns.values()))
        self._signed = {name: bool((rows[:, part] < 0).any()) for name, part in self.columns.items()}

    @property
    def widths(self) -> list[int]:
        """Length of each block."""
        return [part.stop - part.start for part in self.columns.values()]

    def blocks(self, vectors: Tensor) -> Iterator[Tensor]:
        """The blocks (N, width) of vectors or rows (N, D), in their order."""
        return (vectors[:, part] for part in self.columns.values())

    def join(self, rows: Tensor) -> Tensor:
        """Rows (N, D), with or without logits -> joined vectors (N, ``width``).

        Raises
        ------
        UsageError
            Rows of another width, NaN or infinite ones.
        """
        if rows.dim() != 2 or rows.shape[1] not in self._widths:
            raise UsageError(f"rows of features must have shape (N, {self._widths[1]}), not {tuple(rows.shape)}")
        bad = (~torch.isfinite(rows).all(1)).nonzero()
        if len(bad):
            raise UsageError(f"rows of features hold NaN or infinite values, first in row {int(bad[0])}")
        return torch.cat([F.normalize(block, dim=1) for block in self.blocks(rows)], 1) / len(self.columns) ** 0.5

    def restore(self, vectors: Tensor, like: Tensor) -> Tensor:
        """Vectors (N, D), whatever their lengths -> rows (N, D) whose blocks are as long as those of ``like``."""
        parts = self.columns.items()
        return torch.cat([self.restore_block(name, vectors[:, part], like[:, part]) for name, part in parts], 1)

    def restore_block(self, name: str, vectors: Tensor, like: Tensor) -> Tensor:
        """The same for one block: (..., width) and (..., width)."""
        return F.normalize(self.possible(name, vectors), dim=-1) * like.norm(dim=-1, keepdim=True)

    def possible(self, name: str, values: Tensor) -> Tensor:
        """Values of a block without those that no image gives."""
        return values if self._signed[name] else values.clamp_min(0)
