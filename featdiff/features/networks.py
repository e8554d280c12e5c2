"""What is asked of any network: its device, its logits, its identity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..exceptions import UsageError
from .layout import LOGITS


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of a module's parameters and buffers, in hex."""
    hasher = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):  # quantised modules keep their settings there
            hasher.update(f"{name} {value!r}\n".encode())
            continue
        hasher.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        # flat, for in another memory layout a tensor may pass as contiguous and still not be seen as bytes
        flat = value.detach().cpu().contiguous().flatten()
        bytes_of: Any = flat.view(torch.uint8).numpy if value.dim() else None
        hasher.update(bytes_of() if bytes_of else repr(value.item()).encode())
    return hasher.hexdigest()


def device_of(model: nn.Module) -> torch.device:
    """Where a module's weights lie; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def logits_of(output: Any) -> Tensor:
    """Logits (B, classes) in what a classifier gives: a tensor, or something with ``logits``.

    Raises
    ------
    UsageError
        Nothing of the kind.
    """
    found = output.get(LOGITS) if isinstance(output, Mapping) else getattr(output, LOGITS, output)
    if not isinstance(found, Tensor):
        kind = type(output).__name__
        raise UsageError(f"the classifier gives {kind}; featdiff needs a tensor (B, classes), or one as .logits")
    return found


def identity(model: nn.Module) -> str:
    """What tells a module of your own from any other: a SHA-256 of its weights and of how it is printed, in hex."""
    # equal weights may sit in different networks
    return hashlib.sha256(f"{model} {fingerprint(model)}".encode()).hexdigest()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every part of a user's network gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
