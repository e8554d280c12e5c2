"""States of a training in the cache, so that a stopped run goes on and a finished one is not repeated."""

from __future__ import annotations

import copy
import io
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ..store import write_atomically
from ..training import Resumable

#: A stopped run loses at most this much training, or one epoch, or 20 times what writing takes, if that is longer.
CHECKPOINT_SECONDS = 10


class Keeper:
    """Takes a run up where a file left it, counts its seconds, and keeps it there as it goes.

    Parameters
    ----------
    state : Resumable
    file : Path, optional
        None: nothing is kept.
    writes : bool
        Of several processes, one.
    """

    def __init__(self, state: Resumable, file: Path | None, writes: bool = True) -> None:
        if file:
            resume(state, file)
        self.state, self.file = state, None if state.done or not writes else file
        self._saved = self._last = time.monotonic()
        self._pause = float(CHECKPOINT_SECONDS)

    def after_step(self, ends_epoch: bool) -> None:
        """Count the time; at an epoch's end write, now and then."""
        now = time.monotonic()
        self.state.seconds, self._last = self.state.seconds + now - self._last, now
        if self.file and ends_epoch and now - self._saved > self._pause:
            write_checkpoint(self.state, self.file)
            self._saved = self._last = time.monotonic()
            self._pause = max(CHECKPOINT_SECONDS, 20 * (self._saved - now))  # large networks take long to write

    def finish(self) -> None:
        """Write what came of the run."""
        if self.file:
            write_checkpoint(self.state, self.file)


def resume(state: Resumable, file: Path) -> None:
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


def write_checkpoint(state: Resumable, file: Path) -> None:
    """Keep ``state`` in ``file``, whole or not at all."""
    stream = io.BytesIO()
    torch.save(state.state_dict(), stream)
    write_atomically(file, stream.getvalue())
