"""Rows of any embedding -> features for the heads of the feature mode -> scores that do not depend on the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ..exceptions import UsageError
from ..features.layout import FeatureLayout
from ..features.store import Features
from ..scores.diffusion import Diffusion
from ..scores.fused import Heads, Measured
from ..scores.registry import Options, Score, make_scores

#: Length of the noise schedule.
TIMESTEPS = 100
# Rows that are scored together. Smaller batches are padded with zeros, because the rounding of a matrix product depends
# on its number of rows.
_ROWS = 512
# Larger values are clipped: their squares overflow.
_LARGEST = 1e15


class VectorHeads(nn.Module):
    """The heads, and the level and scale of each layer; its state dict is the content of a saved detector.

    The heads bring each row of a layer to mean 0 and variance 1 over its columns. Two constant columns, 1 and -1, are
    added to each layer, so that the level and length of a row, in units of the layer's, remain visible after that.

    Parameters
    ----------
    columns : sequence of slice
        Columns of each layer in a row.
    bank_rows : int
        In-domain rows among which neighbours are searched.
    neighbors : int
        Neighbours that count; 0: none.
    hidden_max : int
        This and the others: see :class:`featdiff.scores.diffusion.Diffusion`.
    blocks : int
    start_times : sequence of int
    draws : int
    seed : int
    """

    level: Tensor
    scale: Tensor

    def __init__(
        self,
        columns: Sequence[slice],
        *,
        bank_rows: int,
        neighbors: int,
        hidden_max: int,
        blocks: int,
        start_times: Sequence[int],
        draws: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.columns = tuple(columns)
        widths = {str(i): part.stop - part.start + 2 for i, part in enumerate(columns)}  # with the two constants
        layout = FeatureLayout.of_stages(widths)
        diffusion = Diffusion(
            layout,
            joint=False,
            hidden_ratio=2.0,
            hidden_max=hidden_max,
            blocks=blocks,
            timesteps=TIMESTEPS,
            start_times=start_times,
            draws=draws,
            stride=None,
            seed=seed,
        )
        members: list[Score] = []
        if neighbors:
            members = make_scores("neighbors", layout, Options(bank_rows, neighbors, backend="torch"))

        self.heads = Heads(diffusion, members)
        self.register_buffer("level", torch.zeros(len(columns)))
        self.register_buffer("scale", torch.ones(len(columns)))

    def fit_level(self, rows: np.ndarray) -> None:
        """Set level and scale, one number each for every layer, from in-domain rows (N, d).

        Both are medians over the rows, so that a few rows of any size change next to nothing: of the mean of a row's
        layer, and of its mean squared distance from that level.
        """
        smallest = np.finfo(np.float32).tiny
        levels = []
        scales = []
        for columns in self.columns:
            layer = rows[:, columns].astype(np.float64)
            level = np.median(layer.mean(1))
            spread = ((layer - level) ** 2).mean(1)
            spread = spread[spread > 0]  # more than half of the rows may be alike
            levels.append(level)
            scales.append(max(np.sqrt(np.median(spread)), smallest) if len(spread) else smallest)

        self.level.copy_(torch.tensor(levels))
        self.scale.copy_(torch.tensor(scales))

    def prepared(self, rows: np.ndarray) -> Tensor:
        """Finite rows (B, d) -> input of ``heads`` (B, d + 2 for each layer)."""
        constants = torch.tensor([1.0, -1.0]).expand(len(rows), 2)
        parts: list[Tensor] = []
        for columns, level, scale in zip(self.columns, self.level, self.scale, strict=True):
            x = (torch.tensor(rows[:, columns]) - level) / scale
            parts += [x.clamp(-_LARGEST, _LARGEST), constants]
        return torch.cat(parts, dim=1)

    def measure(self, features: Features) -> Measured:
        """Prepared rows (N, d + 2 for each layer) -> what the heads measure, in batches of one size."""
        parts = []
        for chunk in features.chunks(_ROWS):
            parts.append(self.heads.measure(_padded(chunk))[: len(chunk)])
        return Measured.concatenate(parts)

    def score(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finite rows (N, d) -> (ood_score (N,), layer scores (N, L)), float64, higher = more OOD."""
        scores = torch.empty(len(rows), 1 + len(self.heads.layers))
        for start in range(0, len(rows), _ROWS):
            chunk = self.prepared(rows[start : start + _ROWS])
            unscaled = self.heads.unscaled(_padded(chunk))[: len(chunk)]
            scores[start : start + len(chunk)] = self.heads.rescaled(unscaled)
        doubles = scores.double().numpy()
        return doubles[:, 0], doubles[:, 1:]


def _padded(prepared: Tensor) -> Tensor:
    """At most ``_ROWS`` prepared rows -> exactly so many, the others zeros."""
    block = torch.zeros(_ROWS, prepared.shape[1])
    block[: len(prepared)] = prepared
    return block


class PreparedRows(Features):
    """Features that :class:`VectorHeads` makes of rows in memory.

    Parameters
    ----------
    rows : ndarray of shape (N, d)
        Finite.
    indices : ndarray of int
        The rows to use.
    heads : VectorHeads
        With level and scale fitted.
    """

    def __init__(self, rows: np.ndarray, indices: np.ndarray, heads: VectorHeads) -> None:
        self.rows = rows
        self.indices = indices
        self.heads = heads

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: np.ndarray | slice) -> Tensor:
        return self.heads.prepared(self.rows[self.indices[indices]])


def find_columns(layers: object, width: int) -> dict[str, slice]:
    """Names of the layers and their columns, of ``width`` in all (``UsageError`` if they make no sense)."""
    if layers is None:
        return {"0": slice(0, width)}
    if not isinstance(layers, Sequence | Mapping) or isinstance(layers, str) or not layers:
        raise UsageError(f"layers must be a list of slices, or slices by name, not {layers!r}")
    slices = dict(layers) if isinstance(layers, Mapping) else {str(i): part for i, part in enumerate(layers)}

    columns: dict[str, slice] = {}
    for name, part in slices.items():
        if not isinstance(name, str) or not isinstance(part, slice):
            raise UsageError(f"layers must be a list of slices, or slices by name, not {layers!r}")
        columns[name] = _whole_slice(part, name, width)

    ordered = sorted(columns.items(), key=lambda item: item[1].start)
    for (first, a), (second, b) in pairwise(ordered):
        if b.start < a.stop:
            raise UsageError(f"layers {first!r} ({_text(a)}) and {second!r} ({_text(b)}) share columns")
    return columns


def _whole_slice(part: slice, name: str, width: int) -> slice:
    """A slice of whole, present columns, with both ends (``UsageError`` if it is none)."""
    start = 0 if part.start is None else part.start
    stop = width if part.stop is None else part.stop
    try:
        whole = slice(int(start.__index__()), int(stop.__index__()))
    except AttributeError:
        raise UsageError(f"layer {name!r} must count columns in whole numbers, not {part!r}") from None

    if part.step not in (None, 1) or not 0 <= whole.start < whole.stop <= width:
        raise UsageError(f"layer {name!r} ({_text(part)}) must name one or more of the columns 0:{width}, in order")
    return whole


def _text(part: slice) -> str:
    """``start:stop``, or ``start:stop:step``."""
    ends = [part.start, part.stop]
    if part.step is not None:
        ends.append(part.step)
    return ":".join("" if end is None else str(end) for end in ends)
