"""Training states in the cache, so that a stopped run goes on and a finished one is not repeated."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import torch

from ..store import write_atomically
from ..training import TrainingState


def resume(state: TrainingState, file: Path, device: torch.device) -> None:
    """Continue from ``file`` if it is there and whole; a damaged one is as good as none."""
    if not file.exists():
        return
    try:
        kept = torch.load(file, map_location=device, weights_only=True)
        fresh = copy.deepcopy(state.state_dict())
        try:
            state.load_state_dict(kept)
        except Exception:
            state.load_state_dict(fresh)
            raise
    except Exception:  # torch raises nearly anything on a damaged file, or on one of another version
        file.unlink(missing_ok=True)


def write_checkpoint(state: TrainingState, file: Path) -> None:
    """Keep ``state`` in ``file``, whole or not at all."""
    stream = io.BytesIO()
    torch.save(state.state_dict(), stream)
    write_atomically(file, stream.getvalue())
