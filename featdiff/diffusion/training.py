"""Denoiser, clean samples and noise schedule -> a trained denoiser, as a generator of small records of each step.

The loop reads and writes no files: the caller reads the samples, shows progress, stops early and keeps checkpoints
(:mod:`featdiff.diffusion.fit` does).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel

from ..exceptions import FeatdiffError, UsageError
from ..runtime.checkpoints import Resumable
from ..runtime.processes import Processes
from .loss import by_time, shared_times, training_loss, validation_loss
from .schedules import NoiseSchedule

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import SchedulerMixin

#: Indices (B,) of training samples -> the clean samples (B, ...).
ReadSamples = Callable[[np.ndarray], Tensor]
#: Clean samples (B, ...) and a random generator -> the samples to train on, same shape.
Augment = Callable[[Tensor, torch.Generator], Tensor]

#: How the learning rate changes during a training.
LR_SCHEDULES = ("one-cycle", "cosine", "constant")


@dataclass(frozen=True)
class Recipe:
    """How to train, with AdamW.

    Parameters
    ----------
    epochs : int, default 15
        Number of epochs, raised until there are ``min_steps`` steps.
    batch_size : int, default 128
        Samples of a step.
    learning_rate : float, default 1e-3
        Highest learning rate.
    weight_decay : float, default 1e-4
        Weight decay of AdamW, 0 or more.
    lr_schedule : str, default "one-cycle"
        One of ``LR_SCHEDULES``.
    warmup_steps : int, default 0
        Steps in which the learning rate rises. 0: a tenth of the run for ``one-cycle``, none for the others.
    clip_norm : float, default 0.0
        Gradients with a larger norm are scaled down to it; 0 leaves them as they are.
    ema_decay : float, default 0.999
        Decay of the moving average of the weights, 0 to 1.
    patience : int, default 10
        Epochs without a better held-out loss after which training stops.
    min_steps : int, default 600
        Smallest number of steps in all.
    max_steps : int, default 20000
        Largest number of steps in all. It wins over ``min_steps``.
    epoch_steps : int, default 1000
        Largest number of steps of one epoch, so that the held-out loss is measured, and checkpoints are written, often.
    check_steps : int, default 20
        The held-out loss is measured at the end of an epoch, after so many steps at the earliest. With few samples an
        epoch is a step or two, and measuring would take longer than training.

    Raises
    ------
    UsageError
        A setting of the wrong type or outside its range.

    Examples
    --------
    >>> Recipe(epochs=3, batch_size=10, min_steps=1).plan(count=100)
    (3, 10)
    """

    epochs: int = 15
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    lr_schedule: str = "one-cycle"
    warmup_steps: int = 0
    clip_norm: float = 0.0
    ema_decay: float = 0.999
    patience: int = 10
    min_steps: int = 600
    max_steps: int = 20_000
    epoch_steps: int = 1_000
    check_steps: int = 20

    def __post_init__(self) -> None:
        if self.lr_schedule not in LR_SCHEDULES:
            known = ", ".join(LR_SCHEDULES)
            raise UsageError(f"unknown lr_schedule {self.lr_schedule!r}; known: {known}", argument="lr_schedule")

        check_number("learning_rate", self.learning_rate, above=0)
        for name in ("epochs", "batch_size", "patience", "max_steps", "epoch_steps", "check_steps"):
            check_number(name, getattr(self, name), above=0, whole=True)
        for name in ("min_steps", "warmup_steps"):
            check_number(name, getattr(self, name), above=-1, whole=True)

        for name, highest in (("weight_decay", math.inf), ("clip_norm", math.inf), ("ema_decay", 1.0)):
            value = check_number(name, getattr(self, name), above=-math.inf)
            if not 0 <= value <= highest:
                limit = ", at most 1" if highest == 1 else ""
                raise UsageError(f"{name} must be 0 or more{limit}, not {value}", argument=name)

    def plan(self, count: int) -> tuple[int, int]:
        """How long to train.

        Parameters
        ----------
        count : int
            Number of training samples.

        Returns
        -------
        (int, int)
            Number of epochs, and steps of each.
        """
        per_epoch = min(max(1, count // self.batch_size), self.epoch_steps, self.max_steps)
        epochs = max(self.epochs, math.ceil(self.min_steps / per_epoch))
        return min(epochs, self.max_steps // per_epoch), per_epoch

    def epochs_of_a_check(self, count: int) -> int:
        """Epochs from one measurement of the held-out loss to the next.

        Parameters
        ----------
        count : int
            Number of training samples.

        Returns
        -------
        int
            At least 1.
        """
        _, per_epoch = self.plan(count)
        return math.ceil(self.check_steps / per_epoch)


def check_number(name: str, value: Any, above: float, whole: bool = False) -> float:
    """Refuse what is not a finite number above a bound.

    Parameters
    ----------
    name : str
        Name of the setting, for the error.
    value : object
        Its value.
    above : float
        Largest number that is too small: 0 or -1.
    whole : bool, default False
        Whether only whole numbers are allowed.

    Returns
    -------
    float
        The value.

    Raises
    ------
    UsageError
        Another type, NaN or infinite, or too small.
    """
    types = int if whole else (int, float)
    if not isinstance(value, types) or isinstance(value, bool) or not math.isfinite(value):
        kind = "whole number" if whole else "number"
        raise UsageError(f"{name} must be a {kind}, not {value!r}", argument=name)
    if value <= above:
        bound = "above 0" if above == 0 else "0 or more"
        raise UsageError(f"{name} must be {bound}, not {value!r}", argument=name)
    return value


@dataclass(frozen=True)
class Step:
    """Record of one optimiser step.

    Parameters
    ----------
    step : int
        Number of the step, from 1.
    steps : int
        Number of steps in all.
    epoch : int
        Number of epochs that are finished after this step.
    loss : float
        Training loss of the step.
    lr : float
        Learning rate of the step.
    val_loss : float, optional
        On the last step of an epoch, where it was measured: loss of the averaged weights on the held-out samples,
        always with the same noise.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    lr: float
    val_loss: float | None = None


