"""States of a training in the cache, so that a stopped run goes on and a finished one is not repeated."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..store import write_atomically


class State(Protocol):
    """What a run needs to go on, tensors and plain numbers; ``best`` among them are weights of ``network``."""

    @property
    def network(self) -> nn.Module: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def resume(state: State, file: Path) -> None:
    """Continue from ``file`` if it is there and whole; a damaged one is as good as none."""
    if not file.exists():
        return
    try:
        kept = torch.load(file, map_location="cpu", weights_only=True)
        _check_fits(kept["best"], state.network)
        fresh = copy.deepcopy(state.state_dict())
        try:
            state.load_state_dict(kept)
        except Exception:
            state.load_state_dict(fresh)
            raise
    except Exception:  # torch raises nearly anything on a damaged file, or on one of another version
        file.unlink(missing_ok=True)


def _check_fits(weights: dict[str, Tensor], network: nn.Module) -> None:
    """Whether weights are those of a network like this one; a run without an epoch has none yet."""
    own = {name: value.shape for name, value in network.state_dict().items()}
    if weights and {name: value.shape for name, value in weights.items()} != own:
        raise ValueError("weights of another network")


def write_checkpoint(state: State, file: Path) -> None:
    """Keep ``state`` in ``file``, whole or not at all."""
    stream = io.BytesIO()
    torch.save(state.state_dict(), stream)
    write_atomically(file, stream.getvalue())
