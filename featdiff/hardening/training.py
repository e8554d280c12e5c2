"""The training loop of a student.

In: an objective, a source of batches and a recipe. Out: a trained student; meanwhile a record of every step. Knows no
files and no images.
"""

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
from .objective import Objective, TrainingBatch
from .recipe import HardenRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

# Learning rates of networks that only losses need, as in the released code of outlier-aware learning.
_PROJECTION_FACTOR = 2.0
_CLUB_RATE = 1e-4

#: Positions (B,) of training images, and a random generator -> the batch of these images.
BatchSource = Callable[[np.ndarray, np.random.Generator], TrainingBatch]


@dataclass(frozen=True)
class LearningStep:
    """Record of one optimiser step.

    Attributes
    ----------
    step : int
        From 1 on.
    steps : int
        Of the whole run.
    losses : mapping of str to float
        Weighted losses.
    accuracy : float, optional
        On held-out images, in [0, 1]; set on the last step of an epoch.
    """

    step: int
    steps: int
    losses: Mapping[str, float]
    accuracy: float | None = None


@dataclass
class LearningState(Resumable):
    """Everything that a run needs to continue after a stop.

    Attributes
    ----------
    objective : Objective
    optimizer : torch.optim.Optimizer
    club_optimizer : torch.optim.Optimizer or None
        Of the networks of the bound.
    epoch : int
        Finished epochs.
    stale : int
        Epochs since held-out accuracy has risen.
    done : bool
    seconds : float
    best_accuracy : float
        On held-out images.
    best : dict of str to Tensor
        Weights of the epoch with the highest accuracy; of equals, the later.
    history : list of dict of str to float
        Mean losses and accuracy of each epoch.
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
        """The student, whose weights ``best`` holds."""
        return self.objective.network


def start(objective: Objective, recipe: HardenRecipe) -> LearningState:
    """Begin a run: SGD for the student and its projection, Adam (as published: SGD) for the networks of the bound.

    Parameters
    ----------
    objective : Objective
    recipe : HardenRecipe

    Returns
    -------
    LearningState
    """
    factor = 1 / (1 + recipe.distillation) if objective.has_teacher else 1.0
    student = [parameter for parameter in objective.network.parameters() if parameter.requires_grad]
    groups = [{"params": student, "factor": factor}]
    if objective.projection is not None:
        groups.append({"params": [*objective.projection.parameters()], "factor": _PROJECTION_FACTOR * factor})

    club_optimizer = None
    clubs = [*objective.clubs.parameters()]
    if clubs and recipe.bound_as_loss:
        groups.append({"params": clubs, "factor": _CLUB_RATE / recipe.learning_rate})
    elif clubs:
        club_optimizer = torch.optim.Adam(clubs, lr=_CLUB_RATE)

    optimizer = torch.optim.SGD(
        groups,
        lr=recipe.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=recipe.weight_decay,
    )
    return LearningState(objective, optimizer, club_optimizer)


def learn(
    state: LearningState,
    make_batch: BatchSource,
    n_images: int,
    held_out: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    recipe: HardenRecipe,
    seed: int,
    before_epoch: Callable[[int], None] = lambda epoch: None,
    accelerator: Accelerator | None = None,
) -> Iterator[LearningStep]:
    """Train until the last epoch, or until held-out accuracy has not risen for ``patience`` epochs; then load ``best``.

    Random numbers depend on ``seed`` and the epoch alone, so a run that is resumed at the end of an epoch gives the
    same result.

    Parameters
    ----------
    state : LearningState
        From :func:`start`; changed in place.
    make_batch : callable
        Positions (B,) of training images, and a random generator -> :class:`TrainingBatch`.
    n_images : int
        Training images. Those that do not fill a batch are left out of an epoch.
    held_out : callable
        Returns batches of the student's input (B, ...) and labels (B,).
    recipe : HardenRecipe
    seed : int
    before_epoch : callable, optional
        Called with the number of the epoch that begins.
    accelerator : accelerate.Accelerator, optional
        For mixed precision, and for several processes, each with its share of every batch.

    Yields
    ------
    LearningStep

    Raises
    ------
    UsageError
        Fewer images than a batch, or a batch that the processes cannot share evenly.
    FeatdiffError
        A loss became NaN or infinite.
    """
    engine = _Engine(state, recipe, accelerator)
    steps_per_epoch = n_images // recipe.batch_size
    if not steps_per_epoch:
        raise UsageError(
            f"{n_images} training images do not fill a batch of {recipe.batch_size}: lower batch_size",
            argument="batch_size",
        )
    steps = recipe.epochs * steps_per_epoch
    thread = None if engine.device.type == "mps" else ThreadPoolExecutor(1)  # two threads can crash MPS
    try:
        while state.epoch < recipe.epochs and not state.done:
            before_epoch(state.epoch)
            state.objective.train()
            positions = _epoch_positions(n_images, recipe.batch_size, (seed, state.epoch), engine.share)
            # each process draws for its own share
            rng = np.random.default_rng((seed, state.epoch, 1 + engine.processes.rank))

            mean_losses: dict[str, float] = {}
            for i, (batch, step_seed) in enumerate(_prefetched(make_batch, positions, rng, thread)):
                step = state.epoch * steps_per_epoch + i
                engine.set_rates(_rate(step, steps, recipe.warm_up))
                losses = engine.update(batch, step_seed)
                _check_finite(losses, step + 1)
                for name, value in losses.items():
                    mean_losses[name] = mean_losses.get(name, 0.0) + value / steps_per_epoch

                accuracy = None
                if i == steps_per_epoch - 1:
                    accuracy = engine.accuracy(held_out())
                    _end_epoch(state, accuracy, mean_losses, recipe.patience)
                yield LearningStep(step + 1, steps, losses, accuracy)
    finally:
        if thread:
            thread.shutdown()
        engine.processes.release(engine.network)
    state.done = True
    state.network.load_state_dict(state.best)
    state.objective.eval()


def check_processes(recipe: HardenRecipe, processes: int) -> None:
    """Refuse a batch that the processes cannot share evenly, two images or more each (``UsageError``)."""
    if recipe.batch_size % processes or recipe.batch_size < 2 * processes:
        raise UsageError(
            f"{processes} processes cannot share a batch_size of {recipe.batch_size} evenly, 2 or more each",
            argument="batch_size",
        )


@torch.inference_mode()
def held_out_accuracy(objective: Objective, held_out: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of images whose largest logit is that of their label, in eval mode.

    Parameters
    ----------
    objective : Objective
        Has the student.
    held_out : iterable of (Tensor of shape (B, ...), Tensor of shape (B,))
        Input of the student, and labels.

    Returns
    -------
    float
        In [0, 1].
    """
    objective.eval()
    correct = torch.cat([objective.answer(x)[1].argmax(1) == labels for x, labels in held_out])
    return correct.sum().item() / len(correct)


