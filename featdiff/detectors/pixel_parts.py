"""Arguments of the pixel mode -> the parts its heads are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..diffusion.masks import make_masks
from ..diffusion.pretrained import load_pipeline
from ..diffusion.schedules import make_pixel_scheduler
from ..diffusion.unet import PixelDenoiser, make_unet
from ..exceptions import UsageError
from ..features.backbones import load_backbone
from ..features.pixels import Pixels
from ..scores.distances import LPIPS, MSE, SSIM, Distance, FeatureCosine
from ..scores.inpainting import PixelHeads

if TYPE_CHECKING:
    from diffusers import UNet2DModel

#: Arguments that are handed on to the U-Net, and to the heads.
NETWORK = ("width", "multipliers", "blocks", "attention", "dropout")
SCORING = ("sampler", "steps", "resamplings", "aggregate", "seed")
_SIZE, _CHANNELS = 32, 3


def make_network(arguments: Mapping[str, Any]) -> tuple[UNet2DModel, Any]:
    """A U-Net and its schedule: trained elsewhere (``pretrained``), or to be trained.

    Raises
    ------
    UsageError, WeightsError
        It cannot be built; a pipeline cannot be had, or takes images of another size.
    """
    size, channels, name = arguments["size"], arguments["channels"], arguments["pretrained"]
    if name is None:
        with torch.random.fork_rng(devices=[]):  # seeded initial weights; the global random state is left alone
            torch.default_generator.manual_seed(arguments["seed"])
            shape = {key: arguments[key] for key in NETWORK}
            return make_unet(size or _SIZE, channels or _CHANNELS, **shape), make_pixel_scheduler(
                arguments["timesteps"]
            )
    unet, scheduler = load_pipeline(name)
    found = {"size": unet.config.sample_size, "channels": unet.config.in_channels}
    for key, have in found.items():
        if arguments[key] not in (None, have):
            raise UsageError(f"{name} was trained with {key} {have}, not {arguments[key]}")
    return unet, scheduler


def make_distances(arguments: Mapping[str, Any], device: torch.device, load: bool = True) -> dict[str, Distance]:
    """Distances by name, in the order that was asked for; ``load=False`` leaves their weights to a saved model.

    Raises
    ------
    UsageError, WeightsError
        A package is missing, or weights cannot be had.
    """

    def features() -> Distance:
        from ..features.extractor import FeatureExtractor

        return FeatureCosine(FeatureExtractor(load_backbone(arguments["backbone"]), device=device))

    make: dict[str, Callable[[], Distance]] = {
        "lpips": lambda: LPIPS(arguments["trunk"], arguments["weights"], load),
        "mse": MSE,
        "ssim": SSIM,
        "features": features,
    }
    return {name: make[name]() for name in arguments["distances"]}


def make_heads(
    arguments: Mapping[str, Any], unet: UNet2DModel, scheduler: Any, distances: dict[str, Distance], blank: bool = False
) -> PixelHeads:
    """All parts as one module; ``blank`` leaves the masks to a saved model.

    Raises
    ------
    UsageError
        Parts that do not fit each other or the images.
    """
    size, repetitions = unet.config.sample_size, arguments["repetitions"]
    for name, distance in distances.items():
        if size < distance.smallest:
            raise UsageError(f"the distance {name} needs images of at least {distance.smallest} pixels, not {size}")
    masks = torch.zeros(repetitions, size, size, dtype=torch.bool)
    if not blank:
        shapes = {key: arguments[f"mask_{key}"] for key in ("blocks", "patch", "ratio")}
        masks = make_masks(arguments["mask"], size, repetitions, **shapes, seed=arguments["seed"])
    pixels = Pixels(size, unet.config.in_channels)
    settings = {key: arguments[key] for key in SCORING}
    return PixelHeads(pixels, PixelDenoiser(unet), scheduler, masks, distances, **settings)
