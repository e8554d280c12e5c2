"""The main path: class folders -> rows of the frozen layers -> lessons -> a trained student -> a guard on it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones import fingerprint
from ..calibration import Split, check_fpr, split
from ..detectors.accelerating import make_accelerator
from ..detectors.arguments import resolve_device
from ..detectors.checkpoints import resume, write_checkpoint
from ..detectors.fitting import Table
from ..exceptions import UsageError
from ..features import PRE_LOGITS
from ..guard import Guard
from ..labels import list_labelled
from ..outliers.archive import Outliers
from ..outliers.stable import pooled
from ..persist import check_target
from ..sources import ImageRef
from ..store import FeatureStore, FeatureTable, Progress, default_cache
from .layout import GUARD, STUDENT, is_hardened
from .learning import LearningState, learn, start
from .lessons import Curriculum
from .objective import Objective
from .reading import Glance, Pictures, Reader
from .recipe import HardenRecipe
from .students import Classifier, check_classifier_target, check_head, load_classifier, new_classifier, save_classifier
from .teachers import Teacher, load_teacher
from .trunks import Trunk, default_cut, split_at
from .views import View

if TYPE_CHECKING:
    from accelerate import Accelerator

#: ``train_from`` of a student that is trained as a whole.
ALL_LAYERS = ""
# Raised when the same settings give another student: finished trainings in the cache are not used then.
_VERSION = 1


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
        """Write the folders ``student``, which timm loads, and ``guard``, which belongs to it, below ``folder``."""
        save_classifier(self.classifier, Path(folder) / STUDENT, self.facts)
        self.guard.save_pretrained(Path(folder) / GUARD)


def check_hardened_target(folder: str | os.PathLike[str], replace: bool) -> None:
    """Refuse a folder in which something else would be overwritten, or, unless ``replace``, an earlier student.

    Raises
    ------
    UsageError
    """
    check_classifier_target(Path(folder) / STUDENT)
    check_target(Path(folder) / GUARD)
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
    stop.

    Parameters
    ----------
    images : as for :func:`featdiff.labels.list_labelled`
        Folders or archives with a folder for each class.
    student : a timm name, or the folder of a classifier to begin with
    teacher : a timm name, or the folder of a classifier of the same classes; of any width
        A backbone by name gets a new last layer by logistic regression. Default: none, plain fine-tuning.
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
        Shares of these parts. Default of the first: a tenth, or up to a fifth where ``fpr`` needs that many.
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
    # class folders -> a student, cut in two
    check_fpr(fpr)
    if views < 1:
        raise UsageError(f"views must be a whole number above 0, not {views}")
    refs, labels, classes = list_labelled(images)
    if len(classes) < 2:
        raise UsageError(f"a classifier needs at least two classes, and all images lie in {classes[0]!r}")
    classifier = _student(student, classes, weights, seed, place)
    trunk, network = _cut(classifier, train_from)
    guide = load_teacher(teacher, classes, place) if teacher else None
    # images -> rows of the frozen layers, and what the teacher makes of them
    with accelerator.main_process_first() if accelerator else nullcontext():
        known, kept = _look(reader, refs, labels, trunk, progress)
        calibration = calibration or _calibration_share(len(known.refs), fpr)
        rows = split(len(known.refs), calibration, validation, seed)
        check_fpr(fpr, len(rows.calibration))
        _check_classes(known.labels[rows.training], classes)
        tables = _views(reader, known, kept, classifier, trunk, views, progress)
        taught = _taught(reader, known, rows, guide, views, progress) if guide else []
    shaped = trunk.maps if trunk else _as_they_are
    curriculum = Curriculum(tables, shaped, known.labels, rows.training, place, guide, taught)
    if outliers is not None and recipe.micl:
        curriculum.outliers = _kinds(outliers)
    # lessons -> a trained student
    facts = {
        **{"student": student, "weights_before": fingerprint(classifier.model), "teacher": guide and guide.name},
        **{"outliers": _about(outliers), "recipe": asdict(recipe), "train_from": trunk.layer if trunk else ALL_LAYERS},
        **{"views": views, "seed": seed, "calibration": calibration, "validation": validation, "classes": classes},
        "images": {"training": len(rows.training), "validation": len(rows.validation)},
    }
    objective = _objective(network, recipe, curriculum, seed)
    state = start(objective, recipe)
    key = [_VERSION, facts, guide and guide.key(), mixed_precision, known.labels.tolist()]
    file = reader.cache / "hardening" / f"{_hash(key, known.digests)}.pt"
    _train(state, curriculum, rows, recipe, seed, file, accelerator, progress)
    classifier.model.requires_grad_(False).eval()
    # -> a guard on it; its images for calibration are those that trained nothing
    guarded = Guard(
        classifier.model,
        fpr=fpr,
        logit_heads=("energy",),
        transform=classifier.transform,
        calibration=calibration,
        validation=validation,
        seed=seed,
        device=str(place),
        cache=reader.cache,
        image_batch=image_batch,
        workers=workers,
        max_pixels=reader.max_pixels,
        **(guard or {}),
    )
    classifier.model.to(memory_format=torch.channels_last)  # half as long; and as it was, for what comes after
    guarded.fit(known.refs, progress)
    classifier.model.to(memory_format=torch.contiguous_format)
    facts |= {"accuracy": state.best_accuracy, "seconds": state.seconds, "epochs": state.history}
    return Hardened(classifier, guarded, facts, known.unreadable)


@dataclass(frozen=True)
class _Known:
    """Different images that can be read: a reference, a digest and a label each; and those that cannot."""

    refs: list[ImageRef]
    digests: list[bytes]
    labels: np.ndarray
    unreadable: list[tuple[str, str]]


def _look(
    reader: Reader, refs: Sequence[ImageRef], labels: np.ndarray, trunk: Trunk | None, progress: Progress | None
) -> tuple[_Known, FeatureStore]:
    """See all images once, through the frozen layers if there are any; of copies, the first counts."""
    found, kept = reader.extract(refs, trunk or Glance(), "hardening", 0, np.float16, progress)
    if not found.paths:
        path, reason = found.unreadable[0]
        raise UsageError(f"none of the images could be read; the first: {path}: {reason}")
    by_path = {ref.path: i for i, ref in enumerate(refs)}
    first: dict[bytes, int] = {}
    for path, digest in zip(found.paths, found.digests, strict=True):
        first.setdefault(digest, by_path[path])
    places = [*first.values()]
    return _Known([refs[i] for i in places], [*first], labels[places], found.unreadable), kept


def _calibration_share(images: int, fpr: float) -> float:
    """A tenth, or up to a fifth of few images, so that there are twice as many as the rate needs at least."""
    return min(0.2, max(0.1, 2 / (fpr * images)))


def _check_classes(labels: np.ndarray, classes: Sequence[str]) -> None:
    """Whether there is a training image of every class (``UsageError``)."""
    for number, name in enumerate(classes):
        if not (labels == number).any():
            raise UsageError(f"class {name!r} has no image left to train on: add images of it, or leave it out")


def _student(
    name: str, classes: Sequence[str], weights: str | os.PathLike[str] | None, seed: int, device: torch.device
) -> Classifier:
    """A new classifier on a backbone, or one in a folder to begin with."""
    folder = Path(name) / STUDENT if is_hardened(name) else Path(name)
    if folder.is_dir() and weights is None:
        found = load_classifier(folder)
        if found.classes != tuple(classes):
            raise UsageError(
                f"the student at {folder} has the classes {', '.join(found.classes)}, the images {', '.join(classes)}: "
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


def _views(
    reader: Reader,
    known: _Known,
    kept: FeatureStore,
    classifier: Classifier,
    trunk: Trunk | None,
    views: int,
    progress: Progress | None,
) -> list[Table]:
    """What the student takes of each view; the first has been seen, and is ``kept``, where layers are frozen."""
    if trunk is None:
        return [Pictures(known.refs, View(view, classifier.transform), reader) for view in range(views)]
    others = [
        reader.table(known.refs, known.digests, trunk, "hardening", view, np.float16, progress)
        for view in range(1, views)
    ]
    return [kept.table(known.digests), *others]


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


def _taught(
    reader: Reader, known: _Known, rows: Split, teacher: Teacher, views: int, progress: Progress | None
) -> list[FeatureTable]:
    """The teacher's pre-logits of each view; a backbone learns the classes first."""
    tables = [
        reader.table(known.refs, known.digests, teacher, "hardening", view, np.float32, progress)
        for view in range(views)
    ]
    if teacher.head is None:
        parts = [(tables[0][part], known.labels[part]) for part in (rows.training, rows.validation)]
        teacher.fit_head(*parts[0], *parts[1])
    return tables


