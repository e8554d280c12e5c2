"""Objective + rows -> a trained student, as a generator of small step records. Knows no files and no images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..exceptions import FeatdiffError, UsageError
from ..runtime.checkpoints import Resumable
from ..runtime.processes import Processes
from .objective import Lesson, Objective
from .recipe import HardenRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

# Learning rates of networks that only losses need, as in the released code of outlier-aware learning.
_PROJECTION_FACTOR = 2.0
_CLUB_RATE = 1e-4

#: Row numbers (B,) of the training rows, and a source of chance -> what the student is to learn from them.
Lessons = Callable[[np.ndarray, np.random.Generator], Lesson]


@dataclass(frozen=True)
class LearningStep:
    """One optimiser step; ``losses`` are weighted, ``accuracy`` is set on the last step of an epoch (held-out rows)."""

    step: int
    steps: int
    losses: Mapping[str, float]
    accuracy: float | None = None


@dataclass
class LearningState(Resumable):
    """All that a run needs to go on after a stop.

    ``best`` are the weights of the epoch with the highest accuracy on held-out rows (of equals, the later), ``history``
    has for each epoch its mean losses and accuracy.
    """

    parts = ("objective", "optimizer", "club_optimizer")
    results = ("epoch", "stale", "done", "seconds", "best_accuracy", "best", "history")

    objective: Objective
    optimizer: torch.optim.Optimizer
    club_optimizer: torch.optim.Optimizer | None
    epoch: int = 0
    stale: int = 0
    done: bool = False
    seconds: float = 0.0
    best_accuracy: float = -1.0
    best: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def network(self) -> nn.Module:
        return self.objective.network


def start(objective: Objective, recipe: HardenRecipe) -> LearningState:
    """A fresh state: SGD for the student and its projection, Adam (as published: SGD) for the networks of the bound."""
    factor = 1 / (1 + recipe.distillation) if objective.taught else 1.0
    groups = [{"params": [p for p in objective.network.parameters() if p.requires_grad], "factor": factor}]
    if objective.projection is not None:
        groups.append({"params": [*objective.projection.parameters()], "factor": _PROJECTION_FACTOR * factor})
    if recipe.bound_as_loss and len(objective.clubs):
        groups.append({"params": [*objective.clubs.parameters()], "factor": _CLUB_RATE / recipe.learning_rate})
    optimizer = torch.optim.SGD(
        groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    clubs = [] if recipe.bound_as_loss else [*objective.clubs.parameters()]
    return LearningState(objective, optimizer, torch.optim.Adam(clubs, lr=_CLUB_RATE) if clubs else None)


def learn(
    state: LearningState,
    lessons: Lessons,
    n_rows: int,
    held_out: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    recipe: HardenRecipe,
    seed: int,
    before_epoch: Callable[[int], None] = lambda epoch: None,
    accelerator: Accelerator | None = None,
) -> Iterator[LearningStep]:
    """Train until the plan ends or held-out accuracy has not risen for ``patience`` epochs; then load ``best``.

    What is drawn follows from ``seed`` and the epoch, so a run resumed at an epoch's end goes the same way.

    Parameters
    ----------
    n_rows : int
        Training rows; those that fill no batch are left out of an epoch.
    held_out : callable
        Gives batches of rows (B, ...) as the student takes them, and their labels (B,).
    before_epoch : callable, optional
        Gets the number of the epoch that begins.
    accelerator : accelerate.Accelerator, optional
        Mixed precision, and several processes, each with its share of every batch.

    Raises
    ------
    UsageError
        Fewer rows than a batch, or a batch that the processes cannot share evenly.
    FeatdiffError
        A loss became NaN or infinite.
    """
    engine, size = _Engine(state, recipe, accelerator), recipe.batch_size
    per_epoch = n_rows // size
    if not per_epoch:
        raise UsageError(f"{n_rows} training images do not fill a batch of {size}: lower --train-batch (batch_size)")
    steps = recipe.epochs * per_epoch
    thread = None if engine.device.type == "mps" else ThreadPoolExecutor(1)  # work of two threads can crash MPS
    try:
        while state.epoch < recipe.epochs and not state.done:
            before_epoch(state.epoch)
            order = np.random.default_rng((seed, state.epoch)).permutation(n_rows)
            # each process draws for its own share
            rng = np.random.default_rng((seed, state.epoch, 1 + engine.processes.rank))
            totals: dict[str, float] = {}
            state.objective.train()
            batches = [np.sort(part)[engine.share] for part in order[: per_epoch * size].reshape(per_epoch, size)]
            for i, (lesson, chance) in enumerate(_ahead(lessons, batches, rng, thread)):
                number = state.epoch * per_epoch + i
                engine.set_rates(_rate(number, steps, recipe.warm_up))
                losses = engine.update(lesson, chance)
                _check(losses, number + 1)
                totals = {name: totals.get(name, 0.0) + value / per_epoch for name, value in losses.items()}
                accuracy = None
                if i == per_epoch - 1:
                    accuracy = engine.accuracy(held_out())
                    _close_epoch(state, accuracy, totals, recipe.patience)
                yield LearningStep(number + 1, steps, losses, accuracy)
    finally:
        if thread:
            thread.shutdown()
        engine.processes.release(engine.network)
    state.done = True
    state.network.load_state_dict(state.best)
    state.objective.eval()


def check_processes(recipe: HardenRecipe, processes: int) -> None:
    """Refuse a batch that so many processes cannot share evenly, two rows or more each (``UsageError``)."""
    if recipe.batch_size % processes or recipe.batch_size < 2 * processes:
        raise UsageError(
            f"{processes} processes cannot share a batch_size of {recipe.batch_size} evenly, 2 or more each"
        )


@torch.inference_mode()
def held_out_accuracy(objective: Objective, held_out: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of rows whose largest logit is that of their label, in eval mode; batches of (B, ...) and (B,)."""
    objective.eval()
    right = [objective.answer(rows)[1].argmax(1) == labels for rows, labels in held_out]
    return torch.cat(right).sum().item() / sum(map(len, right))


