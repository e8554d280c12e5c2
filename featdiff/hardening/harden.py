"""The main path: class folders -> rows of the frozen layers -> lessons -> a trained student -> a guard on it."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.labels import list_labelled
from ..data.splits import Split
from ..exceptions import ModelError, UsageError, first_line, some_of
from ..features.layout import PRE_LOGITS
from ..features.networks import fingerprint
from ..files.atomic import write_atomically
from ..files.cache import default_cache
from ..files.model_folder import check_target
from ..guard.guard import Guard
from ..outliers.outlier_file import Outliers
from ..outliers.stable_diffusion import pooled
from ..outliers.synthesis import ONE_CLASS
from ..runtime.checkpoints import Checkpointer, resume
from ..runtime.devices import resolve_device
from ..runtime.processes import make_accelerator
from ..runtime.progress import Progress
from ..runtime.randomness import seeded
from .batches import FEWEST, Curriculum
from .dataset import Preparation
from .frozen import Trunk, default_cut, split_at
from .layout import GUARD, STUDENT, is_hardened
from .objective import Objective
from .reading import FOLDER, Reader
from .recipe import HardenRecipe
from .students import (
    Classifier,
    check_classifier_target,
    check_head,
    classifier_folder,
    load_classifier,
    new_classifier,
    save_classifier,
    training_facts,
)
from .teachers import load_teacher
from .training import LearningState, check_processes, learn, start

if TYPE_CHECKING:
    from accelerate import Accelerator

#: The file that lists images that were left out.
LEFT_OUT = "left_out.csv"
#: ``train_from`` of a student that is trained as a whole.
ALL_LAYERS = ""
# Raised when the same settings give another student: finished trainings in the cache are not used then.
_VERSION = 2


@dataclass
class Hardened:
    """A student and the guard on it.

    ``facts`` say how it came about: settings, numbers of images, accuracy on held-out images, and for each epoch its
    losses; ``unreadable`` lists images that were left out, with a reason.
    """

    classifier: Classifier
    guard: Guard
    facts: dict[str, Any]
    unreadable: list[tuple[str, str]]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the folders ``student``, which timm loads, and ``guard``, which belongs to it, below ``folder``.

        Images that were left out are listed beside them, in ``left_out.csv`` (path, reason).
        """
        save_classifier(self.classifier, Path(folder) / STUDENT, self.facts)
        self.guard.save_pretrained(Path(folder) / GUARD)
        stream = io.StringIO()
        csv.writer(stream).writerows([("path", "reason"), *self.unreadable])
        try:
            write_atomically(Path(folder) / LEFT_OUT, stream.getvalue().encode())
        except OSError as error:
            raise ModelError(f"{LEFT_OUT} could not be written to {folder}: {first_line(error)}") from None