@dataclass
class TrainingState(Resumable):
    """All that a stopped training needs to continue.

    Parameters
    ----------
    denoiser : nn.Module
        The network that is trained.
    average : AveragedModel
        Moving average of its weights.
    optimizer : Optimizer
        AdamW.
    schedule : LRScheduler
        Schedule of the learning rate.
    epoch : int, default 0
        Finished epochs.
    stale : int, default 0
        Epochs since the best held-out loss.
    done : bool, default False
        Whether training has ended.
    seconds : float, default 0.0
        Time spent so far, over all runs.
    best_loss : float, default inf
        Lowest held-out loss so far.
    best : dict, optional
        Averaged weights with that loss.
    early : dict, optional
        Weights after the first epoch, for likelihood regret.
    """

    parts = ("denoiser", "average", "optimizer", "schedule")
    results = ("epoch", "stale", "done", "seconds", "best_loss", "best", "early")

    denoiser: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    epoch: int = 0
    stale: int = 0
    done: bool = False
    seconds: float = 0.0
    best_loss: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)
    early: dict[str, Tensor] = field(default_factory=dict)

    @property
    def network(self) -> nn.Module:
        """The denoiser."""
        return self.denoiser


def start(denoiser: nn.Module, recipe: Recipe, count: int) -> TrainingState:
    """A training that has not begun.

    Parameters
    ----------
    denoiser : nn.Module
        The network to train.
    recipe : Recipe
        How to train it.
    count : int
        Number of training samples.

    Returns
    -------
    TrainingState
    """
    epochs, per_epoch = recipe.plan(count)
    parameters = list(denoiser.parameters())
    # a fifth of the time of a small step; other devices have none, or a slower one
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=fused or None
    )
    schedule = _lr_schedule(optimizer, recipe, epochs * per_epoch)
    average = _GrowingAverage(denoiser, recipe.ema_decay)
    return TrainingState(denoiser, average, optimizer, schedule)


def _lr_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    warmup = min(recipe.warmup_steps, steps)
    if recipe.lr_schedule == "one-cycle":
        rising_share = warmup / (steps + 1) if warmup else 0.1
        return OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps + 1, pct_start=rising_share)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup + 1))
        fall = 0.5 * (1 + math.cos(math.pi * step / steps)) if recipe.lr_schedule == "cosine" else 1.0
        return rise * fall

    return LambdaLR(optimizer, factor)


class _GrowingAverage(AveragedModel):
    """Moving average whose horizon grows with the run, so that short runs are not dominated by their first weights."""

    def __init__(self, denoiser: nn.Module, decay: float) -> None:
        super().__init__(denoiser)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in a model's weights, all at once: one by one takes a tenth of the time of a small step."""
        n = int(self.n_averaged)
        weight = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), weight)
        self.n_averaged += 1


