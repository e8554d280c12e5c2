"""What a row of features holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: The layer of a timm model's pre-logits: what its classifier sees.
PRE_LOGITS = "pre_logits"
#: The columns of a classifier's logits.
LOGITS = "logits"


def block_normalise(features: Tensor, widths: Sequence[int], delta: float = 1e-6) -> Tensor:
    """(B, sum of widths): each sample's stretch of each layer to mean 0, variance 1 over its channels.

    DLSR (arXiv 2411.10701), section 3: (f - mean(f)) / sqrt(Var(f) + delta).
    """
    parts = [
        (p - p.mean(1, keepdim=True)) / (p.var(1, keepdim=True, correction=0) + delta).sqrt()
        for p in features.split(list(widths), 1)
    ]
    return torch.cat(parts, dim=1)
