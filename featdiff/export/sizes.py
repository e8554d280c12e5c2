"""Which sizes an exported file takes: one, or all rectangles that a detector's pictures may become."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.preprocessing import CELL, LARGEST, LEAST_CELLS, most_cells, rectangle
from ..features.backbones import Backbone
from ..features.views import PictureTransform


@dataclass(frozen=True)
class Sizes:
    """The sizes of images that a file takes.

    Parameters
    ----------
    channels, height, width : int
        What a square picture becomes, or the only size.
    area : float, default 0
        That rectangles are near to, in pixels; 0: one size only.
    """

    channels: int
    height: int
    width: int
    area: float = 0

    @classmethod
    def of(cls, backbone: Backbone) -> Sizes:
        """Those of the images that a backbone's transform makes."""
        whole = rectangle_area(backbone)
        if whole:
            area = whole if most_cells(whole / CELL**2) > LEAST_CELLS else 0
            return cls(3, *rectangle(1, 1, whole), area)
        return cls(*backbone.data_config["input_size"])

    @property
    def most(self) -> int:
        """The longest side of a rectangle, in pixels."""
        return most_cells(self.area / CELL**2) * CELL

    def to_json(self) -> dict[str, dict[str, int]]:
        """``{"height": {"min", "max", "multiple_of"}, "width": ...}``, in pixels."""
        if self.area:
            side = {"min": LEAST_CELLS * CELL, "max": self.most, "multiple_of": CELL}
            return {"height": side, "width": side}
        sides = {"height": self.height, "width": self.width}
        return {name: {"min": side, "max": side, "multiple_of": side} for name, side in sides.items()}

    def example(self) -> Tensor:
        """Two images to trace with: a single one would fix the batch size, and a square might tie the sides."""
        if not self.area:
            return torch.zeros(2, self.channels, self.height, self.width)
        cells = int(math.sqrt(self.area) / CELL)
        return torch.zeros(2, self.channels, cells * CELL, (cells + 1) * CELL)

    def others(self) -> list[Tensor]:
        """Images of the thinnest and the tallest size, to check what was traced; none if there is one size."""
        if not self.area:
            return []
        source = torch.Generator().manual_seed(0)
        least = LEAST_CELLS * CELL
        return [
            torch.rand(1, self.channels, *size, generator=source) for size in ((least, self.most), (self.most, least))
        ]

    def dynamic_shapes(self) -> tuple[dict[int, Any]]:
        """The dimensions of images that may change, as ``torch.export`` takes them."""
        shapes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
        if self.area:
            for axis, name in ((2, "height"), (3, "width")):
                cells = torch.export.Dim(f"{name}_cells", min=LEAST_CELLS, max=self.most // CELL)
                shapes[axis] = CELL * cells
        return (shapes,)


def rectangle_area(backbone: Backbone) -> float:
    """What rectangles are near to, in pixels; 0 if pictures become something else."""
    transform = backbone.transform
    if isinstance(transform, PictureTransform) and transform.prepare.crop_mode == "rectangle":
        return transform.prepare.area
    return 0


def preprocessing_facts(backbone: Backbone) -> dict[str, Any]:
    """How images are prepared, under timm's names, and the rule by which a rectangle is chosen."""
    transform = backbone.transform
    config = transform.config if isinstance(transform, PictureTransform) else backbone.data_config
    facts = {key: value for key, value in config.items() if key != "input_size"}
    area = rectangle_area(backbone)
    if area:
        facts["rectangle"] = {
            "area": area,
            "multiple_of": CELL,
            "min_side": LEAST_CELLS * CELL,
            "max_area": LARGEST * area,
            "least": "log(aspect / aspect of the picture)^2 + log(height * width / area)^2",
        }
    return facts


@contextmanager
def fixed_padding(model: nn.Module) -> Iterator[None]:
    """TensorFlow's "same" padding as the constant that it is for maps whose sides are multiples of the stride.

    Rectangles give such maps. timm computes the padding from the size of a map, and ``torch.export`` takes minutes over
    formulas of that kind.

    Parameters
    ----------
    model : nn.Module
        Changed inside the ``with`` block.
    """
    from timm.layers import Conv2dSame

    padded: list[Any] = [module for module in model.modules() if type(module) is Conv2dSame]
    for module in padded:
        module.forward = _FixedPadding(module)
    try:
        yield
    finally:
        for module in padded:
            del module.forward


class _FixedPadding:
    """The forward pass of a convolution with constant padding."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.conv = conv

    def __call__(self, x: Tensor) -> Tensor:
        conv = self.conv
        padding: list[int] = []
        for axis in (1, 0):  # the last axis first, as F.pad takes it
            total = max(conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1 - conv.stride[axis], 0)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, padding), conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