def train(
    state: TrainingState,
    read: ReadSamples,
    count: int,
    validation: Tensor,
    scheduler: NoiseSchedule | SchedulerMixin,
    recipe: Recipe,
    seed: int,
    augment: Augment | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[Step]:
    """Train until the plan ends or the held-out loss has not improved for ``patience`` epochs; then load ``best``.

    Minimises E || target - D(x_t, t) ||^2 over t uniform in 0 .. T - 1 and Gaussian noise. The target is what the
    noise schedule says that networks predict: x_0 (DLSR eq. 4) or the noise (Ho et al., 2020, eq. 14). The order of
    the samples and all noise follow from ``seed`` and the epoch, so that a run that is resumed at the end of an epoch
    ends with the same weights.

    Parameters
    ----------
    state : TrainingState
        From :func:`start`, or loaded from a checkpoint. Changed in place.
    read : callable
        Indices (B,) of training samples, ascending -> the clean samples (B, ...) on the denoiser's device.
    count : int
        Number of training samples.
    validation : Tensor of shape (V, ...)
        Held-out clean samples.
    scheduler : NoiseSchedule or diffusers scheduler
        The noise schedule.
    recipe : Recipe
        How to train.
    seed : int
        Decides the order of the samples and all noise.
    augment : callable, optional
        Changes training samples at random.
    accelerator : accelerate.Accelerator, optional
        Mixed precision and several processes. Each process works on its share of every batch, and all follow the course
        that one process would take.

    Yields
    ------
    Step
        After each optimiser step.

    Raises
    ------
    UsageError
        A batch that the processes cannot share evenly.
    FeatdiffError
        The loss became NaN or infinite.
    """
    epochs, per_epoch = recipe.plan(count)
    check = recipe.epochs_of_a_check(count)
    engine = _Engine(state, scheduler, recipe, accelerator)
    try:
        while state.epoch < epochs and not state.done:
            order = np.random.default_rng((seed, state.epoch)).permutation(count)
            generator = torch.Generator(validation.device).manual_seed(_epoch_seed(seed, state.epoch))
            state.denoiser.train()

            for i in range(per_epoch):
                number = state.epoch * per_epoch + i + 1
                lr = state.optimizer.param_groups[0]["lr"]
                indices = np.sort(order[i * recipe.batch_size : (i + 1) * recipe.batch_size])
                loss = engine.step(*engine.draw(read, indices, generator, augment))
                _check_loss(loss, number)

                val_loss = None
                if i == per_epoch - 1:
                    _close_epoch(state)
                    if state.epoch % check == 0 or state.epoch == epochs:
                        val_loss = engine.validate(validation, seed)
                        _check_loss(val_loss, number)
                        _keep_best(state, val_loss, check, recipe.patience)
                yield Step(number, epochs * per_epoch, number // per_epoch, loss, lr, val_loss)
    finally:
        engine.processes.release(engine.network)

    state.done = True
    state.denoiser.load_state_dict(state.best)
    state.denoiser.eval()


class _Engine:
    """Optimiser steps, on one process or, with an accelerator, on several."""

    def __init__(
        self,
        state: TrainingState,
        scheduler: NoiseSchedule | SchedulerMixin,
        recipe: Recipe,
        accelerator: Accelerator | None,
    ) -> None:
        self.state = state
        self.scheduler = scheduler
        self.recipe = recipe
        self.processes = Processes(accelerator, state.epoch)
        self.network, self.optimizer = self.processes.prepare(state.denoiser, state.optimizer)

        number = self.processes.number
        if recipe.batch_size % number:
            raise UsageError(
                f"{number} processes cannot share a batch_size of {recipe.batch_size} evenly", argument="batch_size"
            )

    def draw(
        self,
        read: ReadSamples,
        indices: np.ndarray,
        generator: torch.Generator,
        augment: Augment | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This process's share of a batch: clean samples, noise and times.

        All processes draw the random numbers of the whole batch, so that the generator is in the same state in each.
        """
        count = len(indices)
        share = self.processes.share(count)
        samples = read(indices if augment else indices[share])

        timesteps = self.scheduler.config.num_train_timesteps
        if samples.dim() == 2:
            t = shared_times(count, timesteps, generator)
        else:
            t = torch.randint(timesteps, (count,), generator=generator, device=samples.device)
        noise = torch.randn((count, *samples.shape[1:]), generator=generator, device=samples.device)
        if augment:
            samples = augment(samples, generator)[share]
        return samples, noise[share], t[share]

    def step(self, x: Tensor, noise: Tensor, t: Tensor) -> float:
        """One optimiser step; returns the mean loss of all processes."""
        state = self.state
        if x.dim() == 2 and self.processes.number == 1:
            x, noise, t = by_time(x, noise, t)
        loss = training_loss(self.network, x, noise, t, self.scheduler)
        self.processes.step(loss, [self.optimizer], state.denoiser.parameters(), self.recipe.clip_norm)

        state.schedule.step()
        state.average.update_parameters(state.denoiser)
        return self.processes.mean(loss.detach())

    def validate(self, validation: Tensor, seed: int) -> float:
        """Held-out loss of the averaged weights, the same number on all processes."""
        return self.processes.mean(validation_loss(self.state.average.module, validation, self.scheduler, seed))


def _epoch_seed(seed: int, epoch: int) -> int:
    """A different seed for each epoch."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check_loss(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FeatdiffError(f"training diverged at step {step} (loss {loss}); lower learning_rate")


def _close_epoch(state: TrainingState) -> None:
    """Count an epoch, and keep the weights after the first one."""
    if state.epoch == 0:
        state.early = _copy_weights(state.denoiser)
    state.epoch += 1


def _keep_best(state: TrainingState, loss: float, epochs: int, patience: int) -> None:
    """Keep the best averaged weights, and count the epochs without progress, ``epochs`` since the last loss."""
    if loss < state.best_loss:
        state.best_loss = loss
        if state.best:
            for name, value in state.average.module.state_dict().items():
                state.best[name].copy_(value)
        else:
            state.best = _copy_weights(state.average.module)
        state.stale = 0
    else:
        state.stale += epochs

    state.done = state.stale >= patience


def _copy_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
