"""What a row of features holds: which columns belong to which layer, and what kind of numbers they are.

Nobody else knows how columns are named or ordered. A row is a sequence of parts; each part is a vector of one layer, or
the local score, which is made of maps before they are pooled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ..exceptions import UsageError

#: The layer of a network's pre-logits: what its classifier sees.
PRE_LOGITS = "pre_logits"
#: The layer of a classifier's logits.
LOGITS = "logits"
#: What stands for a layer where a row ends with the local score.
LOCAL = "local"
# How the written name of a spatial standard deviation ends.
_STD = ":std"


class Kind(StrEnum):
    """What the numbers of a part are."""

    #: Mean of each channel of a stage over the picture.
    MEAN = "mean"
    #: Standard deviation of each channel of a stage, or of the pre-logits' map, over the picture.
    SPATIAL_STD = "std"
    #: The vector that a classifier's last layer sees.
    PRE_LOGITS = "pre_logits"
    #: The classifier's answer.
    LOGITS = "logits"
    #: The local score; one column, the last of all.
    LOCAL = "local"
    #: A map of a stage before pooling (B, C, H, W). It is read in the same pass, and is no part of a row.
    MAP = "map"


#: What tells a part from the others of a row: its layer and its kind.
Key = tuple[str, Kind]


@dataclass(frozen=True)
class Part:
    """A vector of one layer within a row.

    Parameters
    ----------
    layer : str
        Name of the layer; ``pre_logits`` and ``logits`` are names of their own.
    kind : Kind
    start, stop : int
        Its columns, ``start <= column < stop``.
    """

    layer: str
    kind: Kind
    start: int
    stop: int

    @property
    def columns(self) -> slice:
        """Where the part lies in a row."""
        return slice(self.start, self.stop)

    @property
    def width(self) -> int:
        """How many numbers it holds."""
        return self.stop - self.start

    @property
    def name(self) -> str:
        """The layer's name, with ``:std`` behind it for a spatial standard deviation; unique within a row."""
        return self.layer + _STD if self.kind is Kind.SPATIAL_STD else self.layer


