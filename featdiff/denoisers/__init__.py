"""Networks ``denoiser(x_t, t) -> prediction``; they know no schedule and no files. ``unet`` holds the one for pixels."""

from .lfdn import LFDN, LayerwiseLFDN

__all__ = ["LFDN", "LayerwiseLFDN"]
