"""Images in memory -> on the device of the network, while that computes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def moved(pixels: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Images where the network is.

    A GPU fetches them in a stream of its own, so that it computes one batch while the next arrives, and the host does
    not wait. (Only pinned memory can be read that way.)

    Parameters
    ----------
    pixels : Tensor of shape (B, C, H, W)
    device : torch.device
    dtype : torch.dtype

    Returns
    -------
    Tensor of shape (B, C, H, W)
        Ready for the stream that is current.
    """
    if device.type != "cuda" or pixels.device.type != "cpu":
        return pixels.to(device, dtype)

    side = _side_stream(device)
    with torch.cuda.stream(side):
        pixels = pixels.pin_memory().to(device, dtype, non_blocking=True)
    current = torch.cuda.current_stream(device)
    current.wait_stream(side)
    pixels.record_stream(current)  # or its memory might be given away before it was read
    return pixels


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