def check_hardened_target(folder: str | os.PathLike[str], replace: bool) -> None:
    """Refuse a folder in which something else would be overwritten, or, unless ``replace``, an earlier student.

    Raises
    ------
    UsageError
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"{folder} is a file: name a folder with -o")
    check_classifier_target(Path(folder) / STUDENT)
    check_target(Path(folder) / GUARD)
    if (Path(folder) / LEFT_OUT).exists() and not is_hardened(folder):
        raise UsageError(f"{folder} has a {LEFT_OUT} of somebody else's: choose another -o")
    if is_hardened(folder) and not replace:
        raise UsageError(f"a hardened student is already at {folder}: add --force to replace it, or choose another -o")


def load_hardened(folder: str | os.PathLike[str], **runtime: Any) -> tuple[Classifier, Guard]:
    """The classifier and the guard of a folder, strictly; ``runtime`` as for :meth:`featdiff.Guard.from_pretrained`."""
    classifier = load_classifier(Path(folder) / STUDENT)
    device = resolve_device(runtime.pop("device", "auto"))
    classifier.model.to(device)
    options = {"transform": classifier.transform, "device": str(device), **runtime}
    return classifier, Guard.from_pretrained(Path(folder) / GUARD, classifier.model, **options)


def harden(
    images: object,
    student: str,
    teacher: str | None = None,
    outliers: Outliers | None = None,
    *,
    recipe: HardenRecipe | None = None,
    train_from: str | None = None,
    views: int = 2,
    weights: str | os.PathLike[str] | None = None,
    fpr: float = 0.05,
    calibration: float | None = None,
    validation: float = 0.05,
    mixed_precision: str = "no",
    seed: int = 0,
    device: str = "auto",
    cache: str | os.PathLike[str] | None = None,
    image_batch: int = 32,
    workers: int | None = None,
    max_pixels: int | None = None,
    guard: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Hardened:
    """Fine-tune a classifier on labelled images, keep it close to a teacher and away from outliers, and guard it.

    After outlier-aware learning (Gao & Li, ICMR 2025, arXiv 2406.16525). A part of the images calibrates the guard and
    trains nothing, so its false-alarm rate holds; another decides when training ends. Frozen layers run once for
    each view of an image, and what they give is kept in the cache, as is the training: the same call goes on after a
    stop. What a teacher of featdiff's gives may be made from rows that the cache has, in half precision: students may
    then differ by that rounding.

    Parameters
    ----------
    images : as for :func:`featdiff.data.labels.list_labelled`
        Folders or archives with a folder for each class.
    student : a timm name, or the folder of a classifier to begin with
    teacher : a timm name, or the folder of a classifier of the same classes; of any width
        A backbone by name (or ``local-dir:FOLDER``) gets a new last layer by logistic regression. Default: none, plain
        fine-tuning. Which images calibrate follows from their contents, so a teacher that was made of these images by
        this function has not seen them; of any other teacher, only you know.
    outliers : Outliers
        From :func:`featdiff.outliers.synthesis.synthesise`, for the bound of mutual information; it is left out
        without them.
    recipe : HardenRecipe
    train_from : str, optional
        The last frozen layer, ``""`` to train all. Default: the deepest stage but the last.
    views : int
        Of each image: itself, its mirror image, and cut-outs; see :class:`featdiff.hardening.views.View`.
    weights : path, optional
        Of the student at the beginning.
    calibration, validation : float
        Shares of these parts, taken by the images' contents. Default of the first: a tenth, or up to a fifth where
        ``fpr`` needs that many.
    mixed_precision : ``no`` or ``bf16``
    guard : mapping, optional
        Further arguments of :class:`featdiff.Guard`, like ``recipe`` and ``layers``.
    others : as for :class:`featdiff.Detector`

    Raises
    ------
    UsageError
        Fewer than two classes, too few images, or settings that make no sense together.
    WeightsError, ModelError
        Weights that cannot be had.
    FeatdiffError
        Training diverged, or the cache cannot be written.
    """
    recipe = recipe or HardenRecipe()
    place = resolve_device(device)
    reader = Reader(Path(cache) if cache else default_cache(), image_batch, workers, max_pixels or Reader.max_pixels)
    accelerator = make_accelerator(mixed_precision, place)
    if accelerator is not None and accelerator.num_processes > 1:
        place = accelerator.device
        check_processes(recipe, accelerator.num_processes)
    # class folders -> a student, cut in two, and the guard that it will have
    prepare = Preparation(reader, views, fpr, calibration, validation, recipe.batch_size, progress)
    refs, labels, classes = list_labelled(images)
    if len(classes) < 2:
        raise UsageError(f"a classifier needs at least two classes, and all images lie in {classes[0]!r}")
    _check_classes(outliers, classes)
    classifier = _student(student, classes, weights, seed, place)
    labels = np.array([classifier.classes.index(name) for name in classes])[labels]
    classes = [*classifier.classes]
    trunk, network = _cut(classifier, train_from)
    guide = load_teacher(teacher, classes, place) if teacher else None
    guarded = Guard(
        classifier.model,
        fpr=fpr,
        extra_heads=("energy",),
        transform=classifier.transform,
        seed=seed,
        device=str(place),
        cache=reader.cache,
        image_batch=image_batch,
        workers=workers,
        max_pixels=reader.max_pixels,
        **(guard or {}),
    )
    guarded.check_layers()
    # images -> rows of the frozen layers, and what the teacher makes of them
    _unseen(prepare.held_back(len(refs)), student, teacher)
    with _first(accelerator):
        material = prepare(refs, labels, classifier, trunk, guide)
    held_back = prepare.held_back(len(material.refs))
    unseen = _unseen(held_back, student, teacher)
    if recipe.energy and np.bincount(material.labels[material.rows.training]).max() < FEWEST:
        raise UsageError(f"--energy needs a class of at least {FEWEST} training images: add images, or leave it away")
    shaped = trunk.maps if trunk else _as_they_are
    rows = material.rows
    curriculum = Curriculum(material.views, shaped, material.labels, rows.training, place, guide, material.taught)
    if outliers is not None and recipe.micl:
        curriculum.outliers = _kinds(outliers)
    # lessons -> a trained student
    facts = {
        **{"student": student, "weights_before": fingerprint(classifier.model)},
        **{"teacher": guide and guide.name, "teacher_weights": guide and fingerprint(guide.network.model)},
        **{"outliers": _about(outliers), "recipe": asdict(recipe), "train_from": trunk.layer if trunk else ALL_LAYERS},
        **{"views": views, "seed": seed, "classes": classes, "held_out": min(unseen, held_back)},
        "images": {"training": len(rows.training), "validation": len(rows.validation)},
    }
    state = start(_objective(network, recipe, curriculum, seed), recipe)
    about = [classifier.data_config, mixed_precision, material.labels.tolist(), guide and [guide.key(), guide.classes]]
    file = reader.cache / FOLDER / f"{_hash([_VERSION, facts, about], material.digests)}.pt"
    _train(state, curriculum, rows, recipe, seed, file, accelerator, progress)
    classifier.model.requires_grad_(False).eval()
    # -> a guard on it; its images for calibration are those that trained nothing
    classifier.model.to(memory_format=torch.channels_last)  # half as long; and as it was, for what comes after
    with _first(accelerator):
        guarded.fit(material.refs, progress, rows)
    classifier.model.to(memory_format=torch.contiguous_format)
    facts |= {"accuracy": state.best_accuracy, "seconds": state.seconds, "epochs": state.history}
    if guide:
        facts["teacher_accuracy"] = guide.accuracy(
            material.taught[0][rows.validation], material.labels[rows.validation]
        )
    return Hardened(classifier, guarded, facts, material.unreadable)


def _first(accelerator: Accelerator | None) -> AbstractContextManager[Any]:
    """Of several processes, one goes first; the others find what it leaves in the cache."""
    return accelerator.main_process_first() if accelerator else nullcontext()


def _check_classes(outliers: Outliers | None, classes: Sequence[str]) -> None:
    """Whether outliers lie beside these images (``UsageError``)."""
    if outliers is not None and outliers.classes not in ([ONE_CLASS], classes):
        raise UsageError(
            f"the outliers lie beside the classes {some_of(outliers.classes)}, the images have {some_of(classes)}: "
            "make outliers from these images"
        )


def _unseen(needed: float, *folders: str | None) -> float:
    """The share of images that neither the student nor the teacher that were given has seen; 1 for those of others.

    All are split by content, so what the one held back, others did; of classifiers that are not featdiff's own, only
    the user knows.

    Raises
    ------
    UsageError
        Less than the share ``needed`` to calibrate and to choose among epochs.
    """
    shares = {folder: training_facts(folder).get("held_out", 1.0) for folder in folders if folder}
    for folder, share in shares.items():
        if needed > share + 1e-9:
            raise UsageError(
                f"{folder} was trained on all but {share:.1%} of its images, and {needed:.1%} must be held back here: "
                "ask for a higher --fpr, or train it anew on as many images and at this --fpr"
            )
    return min(shares.values(), default=1.0)


def _student(
    name: str, classes: Sequence[str], weights: str | os.PathLike[str] | None, seed: int, device: torch.device
) -> Classifier:
    """A new classifier on a backbone, or one in a folder to begin with, whose classes may stand in another order."""
    if (folder := classifier_folder(name)) is not None:
        if weights is not None:
            raise UsageError("--weights belong to a backbone by name; a classifier in a folder has its own")
        found = load_classifier(folder)
        if sorted(found.classes) != sorted(classes):
            raise UsageError(
                f"the student at {folder} has the classes {some_of(found.classes)}, the images {some_of(classes)}: "
                "begin with a backbone by name"
            )
    else:
        found = new_classifier(name, classes, weights, seed=seed)
    check_head(found)
    found.model.to(device)
    return found


def _cut(classifier: Classifier, train_from: str | None) -> tuple[Trunk | None, nn.Module]:
    """The frozen layers, if any, and what is trained."""
    if train_from == ALL_LAYERS:
        return None, classifier.model.requires_grad_(True)
    return split_at(classifier, train_from or default_cut(classifier))


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


def _kinds(outliers: Outliers) -> tuple[Tensor, ...]:
    """What the bound looks at: pre-logits of outliers where there are such, else whole rows; and latents."""
    vectors = outliers.vectors[:, outliers.columns.get(PRE_LOGITS, slice(None))]
    return (vectors,) if outliers.latents is None else (vectors, pooled(outliers.latents))


def _objective(network: nn.Module, recipe: HardenRecipe, curriculum: Curriculum, seed: int) -> Objective:
    """What the losses need besides the network, seeded."""
    student: Any = network
    widths = (curriculum.teacher.width if curriculum.teacher else 0, tuple(k.shape[1] for k in curriculum.outliers))
    with seeded(seed):
        return Objective(network, student.get_classifier().in_features, recipe, *widths).to(curriculum.device)


def _train(
    state: LearningState,
    curriculum: Curriculum,
    rows: Split,
    recipe: HardenRecipe,
    seed: int,
    file: Path,
    accelerator: Accelerator | None,
    progress: Progress | None,
) -> None:
    """Train the student, or take it from ``file``, where the run is kept at the end of epochs."""
    leads = accelerator is None or accelerator.is_main_process
    keeper = Checkpointer(state, file, leads)
    renew = (lambda epoch: curriculum.renew(state.objective, seed + epoch)) if recipe.energy else (lambda epoch: None)
    for step in learn(
        state,
        curriculum,
        len(rows.training),
        lambda: curriculum.held_out(rows.validation),
        recipe,
        seed,
        renew,
        accelerator,
    ):
        keeper.after_step(step.accuracy is not None)
        if progress and leads:
            progress("training", step.step, step.steps)
    keeper.finish()
    if accelerator:  # buffers of the processes differ: all go on with what the first one kept
        accelerator.wait_for_everyone()
        resume(state, file)
        state.network.load_state_dict(state.best)


def _about(outliers: Outliers | None) -> dict[str, Any] | None:
    """What the facts say of outliers."""
    if outliers is None:
        return None
    digest = hashlib.sha256()
    for part in (outliers.vectors, outliers.latents):
        for rows in () if part is None else part.split(1024):
            digest.update(rows.numpy().tobytes())
    return {"method": outliers.method, "n": len(outliers), "sha256": digest.hexdigest()}


def _hash(facts: object, digests: Sequence[bytes]) -> str:
    return hashlib.sha256(repr(facts).encode() + b"".join(digests)).hexdigest()[:16]
