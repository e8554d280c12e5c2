"""Trains a student and fits a guard on it.

In: images in class folders, the name of a student, and perhaps a teacher and outliers. Out: a classifier, a guard on
it, and facts about the training. Along the way: images -> features of the frozen layers -> batches -> trained student
-> guard.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.labels import list_labelled
from ..data.references import ImageRef
from ..detectors import Detector
from ..detectors.run_config import Runtime
from ..exceptions import UsageError, some_of
from ..features.networks import fingerprint
from ..files.atomic import filling, write_atomically
from ..files.model_folder import check_target
from ..files.text import for_spreadsheet
from ..guard.guard import Guard
from ..outliers.outlier_file import Outliers
from ..outliers.synthesis import ONE_CLASS
from ..runtime.devices import resolve_device
from ..runtime.progress import Progress
from .batches import MIN_CLASS_SIZE
from .dataset import DatasetBuilder, StudentDataset
from .layout import GUARD, STUDENT, find_model, is_hardened
from .reading import FOLDER, Reader
from .recipe import HardenRecipe
from .run import ALL_LAYERS, Networks, choose_devices, first_process_first, load_networks, make_batches, train_student
from .students import Classifier, check_classifier_target, check_unseen, load_classifier, save_classifier
from .teachers import Teacher

#: The file that lists images that were left out.
LEFT_OUT = "left_out.csv"
# Raised when the same settings give another student, so that trained students in the cache are not used.
_VERSION = 3


@dataclass
class Hardened:
    """A student and the guard on it.

    Attributes
    ----------
    classifier : Classifier
    guard : Guard
    facts : dict
        About the training: settings, numbers of images, accuracy on held-out images, and the losses of each epoch.
    unreadable : list of (path, reason)
        Images that were left out.
    """

    classifier: Classifier
    guard: Guard
    facts: dict[str, Any]
    unreadable: list[tuple[str, str]]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the folders ``student``, which timm loads, and ``guard``, and a list of left out images.

        A new folder appears with all of it or not at all; an earlier student is replaced when all is written.

        Parameters
        ----------
        folder : path
            The list is ``left_out.csv`` (path, reason) in it.

        Raises
        ------
        UsageError
            The folder holds something else.
        FeatdiffError
            The disk is full or the folder cannot be written.
        """
        check_classifier_target(Path(folder) / STUDENT)
        check_target(Path(folder) / GUARD)
        stream = io.StringIO()
        rows = [(for_spreadsheet(path), for_spreadsheet(reason)) for path, reason in self.unreadable]
        csv.writer(stream).writerows([("path", "reason"), *rows])

        with filling(Path(folder)) as place:
            save_classifier(self.classifier, place / STUDENT, self.facts)
            self.guard.save_pretrained(place / GUARD)
            write_atomically(place / LEFT_OUT, stream.getvalue().encode())


