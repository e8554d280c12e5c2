"""Mixed precision and several processes for training, by way of ``accelerate``; without either, nothing."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from ..exceptions import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator


# Processes wait for the first one, which reads all images before the others do.
_LONGEST = timedelta(days=7)


def make_accelerator(mixed_precision: str, device: torch.device) -> Accelerator | None:
    """An accelerator if one is needed: reduced precision, or a process that ``accelerate launch`` has started.

    Raises
    ------
    UsageError
        The package is missing, or the device has no such precision.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if mixed_precision == "no" and not launched:
        return None
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError:
        raise UsageError("mixed precision and several GPUs need a package: pip install 'featdiff[pixel]'") from None
    if not launched:  # its settings belong to the whole process, and an earlier training may have had others
        AcceleratorState._reset_state(reset_partial_state=True)
    patience = InitProcessGroupKwargs(timeout=_LONGEST)
    try:
        return Accelerator(
            mixed_precision=mixed_precision,
            cpu=device.type == "cpu",
            device_placement=launched,
            kwargs_handlers=[patience] if launched else [],
        )
    except ValueError as error:
        raise UsageError(f"mixed_precision {mixed_precision!r} cannot be had on {device}: {error}") from None
