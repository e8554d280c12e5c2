"""Backbones to choose from: what they cost, under which licence, and what is set for them.

They are loaded by their timm names, as all others are. Sizes, costs and licences come from timm and from the
architectures themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .weights import EMBEDDED_TAG

#: Timm names of backbones that people take, small ones first.
RECOMMENDED = (
    EMBEDDED_TAG,
    "resnet50.tv_in1k",
    "tf_efficientnet_b4.in1k",
    "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_base_patch16_dinov3.lvd1689m",
    "vit_base_patch16_siglip_224.webli",
    "vit_base_patch16_siglip_224.v2_webli",
    "vit_base_patch16_clip_224.openai",
    "vit_large_patch14_clip_224.openai",
)


def defaults_of(tag: str) -> tuple[dict[str, Any], int | None]:
    """What is set for a backbone in place of timm's own.

    - DINOv2: 224 pixels. Timm's 518 take eight times as long; it was trained at 224 before a short stage at 518.
    - DINOv3 transformers: the head takes the class token, as in DINOv2. Timm's takes the mean of the patches, which is
      the last stage once more.

    Parameters
    ----------
    tag : str
        A timm name.

    Returns
    -------
    args : dict
        Arguments of ``timm.create_model``.
    size : int, optional
        Side of the input in pixels.
    """
    if ":" in tag:
        return {}, None
    base = tag.partition(".")[0]
    if "dinov2" in base:
        return {}, 224
    if base.startswith("vit_") and "dinov3" in base:
        return {"global_pool": "token"}, None
    return {}, None


@dataclass(frozen=True)
class Facts:
    """What a backbone costs.

    Attributes
    ----------
    parameters : float
        Weights without the classifier, in millions.
    megabytes : float
        The same in float32, in MB (10^6 bytes).
    size : int
        Side of the input in pixels.
    gmacs : float
        Multiplications with additions for one image of that size, in 10^9.
    license : str
        Of the weights, as timm states it; ``not stated`` if it does not.
    """

    parameters: float
    megabytes: float
    size: int
    gmacs: float
    license: str


def facts_of(tag: str) -> Facts:
    """What a backbone costs, by its architecture; no weights are made or fetched.

    Parameters
    ----------
    tag : str
        A timm name.

    Returns
    -------
    Facts

    Examples
    --------
    >>> facts = facts_of("resnet50.tv_in1k")
    >>> f"{facts.parameters:.1f} M, {facts.gmacs:.1f} GMACs, {facts.license}"
    '23.5 M, 4.1 GMACs, bsd-3-clause'
    """
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    args, size = defaults_of(tag)
    if size:
        args["img_size"] = size
    with torch.device("meta"):
        model = timm.create_model(tag, num_classes=0, **args).eval().requires_grad_(False)
        side = size or timm.data.resolve_model_data_config(model)["input_size"][1]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, side, side))

    count = sum(parameter.numel() for parameter in model.parameters())
    config = timm.get_pretrained_cfg(tag)
    license_of = (config.license if config else None) or "not stated"
    return Facts(count / 1e6, 4 * count / 1e6, side, counter.get_total_flops() / 2e9, license_of)
