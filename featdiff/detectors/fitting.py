"""Features on disk -> a trained denoiser and the rows of the banks. What the detector's fit leaves to others."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from ..neighbors import coreset
from ..store import FeatureTable, Progress
from ..training import Augment, Recipe, Rows, Step, TrainingState, start, train
from .checkpoints import resume, write_checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import SchedulerMixin

    from .heads import FusedHeads

#: A stopped run loses at most this much training, or one epoch, or 20 times what writing takes, if that is longer.
CHECKPOINT_SECONDS = 10


Watch = Callable[[Step, TrainingState], None]


def train_denoiser(
    denoiser: nn.Module,
    scheduler: SchedulerMixin,
    read: Rows,
    n_rows: int,
    validation: Tensor,
    recipe: Recipe,
    seed: int,
    checkpoint: Path,
    progress: Progress | None,
    augment: Augment | None = None,
    accelerator: Accelerator | None = None,
    watch: Watch | None = None,
) -> TrainingState:
    """Train ``denoiser`` in place, or take it from ``checkpoint``; arguments as for :func:`featdiff.training.train`.

    Checkpoints and the result are kept in that file, for the next run. ``watch`` sees the state at every step.
    """
    denoiser.requires_grad_(True)
    state = start(denoiser, recipe, n_rows)
    resume(state, checkpoint)
    finished = state.done
    writes = accelerator is None or accelerator.is_main_process
    saved = last = time.monotonic()
    pause = float(CHECKPOINT_SECONDS)
    for step in train(state, read, n_rows, validation, scheduler, recipe, seed, augment, accelerator):
        now = time.monotonic()
        state.seconds, last = state.seconds + now - last, now
        if watch and writes:
            watch(step, state)
        if step.val_loss is not None and now - saved > pause and writes:
            start_of_write = time.monotonic()
            write_checkpoint(state, checkpoint)
            saved = last = time.monotonic()
            pause = max(CHECKPOINT_SECONDS, 20 * (saved - start_of_write))  # large networks take long to write
        if progress and writes:
            progress("training", step.step, step.steps)
    if not finished and writes:
        write_checkpoint(state, checkpoint)
    denoiser.requires_grad_(False)
    return state


def choose_bank(
    heads: FusedHeads, table: FeatureTable, training: np.ndarray, size: int, method: str, seed: int
) -> np.ndarray:
    """At most ``size`` of the training rows for the banks, ascending; see :func:`featdiff.neighbors.coreset`."""
    # choosing among many more rows than are kept needs memory and time, and gains nothing
    order = np.random.default_rng(seed).permutation(training)
    rows = np.sort(order[: size if method == "random" else 20 * size])
    if len(rows) > size:
        rows = rows[coreset(heads.stages(table[rows]), size, method, seed)]
    return rows


def as_digests(digests: list[bytes], rows: np.ndarray) -> np.ndarray:
    """Digests of these rows as an array (n, 16) of bytes."""
    return np.frombuffer(bytearray().join(digests[i] for i in rows), dtype=np.uint8).reshape(-1, 16)
