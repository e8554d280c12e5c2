"""Checkpoints of a training in the cache: a stopped run continues, and a finished one is not repeated."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..files.cache import cache_errors
from ..files.sealed import drop_damaged, read_sealed, write_sealed

#: A stopped run loses at most this much training, or one epoch, or 20 times what writing takes, if that is longer.
CHECKPOINT_SECONDS = 10


class Resumable:
    """A training that can be stopped and continued.

    Attributes
    ----------
    parts : tuple of str
        Names of attributes that have a state dict of their own, or are None.
    results : tuple of str
        Names of attributes that are tensors or plain numbers, ``best``, ``seconds`` and ``done`` among them.
    best : dict of str to Tensor
        Weights of :attr:`network`.
    seconds : float
        Time spent so far, over all runs; counted by :class:`Checkpointer`.
    done : bool
        Whether nothing is left to do.
    """

    parts: ClassVar[tuple[str, ...]]
    results: ClassVar[tuple[str, ...]]
    best: dict[str, Tensor]
    seconds: float
    done: bool

    @property
    def network(self) -> nn.Module:
        """The network that ``best`` are weights of."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue, fit for ``weights_only=True``; the results alone once done."""
        state = {name: getattr(self, name) for name in self.results}
        if self.done:
            return state

        for name in self.parts:
            part = getattr(self, name)
            if part is not None:
                state[name] = part.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        for name, value in state.items():
            if name in self.parts:
                getattr(self, name).load_state_dict(value)
            else:
                setattr(self, name, value)


class Checkpointer:
    """Continues a run from a file, counts its seconds, and writes it to that file as it goes.

    Parameters
    ----------
    state : Resumable
        Continued from the file at once, if the file is there and whole.
    file : Path, optional
        Without one nothing is read or written.
    writes : bool, default True
        Whether this process writes; of several, one should.
    """

    def __init__(self, state: Resumable, file: Path | None, writes: bool = True) -> None:
        if file:
            resume(state, file)
        self.state = state
        self.file = file if writes and not state.done else None
        self._written = self._last_step = time.monotonic()
        self._pause = float(CHECKPOINT_SECONDS)

    def after_step(self, ends_epoch: bool) -> None:
        """Count the time since the last step; at the end of an epoch, write if the last checkpoint is old enough."""
        now = time.monotonic()
        self.state.seconds += now - self._last_step
        self._last_step = now

        if self.file and ends_epoch and now - self._written > self._pause:
            write_checkpoint(self.state, self.file)
            self._written = self._last_step = time.monotonic()
            self._pause = max(CHECKPOINT_SECONDS, 20 * (self._written - now))  # large networks take long to write

    def finish(self) -> None:
        """Write the result of the run."""
        if self.file:
            write_checkpoint(self.state, self.file)


def resume(state: Resumable, file: Path) -> None:
    """Continue from ``file`` if it is there and whole; a damaged file is removed, with a warning."""
    if not file.exists():
        return
    try:
        content = io.BytesIO(read_sealed(file))
        saved = torch.load(content, map_location="cpu", weights_only=True)
        _check_fits(saved["best"], state.network)

        fresh = copy.deepcopy(state.state_dict())
        try:
            state.load_state_dict(saved)
        except Exception:
            state.load_state_dict(fresh)
            raise
    except Exception:  # torch raises nearly anything on a file of another version
        drop_damaged(file, [file], "this training starts anew")


def _check_fits(weights: dict[str, Tensor], network: nn.Module) -> None:
    """Refuse weights of a network of other shapes; a run stopped in its first epoch has no weights yet."""
    expected = {name: value.shape for name, value in network.state_dict().items()}
    if weights and {name: value.shape for name, value in weights.items()} != expected:
        raise ValueError("weights of another network")


def write_checkpoint(state: Resumable, file: Path) -> None:
    """Write ``state`` to ``file``, whole or not at all.

    Raises
    ------
    FeatdiffError
        The disk is full or the place cannot be written.
    """
    stream = io.BytesIO()
    torch.save(state.state_dict(), stream)

    with cache_errors(file.parent):
        write_sealed(file, stream.getvalue())
