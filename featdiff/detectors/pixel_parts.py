"""Settings of the pixel mode -> the parts of its heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..diffusion.masks import make_masks
from ..diffusion.pretrained import load_pipeline
from ..diffusion.schedules import make_pixel_scheduler
from ..diffusion.unet import PixelDenoiser, make_unet
from ..exceptions import UsageError
from ..features.backbones import load_backbone
from ..features.pixels import Pixels
from ..runtime.randomness import seeded
from ..scores.distances import LPIPS, MSE, SSIM, Distance, FeatureCosine
from ..scores.inpainting import PixelHeads
from .config import PixelSettings

if TYPE_CHECKING:
    from diffusers import UNet2DModel

#: Settings of the U-Net.
NETWORK = ("width", "multipliers", "blocks", "attention", "dropout")
#: Settings of the heads.
SCORING = ("sampler", "steps", "resamplings", "aggregate", "seed")
_SIZE = 32
_CHANNELS = 3


def make_network(settings: PixelSettings) -> tuple[UNet2DModel, Any]:
    """A U-Net and its noise schedule: from a pipeline (``pretrained``), or untrained.

    Raises
    ------
    UsageError, WeightsError
        It cannot be built; a pipeline cannot be loaded, or takes images of another size.
    """
    name = settings.pretrained
    if name is None:
        size = settings.size or _SIZE
        channels = settings.channels or _CHANNELS
        shape = {key: getattr(settings, key) for key in NETWORK}
        with seeded(settings.seed):
            return make_unet(size, channels, **shape), make_pixel_scheduler(settings.timesteps)

    unet, scheduler = load_pipeline(name)
    trained_with = {"size": unet.config.sample_size, "channels": unet.config.in_channels}
    for key, value in trained_with.items():
        requested = getattr(settings, key)
        if requested not in (None, value):
            raise UsageError(f"{name} was trained with {key} {value}, not {requested}")
    return unet, scheduler


def make_distances(settings: PixelSettings, device: torch.device, load: bool = True) -> dict[str, Distance]:
    """Distances by name, in the order of the settings; with ``load=False``, their weights come from a model later.

    Raises
    ------
    UsageError, WeightsError
        A package is missing, or weights cannot be loaded.
    """

    def features() -> Distance:
        from ..features.extractor import FeatureExtractor

        backbone = load_backbone(settings.backbone, view="crop")  # it is given tensors of one size, no pictures
        return FeatureCosine(FeatureExtractor(backbone, device=device))

    make: dict[str, Callable[[], Distance]] = {
        "lpips": lambda: LPIPS(settings.trunk, settings.weights, load),
        "mse": MSE,
        "ssim": SSIM,
        "features": features,
    }
    return {name: make[name]() for name in settings.distances}


def make_heads(
    settings: PixelSettings, unet: UNet2DModel, scheduler: Any, distances: dict[str, Distance], blank: bool = False
) -> PixelHeads:
    """All parts as one module; with ``blank``, the masks come from a saved model later.

    Raises
    ------
    UsageError
        Parts that do not fit each other or the images.
    """
    size = unet.config.sample_size
    repetitions = settings.repetitions
    for name, distance in distances.items():
        if size < distance.smallest:
            raise UsageError(f"the distance {name} needs images of at least {distance.smallest} pixels, not {size}")

    masks = torch.zeros(repetitions, size, size, dtype=torch.bool)
    if not blank:
        shapes = {key: getattr(settings, f"mask_{key}") for key in ("blocks", "patch", "ratio")}
        masks = make_masks(settings.mask, size, repetitions, **shapes, seed=settings.seed)

    pixels = Pixels(size, unet.config.in_channels)
    scoring = {key: getattr(settings, key) for key in SCORING}
    return PixelHeads(pixels, PixelDenoiser(unet), scheduler, masks, distances, **scoring)
