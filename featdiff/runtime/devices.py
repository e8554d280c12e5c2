"""Where a run takes place."""

from __future__ import annotations

import torch

from ..exceptions import UsageError


def resolve_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU; anything else must exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"no device {name!r}: {str(error).splitlines()[0]}") from None
