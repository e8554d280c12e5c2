"""Networks ``denoiser(x_t, t) -> prediction``; they know no schedule and no files.

The one for pixels is in ``unet``, which is imported only where it is needed.
"""

from .lfdn import LFDN, LayerwiseLFDN

__all__ = ["LFDN", "LayerwiseLFDN"]
