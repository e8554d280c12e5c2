"""Any network -> its device, its logits, and SHA-256 sums that identify it; eval mode for a while."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..exceptions import UsageError
from .layout import LOGITS

#: What ``precision`` may be.
PRECISIONS = ("auto", "fp32", "bf16")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of a module's parameters and buffers.

    Parameters
    ----------
    model : nn.Module
        Any module.

    Returns
    -------
    str
        In hex.

    Examples
    --------
    >>> len(fingerprint(nn.Linear(2, 3)))
    64
    """
    hasher = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):  # quantised modules keep their settings there
            hasher.update(f"{name} {value!r}\n".encode())
            continue

        hasher.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        if value.dim():
            # flat, since a tensor in another memory layout may count as contiguous and still not be viewed as bytes
            flat: Any = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            hasher.update(flat)
        else:
            hasher.update(repr(value.item()).encode())
    return hasher.hexdigest()


def identity(model: nn.Module) -> str:
    """SHA-256 that identifies a user's module, by its weights and by its printed structure.

    Parameters
    ----------
    model : nn.Module
        Any module.

    Returns
    -------
    str
        In hex.
    """
    # different networks may have equal weights
    return hashlib.sha256(f"{model} {fingerprint(model)}".encode()).hexdigest()


def versions(model: nn.Module) -> list[tuple[int, int]]:
    """Where each weight and buffer of a module lies, and how often it was changed there; for a look before each pass.

    A few images have less to compute than ``parameters()`` takes to find them, so modules are gone through here.
    """
    found = []
    waiting = [model]
    while waiting:
        module = waiting.pop()
        waiting += [child for child in module._modules.values() if child is not None]
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    found.append((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version))
    return found


def device_of(model: nn.Module) -> torch.device:
    """Device of a module's weights; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def logits_of(output: Any) -> Tensor:
    """The logits in a classifier's output.

    Parameters
    ----------
    output : Tensor, mapping or object
        A tensor, or something with ``logits``.

    Returns
    -------
    Tensor of shape (B, classes)

    Raises
    ------
    UsageError
        The output is neither.

    Examples
    --------
    >>> logits_of({"logits": torch.zeros(2, 10)}).shape
    torch.Size([2, 10])
    """
    logits = output.get(LOGITS) if isinstance(output, Mapping) else getattr(output, LOGITS, output)
    if not isinstance(logits, Tensor):
        kind = type(output).__name__
        raise UsageError(f"the classifier gives {kind}; featdiff needs a tensor (B, classes), or one as .logits")
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside a ``with`` block; afterwards each part of the network is in the mode it was in before.

    Parameters
    ----------
    model : nn.Module
        Any module.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def mixed_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """What a backbone by name computes in under autocast; None: in the type of its weights.

    Parameters
    ----------
    precision : str
        One of :data:`PRECISIONS`.
    device : torch.device

    Returns
    -------
    torch.dtype, optional
    """
    if precision == "bf16":
        return torch.bfloat16
    return torch.float16 if precision == "auto" and device.type == "cuda" else None
