"""Features on disk -> a trained denoiser and the rows of the banks. What the detector's fit leaves to others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from ..data.splits import Split
from ..diffusion.training import Augment, Recipe, Rows, Step, TrainingState, start, train
from ..features.store import Table
from ..runtime.checkpoints import Checkpointer
from ..runtime.progress import Progress
from ..scores.diffusion import full_precision
from ..scores.fused import FusedHeads
from ..scores.neighbors import coreset

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import SchedulerMixin


Watch = Callable[[Step, TrainingState], None]


def train_denoiser(
    denoiser: nn.Module,
    scheduler: SchedulerMixin,
    read: Rows,
    n_rows: int,
    validation: Tensor,
    recipe: Recipe,
    seed: int,
    checkpoint: Path | None,
    progress: Progress | None,
    augment: Augment | None = None,
    accelerator: Accelerator | None = None,
    watch: Watch | None = None,
) -> TrainingState:
    """Train ``denoiser`` in place, or take it from ``checkpoint``.

    Arguments are those of :func:`featdiff.diffusion.training.train`.

    Checkpoints and the result are kept in that file, if there is to be one, for the next run. ``watch`` sees the state
    at every step.
    """
    denoiser.requires_grad_(True)
    state = start(denoiser, recipe, n_rows)
    leads = accelerator is None or accelerator.is_main_process
    keeper = Checkpointer(state, checkpoint, leads)
    for step in train(state, read, n_rows, validation, scheduler, recipe, seed, augment, accelerator):
        keeper.after_step(step.val_loss is not None)
        if watch and leads:
            watch(step, state)
        if progress and leads:
            progress("training", step.step, step.steps)
    keeper.finish()
    denoiser.requires_grad_(False)
    return state


def fit_heads(
    heads: FusedHeads,
    table: Table,
    rows: Split,
    recipe: Recipe,
    seed: int,
    bank_size: int,
    method: str,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[TrainingState, np.ndarray]:
    """Train the denoisers, fill the banks and set all statistics; calibration rows are left alone.

    Returns
    -------
    What came of training, and the numbers of the rows in the banks, ascending.
    """
    diffusion = heads.diffusion
    with full_precision(heads.mean):
        state = train_denoiser(
            diffusion.denoiser,
            diffusion.scheduler,
            lambda i: heads.stages(table[rows.training[i]]),
            len(rows.training),
            heads.stages(table[rows.validation]),
            recipe,
            seed,
            checkpoint,
            progress,
        )
    diffusion.early.load_state_dict(state.early)
    bank = _choose_bank(heads, table, rows.training, bank_size, method, seed)
    heads.fill_banks(table[bank])
    heads.fit_statistics(table[rows.validation])
    return state, bank


def _choose_bank(
    heads: FusedHeads, table: Table, training: np.ndarray, size: int, method: str, seed: int
) -> np.ndarray:
    """At most ``size`` of the training rows for the banks, ascending; see :func:`featdiff.scores.neighbors.coreset`."""
    # choosing among many more rows than are kept needs memory and time, and gains nothing
    order = np.random.default_rng(seed).permutation(training)
    rows = np.sort(order[: size if method == "random" else 20 * size])
    if len(rows) > size:
        rows = rows[coreset(heads.stages(table[rows]), size, method, seed)]
    return rows


def as_digests(digests: list[bytes], rows: np.ndarray) -> np.ndarray:
    """Digests of these rows as an array (n, 16) of bytes."""
    return np.frombuffer(bytearray().join(digests[i] for i in rows), dtype=np.uint8).reshape(-1, 16)
