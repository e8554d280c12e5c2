"""One training run of a student.

In: the names of student and teacher, a data set, outliers and a recipe. Out: the trained student, with its state in the
cache, so that a stopped run continues and a finished one is not repeated.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.splits import Split
from ..outliers.outlier_file import Outliers
from ..outliers.stable_diffusion import pooled
from ..runtime.checkpoints import Checkpointer, resume
from ..runtime.devices import resolve_device
from ..runtime.processes import make_accelerator
from ..runtime.progress import Progress
from ..runtime.threads import training_threads
from .batches import TrainingBatches
from .dataset import StudentDataset
from .frozen import FrozenLayers, default_cut, split_at
from .objective import Objective
from .recipe import HardenRecipe
from .students import Classifier, load_student
from .teachers import Teacher, load_teacher
from .training import LearningState, LearningStep, check_processes, learn, start

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Its records carry ``fields``: step, steps, epoch, lr, loss and its parts, and accuracy at the end of an epoch.
LOG = logging.getLogger(__name__)

#: ``train_from`` of a student all of whose layers are trained.
ALL_LAYERS = ""


@dataclass(frozen=True)
class Networks:
    """A student, cut in two, and its teacher.

    Attributes
    ----------
    classifier : Classifier
        The whole student.
    frozen : FrozenLayers or None
    trained : nn.Module
        The layers behind ``frozen``; the whole network if there are none.
    teacher : Teacher or None
    """

    classifier: Classifier
    frozen: FrozenLayers | None
    trained: nn.Module
    teacher: Teacher | None

    @property
    def classes(self) -> list[str]:
        """In the order of the logits."""
        return [*self.classifier.classes]


def load_networks(
    student: str,
    teacher: str | None,
    classes: Sequence[str],
    train_from: str | None,
    weights: str | os.PathLike[str] | None,
    seed: int,
    device: torch.device,
) -> Networks:
    """Load student and teacher; arguments as for :func:`featdiff.hardening.harden.harden`."""
    classifier = load_student(student, classes, weights, seed, device)
    frozen: FrozenLayers | None = None
    trained = classifier.model
    if train_from == ALL_LAYERS:
        trained.requires_grad_(True)
    else:
        frozen, trained = split_at(classifier, train_from or default_cut(classifier))
    return Networks(
        classifier=classifier,
        frozen=frozen,
        trained=trained,
        teacher=load_teacher(teacher, classifier.classes, device) if teacher else None,
    )


def choose_devices(device: str, mixed_precision: str, recipe: HardenRecipe) -> tuple[torch.device, Accelerator | None]:
    """The device of this process, and an accelerator if one is needed."""
    target = resolve_device(device)
    accelerator = make_accelerator(mixed_precision, target)
    if accelerator is not None and accelerator.num_processes > 1:
        target = accelerator.device
        check_processes(recipe, accelerator.num_processes)
    return target, accelerator


def first_process_first(accelerator: Accelerator | None) -> AbstractContextManager[Any]:
    """The first of several processes runs the block before the others, which then find its results in the cache."""
    return accelerator.main_process_first() if accelerator else nullcontext()


def make_batches(
    dataset: StudentDataset,
    networks: Networks,
    outliers: Outliers | None,
    recipe: HardenRecipe,
    device: torch.device,
) -> TrainingBatches:
    """The source of training batches."""
    return TrainingBatches(
        views=dataset.views,
        to_input=networks.frozen.maps if networks.frozen else _unchanged,
        labels=dataset.labels,
        training=dataset.split.training,
        device=device,
        teacher=networks.teacher,
        teacher_features=dataset.teacher_features,
        outliers=_outlier_kinds(outliers) if outliers is not None and recipe.micl else (),
    )


def train_student(
    networks: Networks,
    batches: TrainingBatches,
    split: Split,
    recipe: HardenRecipe,
    seed: int,
    file: Path,
    accelerator: Accelerator | None,
    progress: Progress | None,
) -> LearningState:
    """Train the student, or load it from ``file``, where the run is saved at the end of epochs.

    Afterwards the student is in eval mode and requires no gradient.
    """
    state = start(_objective(networks.trained, recipe, batches, seed), recipe)
    is_first = accelerator is None or accelerator.is_main_process
    checkpointer = Checkpointer(state, file, is_first)

    def before_epoch(epoch: int) -> None:
        if recipe.energy:
            batches.refresh_outliers(state.objective, seed + epoch)

    def held_out() -> Iterator[tuple[Tensor, Tensor]]:
        return batches.held_out(split.validation)

    sample, _ = next(batches.held_out(split.validation[:1]))
    with training_threads(networks.trained, recipe.batch_size, sample[0]):
        for step in learn(state, batches, len(split.training), held_out, recipe, seed, before_epoch, accelerator):
            checkpointer.after_step(step.accuracy is not None)
            if is_first:
                _log(step, state)
            if progress and is_first:
                progress("training", step.step, step.steps)
    checkpointer.finish()

    if accelerator:  # buffers differ between processes: all continue with those of the first one
        accelerator.wait_for_everyone()
        resume(state, file)
        state.network.load_state_dict(state.best)
    networks.classifier.model.requires_grad_(False).eval()
    return state


def _log(step: LearningStep, state: LearningState) -> None:
    """A record of a step: at the level DEBUG, at the end of an epoch at INFO."""
    level = logging.DEBUG if step.accuracy is None else logging.INFO
    if not LOG.isEnabledFor(level):
        return
    loss = sum(step.losses.values())
    measured = {
        "step": step.step,
        "steps": step.steps,
        "epoch": state.epoch,  # how many are finished
        "lr": state.optimizer.param_groups[0]["lr"],
        "loss": loss,
        **{f"loss_{name}": value for name, value in step.losses.items()},
        **({} if step.accuracy is None else {"accuracy": step.accuracy}),
    }
    LOG.log(level, "step %d of %d, loss %.4g", step.step, step.steps, loss, extra={"fields": measured})


def _unchanged(pixels: Tensor) -> Tensor:
    return pixels


def _outlier_kinds(outliers: Outliers) -> tuple[Tensor, ...]:
    """Outliers for the bound: their pre-logits (without such, all their features), and latents if there are any."""
    pre_logits = outliers.layout.pre_logits
    vectors = outliers.vectors if pre_logits is None else outliers.vectors[:, pre_logits.columns]
    return (vectors,) if outliers.latents is None else (vectors, pooled(outliers.latents))


def _objective(trained: nn.Module, recipe: HardenRecipe, batches: TrainingBatches, seed: int) -> Objective:
    """The losses and their networks, with seeded weights."""
    network: Any = trained
    features = network.get_classifier().in_features
    teacher_width = batches.teacher.width if batches.teacher else 0
    outlier_widths = tuple(kind.shape[1] for kind in batches.outliers)
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        torch.default_generator.manual_seed(seed)
        return Objective(trained, features, recipe, teacher_width, outlier_widths).to(batches.device)
