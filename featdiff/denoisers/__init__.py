"""Networks ``denoiser(x_t, t) -> x0_hat``; they know no schedule and no images."""

from .lfdn import LFDN, LayerwiseLFDN

__all__ = ["LFDN", "LayerwiseLFDN"]
