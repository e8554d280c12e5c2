"""Classifiers to be trained, and the folders they are saved in.

In: the name of a backbone, or a folder. Out: a timm network with a head for its classes. Saved, it is a folder in
timm's own layout (``config.json``, ``model.safetensors``), which timm loads without featdiff.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.decoding import Transform
from ..exceptions import ModelError, UsageError, first_line, some_of
from ..features.backbones import Backbone, load_backbone
from ..features.networks import evaluating
from ..files.model_folder import CONFIG, check_target, read_verified, write_pair
from ..files.strict_json import parse_json
from .layout import STUDENT, is_hardened

#: Key of ``config.json`` for the facts about the training.
FACTS = "featdiff"
_LOCAL = "local-dir:"


@dataclass(frozen=True)
class Classifier:
    """A timm network with all parameters trainable, and everything needed to use it the same way again.

    Parameters
    ----------
    model : nn.Module
        Turns images (B, 3, H, W) into logits (B, classes); in eval mode.
    name : str
        Architecture and tag, such as ``resnet18.a1_in1k``.
    classes : tuple of str
        In the order of the logits.
    data_config : dict
        Preprocessing, as timm resolves it.
    transform : callable
        The same as a function: RGB image -> (3, H, W) tensor.
    model_args : dict
        Keyword arguments of ``timm.create_model``, without the number of classes.
    """

    model: nn.Module
    name: str
    classes: tuple[str, ...]
    data_config: dict[str, Any]
    transform: Transform
    model_args: dict[str, Any]


def new_classifier(
    name: str,
    classes: Sequence[str],
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
    model_args: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Classifier:
    """Make a classifier from a timm backbone, with a new head.

    Parameters
    ----------
    name : str
    weights : path, optional
    pretrained : bool, default True
    model_args : mapping, optional
        These four as for :func:`featdiff.features.backbones.load_backbone`, which loads the weights.
    classes : sequence of str
        Names in the order of the logits, at least two.
    seed : int, default 0
        Decides the initial weights of the head. The caller's random state is left alone.

    Returns
    -------
    Classifier

    Raises
    ------
    UsageError
        An unknown name, wrong classes or arguments, or a network whose classifier cannot be replaced.
    WeightsError
        The weights are not available or do not fit.

    Examples
    --------
    >>> new_classifier("test_resnet", ("cat", "dog"), pretrained=False).model.get_classifier().out_features
    2
    """
    import timm

    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise UsageError(f"a classifier needs two classes or more, each named once, not {', '.join(classes) or 'none'}")
    build_args = _without_classes(model_args or {})
    # a classifier sees what its network was trained on, and what timm shows it where it is used without featdiff
    backbone = load_backbone(name, weights, pretrained, build_args, view="crop")
    model: Any = backbone.model

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        if hasattr(model, "reset_classifier"):
            model.reset_classifier(len(classes))
    with torch.device("meta"):
        expected = timm.create_model(name, pretrained=False, num_classes=len(classes), **build_args)
    if repr(model) != repr(expected):  # once saved, it could not be built again
        raise UsageError(f"{backbone.tag} cannot be given a classifier of its own; choose another network")
    if name.startswith(_LOCAL):
        build_args = _build_args(_read_config(Path(name.partition(":")[2]))) | build_args
    return _classifier(backbone, tuple(classes), build_args)


def load_classifier(folder: str | os.PathLike[str]) -> Classifier:
    """Load a timm classifier from a folder, strictly.

    Parameters
    ----------
    folder : path
        Written by :func:`save_classifier` or by timm. Classes without names are called ``0``, ``1`` and so on.

    Returns
    -------
    Classifier

    Raises
    ------
    ModelError
        No such folder, or it does not hold a timm classifier.
    WeightsError
        Its weights are missing, do not fit or hold NaN.
    """
    folder = Path(folder)
    config = _read_config(folder)
    classes = _class_names(config, folder)
    if FACTS in config:  # featdiff saved it; others' classifiers have no digest
        read_verified(folder, config, "classifier")

    try:
        backbone = load_backbone(f"local-dir:{folder}", model_args={"num_classes": len(classes)}, view="crop")
    except UsageError as error:  # the folder is wrong, not the request
        raise ModelError(f"the classifier at {folder} is damaged: {error}") from None
    return _classifier(backbone, classes, _build_args(config))


def load_student(
    name: str,
    classes: Sequence[str],
    weights: str | os.PathLike[str] | None,
    seed: int,
    device: torch.device,
) -> Classifier:
    """Make or load the classifier that is to be trained.

    Parameters
    ----------
    name : str
        A timm backbone, or the folder of a classifier to start from.
    classes : sequence of str
        Names of the images' classes. A classifier in a folder may have them in another order.
    weights : path, optional
        Weights of a backbone.
    seed : int
        Decides the initial weights of a new head.
    device : torch.device

    Returns
    -------
    Classifier

    Raises
    ------
    UsageError
        A classifier of other classes, weights for a classifier in a folder, or a network without a linear last layer.
    ModelError, WeightsError
        The folder holds no classifier, or the weights are not available.
    """
    folder = classifier_folder(name)
    if folder is None:
        student = new_classifier(name, classes, weights, seed=seed)
    else:
        if weights is not None:
            raise UsageError(
                "weights belong to a backbone by name; a classifier in a folder has its own", argument="weights"
            )
        student = load_classifier(folder)
        if sorted(student.classes) != sorted(classes):
            raise UsageError(
                f"the student at {folder} has the classes {some_of(student.classes)}, the images {some_of(classes)}: "
                "start from a backbone by name",
                argument="student",
            )

    check_head(student)
    student.model.to(device)
    return student


def classifier_folder(name: str) -> Path | None:
    """The folder of a classifier, if a name means one.

    Parameters
    ----------
    name : str
        A path, or the name of a backbone. A folder that :func:`featdiff.hardening.harden.harden` filled means the
        student in it.

    Returns
    -------
    Path or None
        None for a backbone.

    Raises
    ------
    UsageError
        A path without a folder, or a folder with the name of a backbone.
    """
    import timm

    folder = Path(name)
    if folder.is_dir():
        if not _is_path(name) and timm.is_model(name.partition(".")[0]):
            raise UsageError(f"{name} is a backbone of timm's, and a folder here: write ./{name}, or rename the folder")
        return folder / STUDENT if is_hardened(folder) else folder
    if _is_path(name) and ":" not in name:  # backbones have no such names
        raise UsageError(f"there is no folder {name}")
    return None


def _is_path(name: str) -> bool:
    return "/" in name or os.sep in name


def training_facts(name: str) -> dict[str, Any]:
    """Facts that featdiff saved about the training of a classifier.

    Parameters
    ----------
    name : str
        A folder, ``local-dir:FOLDER``, or the name of a backbone.

    Returns
    -------
    dict
        Empty for a backbone, and for a classifier that featdiff did not train.
    """
    folder = Path(name[len(_LOCAL) :]) if name.startswith(_LOCAL) else classifier_folder(name)
    facts = _read_config(folder).get(FACTS) if folder else None
    return facts if isinstance(facts, dict) else {}


def check_unseen(needed: float, *names: str | None) -> float:
    """Check that enough images were held back when the given student and teacher were trained.

    featdiff splits by content, so the images that one training held back are those that others do. What a classifier
    was trained on that featdiff did not train, only the user knows.

    Parameters
    ----------
    needed : float
        Share of the images that calibrates or chooses among epochs, in [0, 1].
    *names : str or None
        Student and teacher.

    Returns
    -------
    float
        Share of the images that none of them was trained on; 1 for classifiers that featdiff did not train.

    Raises
    ------
    UsageError
        A smaller share than needed.
    """
    shares = {name: training_facts(name).get("held_out", 1.0) for name in names if name}
    for name, share in shares.items():
        if needed > share + 1e-9:
            raise UsageError(
                f"{name} was trained on all but {share:.1%} of its images, and {needed:.1%} must be held back here: "
                "use a higher fpr, or train it again on as many images and at this fpr",
                argument="fpr",
            )
    return min(shares.values(), default=1.0)


@torch.inference_mode()
def check_head(classifier: Classifier) -> None:
    """Refuse a network whose logits are not one linear layer of its pre-logits (``UsageError``)."""
    model: Any = classifier.model
    if not isinstance(head := model.get_classifier(), nn.Linear):
        raise UsageError(f"{classifier.name} ends in {type(head).__name__}, not in one linear layer: take another one")
    probe = torch.randn(1, *classifier.data_config["input_size"], generator=torch.Generator().manual_seed(0))
    probe = probe.to(head.weight.device)

    with evaluating(model):
        logits = model(probe)
        head_alone = head(model.forward_head(model.forward_features(probe), pre_logits=True))
    if logits.shape != head_alone.shape or not torch.allclose(logits, head_alone, rtol=1e-3, atol=1e-4):
        raise UsageError(f"the logits of {classifier.name} do not come from its last layer alone: take another one")


def save_classifier(classifier: Classifier, folder: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
    """Save a classifier so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives the same logits.

    Parameters
    ----------
    classifier : Classifier
    folder : path
        A classifier that featdiff saved there before is replaced; other files stay.
    facts : mapping
        Written to ``config.json`` under ``featdiff``; must be possible as JSON.

    Raises
    ------
    UsageError
        The folder holds something else.
    ModelError
        The disk is full or the folder cannot be written; an older classifier stays whole.
    """
    check_classifier_target(folder)
    write_pair(folder, _config(classifier, facts), classifier.model.state_dict())


def check_classifier_target(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder with anything but a classifier that featdiff saved (``UsageError``)."""
    check_target(folder, _is_ours, "classifier that featdiff wrote")