def check_hardened_target(folder: str | os.PathLike[str], replace: bool) -> None:
    """Refuse a folder in which something else would be overwritten.

    Parameters
    ----------
    folder : path
    replace : bool
        Whether an earlier student may be replaced.

    Raises
    ------
    UsageError
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"{folder} is a file: name a folder", argument="folder")
    check_classifier_target(Path(folder) / STUDENT)
    check_target(Path(folder) / GUARD)
    if (Path(folder) / LEFT_OUT).exists() and not is_hardened(folder):
        raise UsageError(
            f"{folder} has a {LEFT_OUT} that featdiff did not write: choose another folder", argument="folder"
        )
    if is_hardened(folder) and not replace:
        raise UsageError(
            f"a hardened student is already at {folder}: replace it, or choose another folder", argument="replace"
        )


def save_with_guard(hardened: str | os.PathLike[str], detector: Detector, folder: str | os.PathLike[str]) -> None:
    """Write the student of a folder as it is, beside a guard with this detector; errors as of :class:`Hardened`.

    Parameters
    ----------
    hardened : path
        What :meth:`Hardened.save_pretrained` wrote.
    detector : Detector
        Of its guard, changed.
    folder : path
        Another one.
    """
    check_classifier_target(Path(folder) / STUDENT)
    check_target(Path(folder) / GUARD)
    with filling(Path(folder)) as place:
        shutil.copytree(Path(hardened) / STUDENT, place / STUDENT)
        detector.save_pretrained(place / GUARD)


def load_hardened(folder: str | os.PathLike[str], **runtime: Any) -> tuple[Classifier, Guard]:
    """Load what :meth:`Hardened.save_pretrained` wrote, strictly.

    Parameters
    ----------
    folder : path
        Or ``org/name`` or ``org/name@revision`` on the hub.
    **runtime
        As for :meth:`featdiff.Guard.from_pretrained`.

    Returns
    -------
    classifier : Classifier
    guard : Guard
    """
    folder = find_model(folder)
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
    guard: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **runtime: Any,
) -> Hardened:
    """Fine-tune a classifier on labelled images, close to a teacher and away from outliers, and fit a guard on it.

    After outlier-aware learning (Gao & Li, ICMR 2025, arXiv 2406.16525). Some of the images only calibrate the guard,
    so its false-alarm rate holds; others decide when training ends. Frozen layers run once for each view of an image.
    Their output and the training are kept in the cache, so the same call continues after a stop. The pre-logits of a
    teacher that featdiff trained may be computed from cached features in half precision; students may then differ by
    that rounding.

    Parameters
    ----------
    images : object
        As for :func:`featdiff.data.labels.list_labelled`: folders or archives with a folder for each class.
    student : str
        A timm name, or the folder of a classifier to start from.
    teacher : str, optional
        A timm name, or the folder of a classifier of the same classes, of any width. A backbone by name (or
        ``local-dir:FOLDER``) gets a new last layer by logistic regression. Default: none, plain fine-tuning. The
        images' contents decide which of them calibrate. So a teacher that this function trained on these images has
        not seen the calibration images; of any other teacher, only you know.
    outliers : Outliers, optional
        From :func:`featdiff.outliers.synthesis.synthesise`, for the bound of mutual information.
    recipe : HardenRecipe, optional
    train_from : str, optional
        The last frozen layer, or ``""`` to train all. Default: the deepest stage but the last.
    views : int, default 2
        Of each image: itself, its mirror image, and crops; see :class:`featdiff.hardening.views.View`.
    weights : path, optional
        Initial weights of the student.
    fpr : float, default 0.05
        Of the guard.
    calibration : float, optional
        Share of the images. Default: a tenth, or up to a fifth where ``fpr`` needs that many.
    validation : float, default 0.05
        Share of the images.
    mixed_precision : {"no", "bf16"}, default "no"
    seed : int, default 0
    guard : mapping, optional
        Further arguments of :class:`featdiff.Guard`, such as ``recipe`` and ``layers``.
    progress : callable, optional
        Called with a stage, and how much of it is done and in total.
    **runtime
        ``device``, ``image_batch``, ``workers``, ``max_pixels``, ``max_bytes``, ``cache``: see
        :class:`featdiff.detectors.config.Runtime`.

    Returns
    -------
    Hardened

    Raises
    ------
    UsageError
        Fewer than two classes, too few images, or settings that contradict each other.
    WeightsError, ModelError
        Weights that are not available.
    FeatdiffError
        Training diverged, or the cache cannot be written.
    """
    recipe = recipe or HardenRecipe()
    settings = Runtime(**runtime)
    target, accelerator = choose_devices(settings.device, mixed_precision, recipe)
    reader = Reader(settings)
    build = DatasetBuilder(reader, views, fpr, calibration, validation, recipe.batch_size, progress)

    # the networks, and the guard that the student will have
    refs, labels, folder_classes = _list_classes(images, outliers)
    networks = load_networks(student, teacher, folder_classes, train_from, weights, seed, target)
    student_guard = Guard(
        networks.classifier.model,
        fpr=fpr,
        extra_heads=("energy",),
        transform=networks.classifier.transform,
        seed=seed,
        **asdict(replace(settings, device=str(target))),
        **(guard or {}),
    )
    student_guard.check_layers()

    # the data set: the output of the frozen layers, and the teacher's answers
    check_unseen(build.held_back(len(refs)), student, teacher)
    class_order = np.array([networks.classes.index(name) for name in folder_classes])
    with first_process_first(accelerator):
        dataset = build(refs, class_order[labels], networks.classifier, networks.frozen, networks.teacher)
    held_back = build.held_back(len(dataset.refs))
    unseen = min(check_unseen(held_back, student, teacher), held_back)
    _check_class_sizes(dataset, recipe)

    # the training
    facts = _settings(student, networks, outliers, recipe, views, seed, unseen, dataset)
    file = settings.cache_folder / FOLDER / f"{_key(facts, networks, mixed_precision, dataset)}.pt"
    batches = make_batches(dataset, networks, outliers, recipe, target)
    state = train_student(networks, batches, dataset.split, recipe, seed, file, accelerator, progress)

    # the guard, calibrated on images that trained nothing
    with first_process_first(accelerator):
        _fit_guard(student_guard, networks.classifier, dataset, progress)
    facts |= {"accuracy": state.best_accuracy, "seconds": state.seconds, "epochs": state.history}
    if networks.teacher:
        facts["teacher_accuracy"] = _teacher_accuracy(networks.teacher, dataset)
    return Hardened(networks.classifier, student_guard, facts, dataset.unreadable)


def _list_classes(images: object, outliers: Outliers | None) -> tuple[list[ImageRef], np.ndarray, list[str]]:
    """Images, labels and class names; outliers must be of the same classes (``UsageError``)."""
    refs, labels, classes = list_labelled(images)
    if len(classes) < 2:
        raise UsageError(
            f"a classifier needs at least two classes, and all images lie in {classes[0]!r}", argument="images"
        )
    if outliers is not None and outliers.classes not in ([ONE_CLASS], classes):
        raise UsageError(
            f"the outliers belong to the classes {some_of(outliers.classes)}, the images have {some_of(classes)}: "
            "make outliers from these images",
            argument="outliers",
        )
    return refs, labels, classes


def _check_class_sizes(dataset: StudentDataset, recipe: HardenRecipe) -> None:
    largest = np.bincount(dataset.labels[dataset.split.training]).max()
    if recipe.energy and largest < MIN_CLASS_SIZE:
        raise UsageError(
            f"energy needs a class of at least {MIN_CLASS_SIZE} training images: add images, or drop it",
            argument="energy",
        )


def _settings(
    student: str,
    networks: Networks,
    outliers: Outliers | None,
    recipe: HardenRecipe,
    views: int,
    seed: int,
    unseen: float,
    dataset: StudentDataset,
) -> dict[str, Any]:
    """Facts that are known before the training. Their order is part of cache keys."""
    teacher = networks.teacher
    return {
        "student": student,
        "weights_before": fingerprint(networks.classifier.model),
        "teacher": teacher and teacher.name,
        "teacher_weights": teacher and fingerprint(teacher.network.model),
        "outliers": outlier_facts(outliers),
        "recipe": asdict(recipe),
        "train_from": networks.frozen.layer if networks.frozen else ALL_LAYERS,
        "views": views,
        "seed": seed,
        "classes": networks.classes,
        "held_out": unseen,
        "images": {
            "training": len(dataset.split.training),
            "validation": len(dataset.split.validation),
        },
    }


def _key(facts: Mapping[str, Any], networks: Networks, mixed_precision: str, dataset: StudentDataset) -> str:
    """A short hash of everything that decides the trained student."""
    teacher = networks.teacher
    further = [
        networks.classifier.data_config,
        mixed_precision,
        dataset.labels.tolist(),
        teacher and [teacher.key(), teacher.classes],
    ]
    described = repr([_VERSION, facts, further]).encode()
    return hashlib.sha256(described + b"".join(dataset.digests)).hexdigest()[:16]


def _fit_guard(guard: Guard, classifier: Classifier, dataset: StudentDataset, progress: Progress | None) -> None:
    classifier.model.to(memory_format=torch.channels_last)  # takes half as long
    guard.fit(dataset.refs, progress, dataset.split)
    classifier.model.to(memory_format=torch.contiguous_format)  # as it was


def _teacher_accuracy(teacher: Teacher, dataset: StudentDataset) -> float:
    validation = dataset.split.validation
    return teacher.accuracy(dataset.teacher_features[0][validation], dataset.labels[validation])


def outlier_facts(outliers: Outliers | None) -> dict[str, Any] | None:
    """What the facts of a training say about the outliers."""
    if outliers is None:
        return None
    digest = hashlib.sha256()
    for tensor in (outliers.vectors, outliers.latents):
        if tensor is not None:
            for block in tensor.split(1024):
                digest.update(block.numpy().tobytes())
    return {
        "method": outliers.method,
        "n": len(outliers),
        "sha256": digest.hexdigest(),
    }