@dataclass(frozen=True)
class FeatureLayout:
    """The parts of a row of features, side by side.

    Parameters
    ----------
    parts : tuple of Part
        In the order of their columns, without gaps.

    Raises
    ------
    UsageError
        No part, or parts that do not lie side by side from column 0 on.

    Examples
    --------
    >>> layout = FeatureLayout.of({("layer1", Kind.MEAN): 64, ("layer4", Kind.MEAN): 512, (LOGITS, Kind.LOGITS): 10})
    >>> layout.width
    586
    >>> layout.stage_names
    ['layer1', 'layer4']
    >>> layout.logits.columns
    slice(576, 586, None)
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("a row of features needs at least one part")
        start = 0
        for part in self.parts:
            columns = f"the columns of {part.name!r} ({part.start}:{part.stop})"
            if part.start != start:
                raise UsageError(f"{columns} do not begin at {start}")
            if part.stop <= start:
                raise UsageError(f"{columns} hold nothing")
            start = part.stop

    @classmethod
    def of(cls, widths: Mapping[Key, int]) -> FeatureLayout:
        """Parts of these widths, in this order."""
        parts = []
        start = 0
        for (layer, kind), width in widths.items():
            parts.append(Part(layer, kind, start, start + width))
            start += width
        return cls(tuple(parts))

    @classmethod
    def of_stages(cls, widths: Mapping[str, int]) -> FeatureLayout:
        """Means of stages, by name: the layout of vectors that are nothing more than layers."""
        return cls.of({(layer, Kind.MEAN): width for layer, width in widths.items()})

    @classmethod
    def from_json(cls, names: Mapping[str, Sequence[int]]) -> FeatureLayout:
        """The layout that :meth:`to_json` described.

        Raises
        ------
        UsageError
            Columns that do not lie side by side, from 0 on.
        """
        parts = []
        for name, ends in names.items():
            if len(ends) != 2:
                raise UsageError(f"the columns of {name!r} must be two numbers, start and stop, not {list(ends)}")
            parts.append(Part(*_key(name), int(ends[0]), int(ends[1])))
        return cls(tuple(sorted(parts, key=lambda part: part.start)))

    def to_json(self) -> dict[str, list[int]]:
        """``{name: [start, stop]}``, as it is written into files."""
        return {part.name: [part.start, part.stop] for part in self.parts}

    # ---- parts ----

    def find(self, layer: str, kind: Kind) -> Part | None:
        """The part of this layer and kind, if the row holds it."""
        return next((part for part in self.parts if (part.layer, part.kind) == (layer, kind)), None)

    @property
    def stages(self) -> list[Part]:
        """Means of the stages, early ones first; what the denoisers work on."""
        return [part for part in self.parts if part.kind is Kind.MEAN]

    @property
    def layers(self) -> list[Part]:
        """The stages and the pre-logits: what layers of a network give, without spatial deviations and logits."""
        return [part for part in self.parts if part.kind in (Kind.MEAN, Kind.PRE_LOGITS)]

    @property
    def last_stage(self) -> Part:
        """The mean of the deepest stage."""
        return self.stages[-1]

    @property
    def pre_logits(self) -> Part | None:
        """The pre-logits, if the row holds them."""
        return self.find(PRE_LOGITS, Kind.PRE_LOGITS)

    @property
    def logits(self) -> Part | None:
        """The logits, if the row holds them."""
        return self.find(LOGITS, Kind.LOGITS)

    @property
    def local(self) -> Part | None:
        """The local score, if the row holds it."""
        return self.find(LOCAL, Kind.LOCAL)

    def spatial_std(self, part: Part) -> Part | None:
        """The spatial standard deviation of the same layer, if the row holds it."""
        return self.find(part.layer, Kind.SPATIAL_STD)

    # ---- names and sizes ----

    @property
    def width(self) -> int:
        """Length of a row."""
        return self.parts[-1].stop

    @property
    def stage_names(self) -> list[str]:
        """Layers of :attr:`stages`."""
        return [part.layer for part in self.stages]

    def named(self, column: int) -> Part:
        """The part that a column belongs to (``IndexError`` if the row has no such column)."""
        for part in self.parts:
            if part.start <= column < part.stop:
                return part
        raise IndexError(f"a row of {self.width} numbers has no column {column}")

    # ---- rows ----

    def without(self, kind: Kind) -> FeatureLayout:
        """The same parts but those of one kind, which must stand last (``UsageError``)."""
        return FeatureLayout(tuple(part for part in self.parts if part.kind is not kind))

    @staticmethod
    def take(features: Tensor, parts: Sequence[Part]) -> Tensor:
        """Rows (B, D) -> only these parts, side by side (B, sum of widths)."""
        if all(
            part.stop == after.start for part, after in pairwise(parts)
        ):  # they lie so in the row: nothing is copied
            return features[:, parts[0].start : parts[-1].stop]
        return torch.cat([features[:, part.columns] for part in parts], dim=1)


def _key(name: str) -> Key:
    """What a written name means."""
    if name.endswith(_STD):
        return name.removesuffix(_STD), Kind.SPATIAL_STD
    kinds = {PRE_LOGITS: Kind.PRE_LOGITS, LOGITS: Kind.LOGITS, LOCAL: Kind.LOCAL}
    return name, kinds.get(name, Kind.MEAN)


def block_normalise(features: Tensor, widths: Sequence[int], delta: float = 1e-6) -> Tensor:
    """Bring each sample's stretch of each layer to mean 0 and variance 1 over its channels.

    DLSR (arXiv 2411.10701), section 3: (f - mean(f)) / sqrt(Var(f) + delta).

    Parameters
    ----------
    features : Tensor of shape (B, sum of widths)
    widths : sequence of int
        Channels of each layer.
    delta : float, default 1e-6
        Keeps even vectors finite.

    Returns
    -------
    Tensor of shape (B, sum of widths)
    """
    # a layer norm without weights is this very formula
    parts = features.split(list(widths), dim=1)
    return torch.cat([F.layer_norm(part, part.shape[1:], eps=delta) for part in parts], dim=1)