def _classifier(backbone: Backbone, classes: tuple[str, ...], model_args: dict[str, Any]) -> Classifier:
    model: Any = backbone.model.eval().requires_grad_(True)
    name = ".".join(filter(None, (model.pretrained_cfg["architecture"], model.pretrained_cfg.get("tag"))))
    return Classifier(model, name, classes, backbone.data_config, backbone.transform, model_args)


def _config(classifier: Classifier, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` that timm writes, with classes, preprocessing, arguments and facts."""
    from timm.models._hub import save_config_for_hf

    extra = {"label_names": list(classifier.classes), FACTS: dict(facts)}
    with tempfile.TemporaryDirectory() as folder:  # timm can only write it to a file
        save_config_for_hf(classifier.model, f"{folder}/{CONFIG}", extra, classifier.model_args)
        config: dict[str, Any] = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    config["pretrained_cfg"] |= classifier.data_config
    return config


def _read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a timm folder (``ModelError`` if there is none)."""
    import timm

    file = folder / CONFIG
    if not file.is_file():
        reason = f"it has no {CONFIG}" if folder.is_dir() else "no such folder"
        raise ModelError(f"no timm classifier at {folder}: {reason}")
    try:
        config = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"the classifier at {folder} is damaged: {CONFIG}: {first_line(error)}") from None
    if not isinstance(config, dict) or not timm.is_model(str(config.get("architecture"))):
        raise ModelError(f"no timm classifier at {folder}: {CONFIG} names no architecture that timm knows")
    return config


def _class_names(config: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """Class names in the order of the logits (``ModelError`` if they do not match the number of classes)."""
    inner = config.get("pretrained_cfg")
    if not isinstance(inner, dict):  # older versions of timm have one level only
        inner = config
    count = config.get("num_classes", inner.get("num_classes"))
    if not isinstance(count, int) or count < 1:
        raise ModelError(f"no timm classifier at {folder}: {CONFIG} says {count} classes")
    names = config.get("label_names") or inner.get("label_names") or [str(i) for i in range(count)]
    if isinstance(names, dict):  # number -> name
        names = [names.get(str(i), str(i)) for i in range(count)]
    if not isinstance(names, list) or len(names) != count:
        raise ModelError(f"the classifier at {folder} is damaged: {CONFIG} has {count} classes and other label_names")
    return tuple(str(name) for name in names)


def _build_args(config: dict[str, Any]) -> dict[str, Any]:
    return _without_classes(config.get("model_args") or {})


def _without_classes(model_args: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model_args.items() if key != "num_classes"}


def _is_ours(folder: Path) -> bool:
    try:
        config = parse_json((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and FACTS in config and "architecture" in config
