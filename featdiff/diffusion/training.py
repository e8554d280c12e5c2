"""Denoiser + clean rows + schedule -> a trained denoiser, as a generator of small step records.

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

from ..exceptions import FeatdiffError, UsageError
from ..runtime.checkpoints import Resumable
from ..runtime.processes import Processes
from .schedules import add_noise

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import SchedulerMixin


Rows = Callable[[np.ndarray], Tensor]  # row numbers (B,) -> clean rows (B, ...)
LR_SCHEDULES = ("one-cycle", "cosine", "constant")


@dataclass(frozen=True)
class Recipe:
    """How to train, with AdamW.

    ``epochs`` is stretched to at least ``min_steps`` and cut at ``max_steps`` steps in all; a single one is cut at
    ``epoch_steps``, so that progress is measured and kept often. The learning rate rises for ``warmup_steps`` (0: a
    tenth of the run for ``one-cycle``, none for others). Gradients longer than ``clip_norm`` are cut; 0 leaves them.
    """

    epochs: int = 30
    batch_size: int = 256
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

    def __post_init__(self) -> None:
        if self.lr_schedule not in LR_SCHEDULES:
            raise UsageError(f"unknown lr_schedule {self.lr_schedule!r}; known: {', '.join(LR_SCHEDULES)}")
        for name in ("epochs", "batch_size", "patience", "max_steps", "epoch_steps", "learning_rate"):
            check_number(name, getattr(self, name), above=0, whole=name != "learning_rate")
        for name in ("min_steps", "warmup_steps"):
            check_number(name, getattr(self, name), above=-1, whole=True)
        for name, highest in (("weight_decay", math.inf), ("clip_norm", math.inf), ("ema_decay", 1.0)):
            value = check_number(name, getattr(self, name), above=-math.inf)
            if not 0 <= value <= highest:
                raise UsageError(f"{name} must be 0 or more{', at most 1' if highest == 1 else ''}, not {value}")

    def plan(self, rows: int) -> tuple[int, int]:
        """(epochs, steps per epoch) for this many training rows."""
        per_epoch = min(max(1, rows // self.batch_size), self.epoch_steps, self.max_steps)
        epochs = max(self.epochs, math.ceil(self.min_steps / per_epoch))
        return min(epochs, self.max_steps // per_epoch), per_epoch


def check_number(name: str, value: Any, above: float, whole: bool = False) -> float:
    """A finite number above -1, 0 or any other (``UsageError``)."""
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
class TrainingState(Resumable):
    """All that a run needs to go on after a stop: live weights, their moving average, optimiser, schedule, history.

    ``early`` holds the weights after the first epoch (for likelihood regret), ``best`` the averaged weights with the
    lowest held-out loss so far.
    """

    parts = ("denoiser", "average", "optimizer", "schedule")
    results = ("epoch", "stale", "done", "seconds", "best_loss", "best", "early")

    denoiser: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    epoch: int = 0
    stale: int = 0
    done: bool = False
    seconds: float = 0.0
    best_loss: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)
    early: dict[str, Tensor] = field(default_factory=dict)

    @property
    def network(self) -> nn.Module:
        return self.denoiser


def start(denoiser: nn.Module, recipe: Recipe, rows: int) -> TrainingState:
    """A fresh training state for ``rows`` training rows (AdamW, exponential moving average of the weights)."""
    epochs, per_epoch = recipe.plan(rows)
    steps = epochs * per_epoch
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = _lr_schedule(optimizer, recipe, steps)
    average = AveragedModel(denoiser, multi_avg_fn=_warm_ema(recipe.ema_decay))
    return TrainingState(denoiser, average, optimizer, schedule)


def _lr_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    warm = min(recipe.warmup_steps, steps)
    if recipe.lr_schedule == "one-cycle":
        share = warm / (steps + 1) if warm else 0.1
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=steps + 1, pct_start=share
        )

    def factor(step: int) -> float:
        falling = 0.5 * (1 + math.cos(math.pi * step / steps)) if recipe.lr_schedule == "cosine" else 1.0
        return min(1.0, (step + 1) / (warm + 1)) * falling

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


Augment = Callable[[Tensor, torch.Generator], Tensor]  # rows (B, ...) and a source of chance -> rows to train on


def train(
    state: TrainingState,
    rows: Rows,
    n_rows: int,
    validation: Tensor,
    scheduler: SchedulerMixin,
    recipe: Recipe,
    seed: int,
    augment: Augment | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[Step]:
    """Train until the plan ends or the held-out loss has not improved for ``patience`` epochs; then load ``best``.

    Minimises E || target - D(x_t, t) ||^2 over t uniform in 0 .. T - 1 and Gaussian noise, where the target is what
    the schedule says that networks predict: x_0 (DLSR eq. 4) or the noise (Ho et al., 2020, eq. 14). The order of
    rows and all noise follow from ``seed`` and the epoch, so a run resumed at an epoch's end goes the same way.

    Parameters
    ----------
    rows : callable
        Row numbers (B,) -> clean rows (B, ...) on the denoiser's device.
    validation : (V, ...)
        Held-out clean rows.
    augment : callable, optional
        Changes training rows by chance.
    accelerator : accelerate.Accelerator, optional
        Mixed precision, and several processes: each works on its share of every batch, and all go the same way as
        one process would.

    Raises
    ------
    UsageError
        A batch that the processes cannot share evenly.
    FeatdiffError
        The loss became NaN or infinite.
    """
    device = validation.device
    epochs, per_epoch = recipe.plan(n_rows)
    engine = _Engine(state, recipe, accelerator)
    try:
        while state.epoch < epochs and not state.done:
            order = np.random.default_rng((seed, state.epoch)).permutation(n_rows)
            source = torch.Generator(device).manual_seed(_mix(seed, state.epoch))
            state.denoiser.train()
            for i in range(per_epoch):
                batch = np.sort(order[i * recipe.batch_size : (i + 1) * recipe.batch_size])
                lr = state.optimizer.param_groups[0]["lr"]
                x, noise, t = engine.share(rows, batch, scheduler.config.num_train_timesteps, source, augment)
                loss = engine.update(x, noise, t, scheduler)
                number = state.epoch * per_epoch + i + 1
                _check_loss(loss, number)
                val_loss = None
                if i == per_epoch - 1:
                    val_loss = engine.processes.mean(validation_loss(state.average.module, validation, scheduler, seed))
                    _check_loss(val_loss, number)
                    _close_epoch(state, val_loss, recipe.patience)
                yield Step(number, epochs * per_epoch, number // per_epoch, loss, lr, val_loss)
    finally:
        engine.processes.release(engine.network)
    state.done = True
    state.denoiser.load_state_dict(state.best)
    state.denoiser.eval()


class _Engine:
    """One optimiser step, on one process or, with an accelerator, on several."""

    def __init__(self, state: TrainingState, recipe: Recipe, accelerator: Accelerator | None) -> None:
        self.state, self.recipe = state, recipe
        self.processes = Processes(accelerator, state.epoch)
        self.network, self.optimizer = self.processes.prepare(state.denoiser, state.optimizer)
        if recipe.batch_size % (number := self.processes.number):
            raise UsageError(f"{number} processes cannot share a batch_size of {recipe.batch_size} evenly")

    def share(
        self, rows: Rows, batch: np.ndarray, total_t: int, source: torch.Generator, augment: Augment | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This process's part of a batch: clean rows, noise, times. All draw the same and keep their own."""
        every = self.processes.number
        mine = slice(self.processes.rank, len(batch) // every * every, every)
        x = rows(batch) if augment else rows(batch[mine])
        t = torch.randint(total_t, (len(batch),), generator=source, device=x.device)
        noise = torch.randn((len(batch), *x.shape[1:]), generator=source, device=x.device)
        return augment(x, source)[mine] if augment else x, noise[mine], t[mine]

    def update(self, x: Tensor, noise: Tensor, t: Tensor, scheduler: SchedulerMixin) -> float:
        state = self.state
        loss = _loss(self.network, x, noise, t, scheduler)
        self.optimizer.zero_grad(set_to_none=True)
        self.processes.backward(loss)
        if self.recipe.clip_norm:
            self.processes.clip(state.denoiser.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        state.schedule.step()
        state.average.update_parameters(state.denoiser)
        return self.processes.mean(loss.detach())


def _loss(denoiser: nn.Module, x: Tensor, noise: Tensor, t: Tensor, scheduler: SchedulerMixin) -> Tensor:
    target = x if scheduler.config.prediction_type == "sample" else noise
    return nn.functional.mse_loss(denoiser(add_noise(scheduler, x, noise, t), t).float(), target)


def _mix(seed: int, epoch: int) -> int:
    """A seed of its own for every epoch."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check_loss(loss: float | None, step: int) -> None:
    if loss is not None and not math.isfinite(loss):
        raise FeatdiffError(f"training diverged at step {step} (loss {loss}); lower learning_rate")


def _close_epoch(state: TrainingState, loss: float, patience: int) -> None:
    """Remember the best averaged weights, and count epochs without progress."""
    if state.epoch == 0:
        state.early = _snapshot(state.denoiser)
    if loss < state.best_loss:
        state.best_loss, state.stale = loss, 0
        state.best = _snapshot(state.average.module)
    else:
        state.stale += 1
    state.done = state.stale >= patience
    state.epoch += 1


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@torch.inference_mode()
def validation_loss(
    denoiser: nn.Module, x: Tensor, scheduler: SchedulerMixin, seed: int, at_once: int = 1 << 20
) -> Tensor:
    """The loss () on ``x`` (V, ...) with times spread evenly and noise that is the same at every call.

    Rows of ``at_once`` numbers in all go through the network together.
    """
    was_training = denoiser.training
    denoiser.eval()
    source = torch.Generator(x.device).manual_seed(seed)
    spread = (torch.arange(len(x), device=x.device) + 0.5) * scheduler.config.num_train_timesteps / len(x)
    t = spread.long()[torch.randperm(len(x), generator=source, device=x.device)]
    noise = torch.randn(x.shape, generator=source, device=x.device)
    size = max(1, at_once // x[0].numel())
    parts = zip(x.split(size), noise.split(size), t.split(size), strict=True)
    total = torch.stack([len(part[0]) * _loss(denoiser, *part, scheduler) for part in parts]).sum()
    denoiser.train(was_training)
    return total / len(x)


def _warm_ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """Moving average whose horizon grows with the run, so that short runs are not stuck at their first weights."""

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        n = float(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update
