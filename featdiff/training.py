"""Denoiser + clean vectors + schedule -> a trained denoiser, as a generator of small step records.

The loop knows no files: the caller reads rows, shows progress, stops early and keeps checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .exceptions import FeatdiffError, UsageError
from .noise import add_noise

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

Rows = Callable[[np.ndarray], Tensor]  # row numbers (B,) -> clean vectors (B, D)
_RESULTS = ("epoch", "stale", "done", "seconds", "best_loss", "best", "early")
LR_SCHEDULES = ("one-cycle", "cosine", "constant")


@dataclass(frozen=True)
class Recipe:
    """How to train. ``epochs`` is stretched to at least ``min_steps`` and cut at ``max_steps`` steps in all."""

    epochs: int = 30
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    lr_schedule: str = "one-cycle"
    ema_decay: float = 0.999
    patience: int = 10
    min_steps: int = 600
    max_steps: int = 20_000

    def __post_init__(self) -> None:
        if self.lr_schedule not in LR_SCHEDULES:
            raise UsageError(f"unknown lr_schedule {self.lr_schedule!r}; known: {', '.join(LR_SCHEDULES)}")
        for name in ("epochs", "batch_size", "patience", "max_steps", "learning_rate"):
            _check(name, getattr(self, name), above=0, whole=name != "learning_rate")
        _check("min_steps", self.min_steps, above=-1, whole=True)
        for name, highest in (("weight_decay", math.inf), ("ema_decay", 1.0)):
            value = _check(name, getattr(self, name), above=-math.inf)
            if not 0 <= value <= highest:
                raise UsageError(
                    f"{name} must be 0 or more{'' if name == 'weight_decay' else ', at most 1'}, not {value}"
                )

    def plan(self, rows: int) -> tuple[int, int]:
        """(epochs, steps per epoch) for this many training rows."""
        per_epoch = min(max(1, rows // self.batch_size), self.max_steps)
        epochs = max(self.epochs, math.ceil(self.min_steps / per_epoch))
        return min(epochs, self.max_steps // per_epoch), per_epoch


def _check(name: str, value: Any, above: float, whole: bool = False) -> float:
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
        raise UsageError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r}")
    if value <= above:
        raise UsageError(f"{name} must be {'above 0' if above == 0 else '0 or more'}, not {value!r}")
    return value


@dataclass(frozen=True)
class Step:
    """One optimiser step. ``val_loss`` is set on the last step of an epoch: the loss of the averaged weights on
    held-out rows, always with the same noise."""

    step: int
    steps: int
    epoch: int
    loss: float
    lr: float
    val_loss: float | None = None


@dataclass
class TrainingState:
    """All that a run needs to go on after a stop: live weights, their moving average, optimiser, schedule, history.

    ``early`` holds the weights after the first epoch (for likelihood regret), ``best`` the averaged weights with the
    lowest held-out loss so far.
    """

    denoiser: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    epoch: int = 0
    stale: int = 0
    done: bool = False
    seconds: float = 0.0  # spent so far, over all runs; the caller's to count
    best_loss: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)
    early: dict[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only, fit for ``weights_only=True``; the results alone once done."""
        plain = {name: getattr(self, name) for name in _RESULTS}
        if self.done:
            return plain
        parts = {name: getattr(self, name).state_dict() for name in ("denoiser", "average", "optimizer", "schedule")}
        return plain | parts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        for name, value in state.items():
            if name in ("denoiser", "average", "optimizer", "schedule"):
                getattr(self, name).load_state_dict(value)
            else:
                setattr(self, name, value)


def start(denoiser: nn.Module, recipe: Recipe, rows: int) -> TrainingState:
    """A fresh training state for ``rows`` training rows (AdamW, exponential moving average of the weights)."""
    epochs, per_epoch = recipe.plan(rows)
    steps = epochs * per_epoch
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule: torch.optim.lr_scheduler.LRScheduler
    if recipe.lr_schedule == "one-cycle":
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=steps + 1, pct_start=0.1
        )
    elif recipe.lr_schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    else:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    average = AveragedModel(denoiser, multi_avg_fn=_warm_ema(recipe.ema_decay))
    return TrainingState(denoiser, average, optimizer, schedule)


