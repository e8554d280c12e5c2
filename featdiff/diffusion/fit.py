"""Denoiser and clean samples -> a trained denoiser, with checkpoints: a stopped run goes on, a finished one is read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..runtime.checkpoints import Checkpointer
from ..runtime.progress import Progress
from ..runtime.threads import training_threads
from .schedules import NoiseSchedule
from .training import Augment, ReadSamples, Recipe, Step, TrainingState, start, train

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import SchedulerMixin

#: Its records carry ``fields``: step, steps, epoch, loss, lr, and val_loss at the end of an epoch, when it is measured.
LOG = logging.getLogger(__name__)
#: Called after each optimiser step with its record and the state of the training.
Watch = Callable[[Step, TrainingState], None]


def fit_denoiser(
    denoiser: nn.Module,
    scheduler: NoiseSchedule | SchedulerMixin,
    read: ReadSamples,
    count: int,
    validation: Tensor,
    recipe: Recipe,
    seed: int,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    augment: Augment | None = None,
    accelerator: Accelerator | None = None,
    watch: Watch | None = None,
) -> TrainingState:
    """Train a denoiser in place, or take its weights from a finished run.

    Parameters
    ----------
    denoiser : nn.Module
        The network. Afterwards it has the best weights, is in eval mode and needs no gradients.
    scheduler : NoiseSchedule or diffusers scheduler
        The noise schedule.
    read : callable
        Indices (B,) of training samples, ascending -> the clean samples (B, ...) on the denoiser's device.
    count : int
        Number of training samples.
    validation : Tensor of shape (V, ...)
        Held-out clean samples.
    recipe : Recipe
        How to train.
    seed : int
        Decides the order of the samples and all noise.
    checkpoint : Path, optional
        File for checkpoints and the result. If it exists, training continues from there; if it holds a finished run,
        nothing is trained.
    progress : callable (stage, done, total), optional
        Called after each step with the stage ``"training"``.
    augment : callable, optional
        Changes training samples at random.
    accelerator : accelerate.Accelerator, optional
        Mixed precision and several processes. Only the main process writes files and reports.
    watch : callable (step, state), optional
        Called after each step.

    Returns
    -------
    TrainingState
        The finished training.

    Raises
    ------
    UsageError
        A batch that the processes cannot share evenly.
    FeatdiffError
        The loss became NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from featdiff.diffusion.lfdn import LFDN
    >>> from featdiff.diffusion.schedules import make_scheduler
    >>> samples = torch.ones(32, 4)
    >>> recipe = Recipe(epochs=1, batch_size=16, min_steps=1)
    >>> denoiser = LFDN(width=4, hidden=8, blocks=1)
    >>> state = fit_denoiser(denoiser, make_scheduler(), lambda i: samples[i], 32, samples, recipe, seed=0)
    >>> state.epoch, state.done
    (1, True)
    """
    is_main = accelerator is None or accelerator.is_main_process
    denoiser.requires_grad_(True)
    state = start(denoiser, recipe, count)
    checkpointer = Checkpointer(state, checkpoint, is_main)

    with training_threads(denoiser, recipe.batch_size, validation[0]):
        for step in train(state, read, count, validation, scheduler, recipe, seed, augment, accelerator):
            checkpointer.after_step(step.val_loss is not None)
            if is_main:
                _log(step)
            if watch and is_main:
                watch(step, state)
            if progress and is_main:
                progress("training", step.step, step.steps)

    checkpointer.finish()
    denoiser.requires_grad_(False)
    return state


def _log(step: Step) -> None:
    """A record of a step: at the level DEBUG, at the end of an epoch at INFO."""
    level = logging.DEBUG if step.val_loss is None else logging.INFO
    if LOG.isEnabledFor(level):
        measured = {name: value for name, value in asdict(step).items() if value is not None}
        LOG.log(level, "step %d of %d, loss %.4g", step.step, step.steps, step.loss, extra={"fields": measured})
