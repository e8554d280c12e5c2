"""States of a training in the cache, so that a stopped run goes on and a finished one is not repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    pass
import copy
import io
import time
from pathlib import Path

from ..files.atomic import write_atomically


class Resumable:
    """A training that can be put down and taken up.

    Attributes
    ----------
    parts : names of attributes that have a state dict of their own, or are None
    results : names of attributes that are tensors or plain numbers, ``best``, ``seconds`` and ``done`` among them
    best : weights of ``network``
    seconds : spent so far, over all runs; the caller's to count
    done : whether nothing is left to do
    """

    parts: ClassVar[tuple[str, ...]]
    results: ClassVar[tuple[str, ...]]
    best: dict[str, Tensor]
    seconds: float
    done: bool

    @property
    def network(self) -> nn.Module:
        """What ``best`` are weights of."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Fit for ``weights_only=True``; the results alone once done."""
        plain = {name: getattr(self, name) for name in self.results}
        if self.done:
            return plain
        parts = {name: getattr(self, name) for name in self.parts}
        return plain | {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        for name, value in state.items():
            if name in self.parts:
                getattr(self, name).load_state_dict(value)
            else:
                setattr(self, name, value)


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