def _epoch_positions(n_images: int, batch_size: int, seed: tuple[int, int], share: slice) -> list[np.ndarray]:
    """Positions of the training images of each batch of an epoch, ascending; ``share`` selects those of a process."""
    order = np.random.default_rng(seed).permutation(n_images)
    batches = n_images // batch_size
    full = order[: batches * batch_size].reshape(batches, batch_size)
    return [np.sort(batch)[share] for batch in full]


def _prefetched(
    make_batch: BatchSource,
    positions: Sequence[np.ndarray],
    rng: np.random.Generator,
    thread: ThreadPoolExecutor | None,
) -> Iterator[tuple[TrainingBatch, int]]:
    """Each batch and a seed drawn after it. With a thread, the next batch is made during a step."""

    def prepare(positions: np.ndarray) -> tuple[TrainingBatch, int]:
        return make_batch(positions, rng), int(rng.integers(2**63))

    if thread is None:
        yield from map(prepare, positions)
        return

    upcoming = thread.submit(prepare, positions[0])
    for batch_positions in positions[1:]:
        ready = upcoming.result()
        upcoming = thread.submit(prepare, batch_positions)
        yield ready
    yield upcoming.result()


class _Engine:
    """Runs optimiser steps, on one process or, with an accelerator, on several."""

    def __init__(self, state: LearningState, recipe: HardenRecipe, accelerator: Accelerator | None) -> None:
        self.objective = state.objective
        self.recipe = recipe
        self.optimizer = state.optimizer
        self.processes = Processes(accelerator, state.epoch)
        optimizers = [optimizer for optimizer in (state.optimizer, state.club_optimizer) if optimizer is not None]
        self.network, *self.optimizers = self.processes.prepare(state.objective, *optimizers)
        check_processes(recipe, self.processes.number)
        self.share = slice(self.processes.rank, None, self.processes.number)
        self.device = next(state.objective.parameters()).device

    def set_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:  # read each time: preparing an optimizer may replace them
            group["lr"] = self.recipe.learning_rate * group["factor"] * factor

    def update(self, batch: TrainingBatch, seed: int) -> dict[str, float]:
        """One step. ``seed`` decides dropout and stochastic depth; the caller's random state is left alone."""
        with _seeded(seed, self.device):
            losses = self.network(batch)
        total = torch.stack([*losses.values()]).sum()

        self.processes.step(total, self.optimizers)
        return {name: self.processes.mean(loss.detach().float()) for name, loss in losses.items()}

    def accuracy(self, held_out: Iterable[tuple[Tensor, Tensor]]) -> float:
        """On held-out images; see :func:`held_out_accuracy`."""
        accuracy = held_out_accuracy(self.objective, held_out)
        if self.processes.number == 1:
            return accuracy
        return self.processes.mean(torch.tensor(accuracy, device=self.device))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers on the CPU and the device follow from a seed; afterwards the random state is as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all GPUs
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _end_epoch(state: LearningState, accuracy: float, losses: dict[str, float], patience: int) -> None:
    state.epoch += 1
    state.history.append({"accuracy": accuracy} | losses)
    state.stale = 0 if accuracy > state.best_accuracy else state.stale + 1
    if accuracy >= state.best_accuracy:
        state.best_accuracy = accuracy
        state.best = {name: value.detach().clone() for name, value in state.network.state_dict().items()}
    state.done = state.stale >= patience


def _rate(step: int, steps: int, warm_up: float) -> float:
    """Factor of the learning rate at a step: linear warm-up for a share of the run, then a cosine to 0."""
    warm = warm_up * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def _check_finite(losses: Mapping[str, float], step: int) -> None:
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise FeatdiffError(f"training diverged at step {step} ({name} {loss}): lower the learning rate")
