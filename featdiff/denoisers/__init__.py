"""Networks ``denoiser(x_t, t) -> prediction``; they know no schedule and no files."""

from .lfdn import LFDN, LayerwiseLFDN
from .unet import PixelDenoiser, make_unet

__all__ = ["LFDN", "LayerwiseLFDN", "PixelDenoiser", "make_unet"]
