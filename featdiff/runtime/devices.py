"""The device of a run."""

from __future__ import annotations

import torch

from ..exceptions import UsageError, first_line


def resolve_device(name: str) -> torch.device:
    """The device of this name.

    Parameters
    ----------
    name : str
        ``cpu``, ``cuda``, ``cuda:1``, ``mps`` ..., or ``auto``: CUDA, else MPS, else the CPU.

    Returns
    -------
    torch.device

    Raises
    ------
    UsageError
        This machine has no such device.

    Examples
    --------
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = _best()
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"no device {name!r}: {first_line(error)}", argument="device") from None


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"
