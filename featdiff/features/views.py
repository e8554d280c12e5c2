"""How much of a picture a network sees: all of it, or timm's centre crop.

In: a network and its preprocessing, as timm describes it. Out: preprocessing for a view, under timm's names, with one
more crop mode: ``rectangle``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..data.preprocessing import CELL, LEAST_CELLS, Box, Preprocessing, most_cells, rectangle
from ..exceptions import UsageError, did_you_mean
from .hooks import channels_first, pool

#: Views by name. ``whole`` is ``rectangle`` for networks that take any size, and ``squash`` for the others.
VIEWS = ("whole", "rectangle", "squash", "crop")


def check_view(view: object, size: object, own: bool = False) -> None:
    """Refuse a view of another name, a wrong size, and either for a module of the user's own (``UsageError``)."""
    if view not in VIEWS:
        hint = did_you_mean(view, list(VIEWS)) if isinstance(view, str) else ""
        raise UsageError(f"view must be one of {', '.join(VIEWS)}, not {view!r}{hint}", argument="view")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise UsageError(f"size must be a whole number above 0, not {size!r}", argument="size")

    for name, is_set in (("view", view != VIEWS[0]), ("size", size is not None)):
        if own and is_set:
            problem = f"{name} is for backbones by name: a module sees what its transform makes of a picture"
            raise UsageError(problem, argument=name)


class PictureTransform:
    """Preprocessing as a function: RGB picture -> (3, H, W) tensor.

    Parameters
    ----------
    config : mapping
        As timm's; ``crop_mode`` may also be ``rectangle``, see
        :class:`featdiff.data.preprocessing.Preprocessing`.

    Examples
    --------
    >>> config = {"input_size": (3, 224, 224), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    >>> PictureTransform(config | {"crop_mode": "rectangle"})(Image.new("RGB", (900, 300))).shape
    torch.Size([3, 128, 384])
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self.prepare = Preprocessing(config)

    def draft(self, width: int, height: int) -> tuple[int, int]:
        """See :meth:`featdiff.data.preprocessing.Preprocessing.draft`."""
        return self.prepare.draft(width, height)

    def __call__(self, picture: Image.Image, box: Box | None = None) -> Tensor:
        """RGB picture, or the box of one decoded at reduced size -> (3, H, W) tensor."""
        return torch.from_numpy(self.prepare(picture, box))


def preprocessing(model: nn.Module, config: Mapping[str, Any], view: str, tag: str) -> dict[str, Any]:
    """Preprocessing of a network for a view.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    config : mapping
        The network's own preprocessing, as timm describes it.
    view : str
        One of ``VIEWS``.
    tag : str
        What the network is called in errors.

    Returns
    -------
    dict
        As ``config``; ``crop_mode`` is ``rectangle`` or ``squash`` for views of the whole picture.

    Raises
    ------
    UsageError
        Rectangles for a network that takes images of one size only.
    """
    if view == "crop":
        return dict(config)
    if view != "squash":
        _, height, width = config["input_size"]
        if takes_any_size(model, height * width):
            return _squashed(config) | {"crop_mode": "rectangle"}
        if view == "rectangle":
            raise UsageError(f"{tag} takes images of one size only: use the view squash", argument="view")
    return _squashed(config)


def _squashed(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config) | {"crop_mode": "squash", "crop_pct": 1.0}


def view_of(config: Mapping[str, Any]) -> str:
    """The view that preprocessing gives: ``rectangle``, ``squash`` or ``crop``."""
    if config["crop_mode"] == "squash" and config["crop_pct"] != 1:
        return "crop"
    return config["crop_mode"] if config["crop_mode"] in VIEWS else "crop"


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing as the arguments of ``load_backbone`` that give it again, whatever timm says of the network then.

    Returns
    -------
    dict
        ``view``, ``size`` (None unless the input is square), and ``transform``: the rest.
    """
    view = view_of(config)
    _, height, width = config["input_size"]
    left_out = {"input_size"} if height == width else set()
    if view != "crop":
        left_out |= {"crop_mode", "crop_pct"}
    transform = {key: value for key, value in config.items() if key not in left_out}
    return {"view": view, "size": height if height == width else None, "transform": transform}


def in_words(settings: Mapping[str, Any]) -> str:
    """What is seen of a picture, like ``whole picture, about 224 x 224 pixels``.

    Parameters
    ----------
    settings : mapping
        From :func:`settings_of`.
    """
    side = settings["size"]
    height, width = (side, side) if side else settings["transform"]["input_size"][1:]
    size = f"{height} x {width} pixels"
    words = {
        "rectangle": f"whole picture, about {size}",
        "squash": f"whole picture, squashed to {size}",
        "crop": f"cropped to {size}",
    }
    return words[settings["view"]]


def takes_any_size(model: nn.Module, area: float) -> bool:
    """Whether a network takes rectangles of about ``area`` pixels; found out by trying a thin and a common one."""
    cells = area / CELL**2
    if cells < LEAST_CELLS**2:
        return False
    thin = (LEAST_CELLS * CELL, most_cells(cells) * CELL)
    common = rectangle(2, 3, area)
    widths = {_width(model, *size) for size in (thin, common)}
    return len(widths) == 1 and None not in widths


def takes_size(model: nn.Module, height: int, width: int) -> bool:
    """Whether a network takes images of this size; found out by trying."""
    return _width(model, height, width) is not None


@torch.inference_mode()
def _width(model: nn.Module, height: int, width: int) -> int | None:
    """How many numbers a network in eval mode gives for a random image; None if it fails or gives NaN."""
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    try:
        output = pool(channels_first(model(pixels), model, model))
    except Exception:  # networks fail in many ways on a size they were not made for
        return None
    return output.shape[1] if output.isfinite().all() else None
