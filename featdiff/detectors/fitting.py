"""Features on disk -> a trained denoiser and the rows of the banks. What the detector's fit leaves to others."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from torch import Tensor

from ..calibration import Split
from ..neighbors import coreset
from ..store import FeatureTable, Progress
from ..training import Recipe, TrainingState, start, train
from .checkpoints import resume, write_checkpoint
from .heads import FusedHeads

#: A stopped run loses at most this much training, or one epoch if that is longer.
CHECKPOINT_SECONDS = 10


def train_denoiser(
    heads: FusedHeads,
    table: FeatureTable,
    rows: Split,
    recipe: Recipe,
    seed: int,
    checkpoint: Path,
    progress: Progress | None,
) -> TrainingState:
    """Train the denoiser of ``heads`` in place, or take it from ``checkpoint``.

    Checkpoints and the result are kept in that file, for the next run.
    """
    diffusion = heads.diffusion
    diffusion.denoiser.requires_grad_(True)
    state = start(diffusion.denoiser, recipe, len(rows.training))
    resume(state, checkpoint, diffusion.noise.device)
    finished = state.done

    def read(i: np.ndarray) -> Tensor:
        return heads.stages(table[rows.training[i]])

    saved = last = time.monotonic()
    validation = heads.stages(table[rows.validation])
    for step in train(state, read, len(rows.training), validation, diffusion.scheduler, recipe, seed):
        now = time.monotonic()
        state.seconds, last = state.seconds + now - last, now
        if step.val_loss is not None and now - saved > CHECKPOINT_SECONDS:
            write_checkpoint(state, checkpoint)
            saved = last = time.monotonic()
        if progress:
            progress("training", step.step, step.steps)
    if not finished:
        write_checkpoint(state, checkpoint)
    diffusion.early.load_state_dict(state.early)
    diffusion.denoiser.requires_grad_(False)
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