def _kinds(outliers: Outliers) -> tuple[Tensor, ...]:
    """What the bound looks at: pre-logits of outliers where there are such, else whole rows; and latents."""
    vectors = outliers.vectors[:, outliers.columns.get(PRE_LOGITS, slice(None))]
    return (vectors,) if outliers.latents is None else (vectors, pooled(outliers.latents))


def _objective(network: nn.Module, recipe: HardenRecipe, curriculum: Curriculum, seed: int) -> Objective:
    """What the losses need besides the network, seeded."""
    student: Any = network
    widths = (curriculum.teacher.width if curriculum.teacher else 0, tuple(k.shape[1] for k in curriculum.outliers))
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        torch.default_generator.manual_seed(seed)
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
    file.parent.mkdir(parents=True, exist_ok=True)
    resume(state, file)
    leads = accelerator is None or accelerator.is_main_process
    finished, last = state.done, time.monotonic()
    renew = (lambda epoch: curriculum.renew(state.objective, seed + epoch)) if recipe.energy else (lambda epoch: None)
    held_out = curriculum.held_out(rows.validation)
    for step in learn(state, curriculum, len(rows.training), held_out, recipe, seed, renew, accelerator):
        now = time.monotonic()
        state.seconds, last = state.seconds + now - last, now
        if step.accuracy is not None and leads:
            write_checkpoint(state, file)
        if progress and leads:
            progress("training", step.step, step.steps)
    if not finished and leads:
        write_checkpoint(state, file)


def _about(outliers: Outliers | None) -> dict[str, Any] | None:
    """What the facts say of outliers."""
    if outliers is None:
        return None
    parts = (outliers.vectors, *(() if outliers.latents is None else (outliers.latents,)))
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    return {"method": outliers.method, "n": len(outliers), "sha256": digest}


def _hash(facts: object, digests: Sequence[bytes]) -> str:
    return hashlib.sha256(repr(facts).encode() + b"".join(digests)).hexdigest()[:16]
