"""Placeholder until merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..runtime.checkpoints import Checkpointer
from ..runtime.progress import Progress
from .training import Recipe, Rows, TrainingState, start, train


def fit_denoiser(
    denoiser: nn.Module,
    scheduler: Any,
    read: Rows,
    n_rows: int,
    validation: Tensor,
    recipe: Recipe,
    seed: int,
    checkpoint: Path | None,
    progress: Progress | None,
    augment: Any = None,
    accelerator: Any = None,
    watch: Any = None,
) -> TrainingState:
    denoiser.requires_grad_(True)
    state = start(denoiser, recipe, n_rows)
    leads = accelerator is None or accelerator.is_main_process
    checkpointer = Checkpointer(state, checkpoint, leads)
    for step in train(state, read, n_rows, validation, scheduler, recipe, seed, augment, accelerator):
        checkpointer.after_step(step.val_loss is not None)
        if watch and leads:
            watch(step, state)
        if progress and leads:
            progress("training", step.step, step.steps)
    checkpointer.finish()
    denoiser.requires_grad_(False)
    return state