def _ahead(
    lessons: Lessons, batches: Sequence[np.ndarray], rng: np.random.Generator, thread: ThreadPoolExecutor | None
) -> Iterator[tuple[Lesson, int]]:
    """The lesson of each batch and a number drawn after it; with a thread, the next is prepared during a step."""

    def prepare(batch: np.ndarray) -> tuple[Lesson, int]:
        return lessons(batch, rng), int(rng.integers(2**63))

    if thread is None:
        yield from map(prepare, batches)
        return
    upcoming = thread.submit(prepare, batches[0])
    for batch in batches[1:]:
        ready, upcoming = upcoming.result(), thread.submit(prepare, batch)
        yield ready
    yield upcoming.result()


class _Engine:
    """One optimiser step, on one process or, with an accelerator, on several."""

    def __init__(self, state: LearningState, recipe: HardenRecipe, accelerator: Accelerator | None) -> None:
        self.objective, self.recipe, self.optimizer = state.objective, recipe, state.optimizer
        self.processes = Processes(accelerator, state.epoch)
        optimizers = [o for o in (state.optimizer, state.club_optimizer) if o is not None]
        self.network, *self.optimizers = self.processes.prepare(state.objective, *optimizers)
        check_processes(recipe, self.processes.number)
        self.share = slice(self.processes.rank, None, self.processes.number)
        self.device = next(state.objective.parameters()).device

    def set_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:  # asked for anew: what prepares an optimizer may replace them
            group["lr"] = self.recipe.learning_rate * group["factor"] * factor

    def update(self, lesson: Lesson, seed: int) -> dict[str, float]:
        """``seed`` decides what dropout and stochastic depth leave out; the caller's random state is left alone."""
        with _chance(seed, self.device):
            losses = self.network(lesson)
        total = torch.stack([*losses.values()]).sum()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.processes.backward(total)
        for optimizer in self.optimizers:
            optimizer.step()
        return {name: self.processes.mean(loss.detach().float()) for name, loss in losses.items()}

    def accuracy(self, held_out: Iterable[tuple[Tensor, Tensor]]) -> float:
        """On held-out rows; see :func:`held_out_accuracy`."""
        found = held_out_accuracy(self.objective, held_out)
        return found if self.processes.number == 1 else self.processes.mean(torch.tensor(found, device=self.device))


@contextmanager
def _chance(seed: int, device: torch.device) -> Iterator[None]:
    """Chance that follows from a seed on the CPU and the device; afterwards it is as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for all GPUs
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _close_epoch(state: LearningState, accuracy: float, losses: dict[str, float], patience: int) -> None:
    state.epoch += 1
    state.history.append({"accuracy": accuracy} | losses)
    state.stale = 0 if accuracy > state.best_accuracy else state.stale + 1
    if accuracy >= state.best_accuracy:
        state.best_accuracy = accuracy
        state.best = {name: value.detach().clone() for name, value in state.network.state_dict().items()}
    state.done = state.stale >= patience


def _rate(step: int, steps: int, warm_up: float) -> float:
    """Share of the learning rate at a step: up for a share of the run, then down by a cosine."""
    warm = warm_up * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def _check(losses: Mapping[str, float], step: int) -> None:
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise FeatdiffError(f"training diverged at step {step} ({name} {loss}): lower the learning rate")