def train(
    state: TrainingState,
    rows: Rows,
    n_rows: int,
    validation: Tensor,
    scheduler: DDIMScheduler,
    recipe: Recipe,
    seed: int,
) -> Iterator[Step]:
    """Train until the plan ends or the held-out loss has not improved for ``patience`` epochs; then load ``best``.

    Minimises E || x_0 - D(x_t, t) ||^2 over t uniform in 0 .. T - 1 and Gaussian noise (DLSR eq. 4). The order of
    rows and all noise follow from ``seed`` and the epoch, so a run resumed at an epoch's end goes the same way.

    Parameters
    ----------
    rows : callable
        Row numbers (B,) -> clean vectors (B, D) on the denoiser's device.
    validation : (V, D)
        Held-out clean vectors.

    Raises
    ------
    FeatdiffError
        The loss became NaN or infinite.
    """
    device = validation.device
    total_t = scheduler.config.num_train_timesteps
    epochs, per_epoch = recipe.plan(n_rows)
    while state.epoch < epochs and not state.done:
        order = np.random.default_rng((seed, state.epoch)).permutation(n_rows)
        noise_source = torch.Generator(device).manual_seed(_mix(seed, state.epoch))
        state.denoiser.train()
        for i in range(per_epoch):
            batch = order[i * recipe.batch_size : (i + 1) * recipe.batch_size]
            lr = state.optimizer.param_groups[0]["lr"]
            loss = _update(state, rows(np.sort(batch)), scheduler, total_t, noise_source)
            number = state.epoch * per_epoch + i + 1
            _check_loss(loss, number)
            val_loss = _close_epoch(state, validation, scheduler, recipe.patience, seed) if i == per_epoch - 1 else None
            _check_loss(val_loss, number)
            yield Step(number, epochs * per_epoch, number // per_epoch, loss, lr, val_loss)
    state.done = True
    state.denoiser.load_state_dict(state.best)
    state.denoiser.eval()


def _mix(seed: int, epoch: int) -> int:
    """A seed of its own for every epoch."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check_loss(loss: float | None, step: int) -> None:
    if loss is not None and not math.isfinite(loss):
        raise FeatdiffError(f"training diverged at step {step} (loss {loss}); lower learning_rate")


def _update(state: TrainingState, x: Tensor, scheduler: DDIMScheduler, total_t: int, source: torch.Generator) -> float:
    t = torch.randint(total_t, (len(x),), generator=source, device=x.device)
    noise = torch.randn(x.shape, generator=source, device=x.device)
    loss = nn.functional.mse_loss(state.denoiser(add_noise(scheduler, x, noise, t), t), x)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.step()
    state.schedule.step()
    state.average.update_parameters(state.denoiser)
    return loss.item()


def _close_epoch(state: TrainingState, validation: Tensor, scheduler: DDIMScheduler, patience: int, seed: int) -> float:
    """Measure the averaged weights, remember the best, count epochs without progress."""
    averaged = state.average.module
    loss = validation_loss(averaged, validation, scheduler, seed)
    if state.epoch == 0:
        state.early = _snapshot(state.denoiser)
    if loss < state.best_loss:
        state.best_loss, state.stale = loss, 0
        state.best = _snapshot(averaged)
    else:
        state.stale += 1
    state.done = state.stale >= patience
    state.epoch += 1
    return loss


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@torch.inference_mode()
def validation_loss(denoiser: nn.Module, x: Tensor, scheduler: DDIMScheduler, seed: int) -> float:
    """Reconstruction loss on ``x`` (V, D) with times spread evenly and noise that is the same at every call."""
    was_training = denoiser.training
    denoiser.eval()
    source = torch.Generator(x.device).manual_seed(seed)
    spread = (torch.arange(len(x), device=x.device) + 0.5) * scheduler.config.num_train_timesteps / len(x)
    t = spread.long()[torch.randperm(len(x), generator=source, device=x.device)]
    noise = torch.randn(x.shape, generator=source, device=x.device)
    loss = nn.functional.mse_loss(denoiser(add_noise(scheduler, x, noise, t), t), x).item()
    denoiser.train(was_training)
    return loss


def _warm_ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """Moving average whose horizon grows with the run, so that short runs are not stuck at their first weights."""

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        n = float(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update
