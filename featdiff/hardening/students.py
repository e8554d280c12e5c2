"""A classifier to be trained: a timm network with a head for its classes, and the folder it is kept in.

The folder has timm's own layout (``config.json``, ``model.safetensors``): timm and featdiff load it without this room.
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
from ..exceptions import ModelError, UsageError, first_line
from ..features.backbones import Backbone, load_backbone
from ..features.networks import evaluating
from ..files.model_folder import CONFIG, TENSORS, check_pair, check_target, write_pair
from ..runtime.randomness import seeded
from .layout import STUDENT, is_hardened

#: The key of ``config.json`` under which the facts of the training stand.
FACTS = "featdiff"
_LOCAL = "local-dir:"


@dataclass(frozen=True)
class Classifier:
    """A timm network in eval mode, all of it trainable, and what is needed to use it the same way again.

    ``model`` turns (B, 3, H, W) into logits (B, len(classes)), ``name`` is architecture and tag, ``data_config`` the
    resolved preprocessing, ``transform`` the same as a function from an RGB picture to a (3, H, W) tensor,
    ``model_args`` the keywords of ``timm.create_model`` beside the number of classes.
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
    """A timm backbone with its weights, and a new head for ``classes``.

    Parameters
    ----------
    name, weights, pretrained, model_args
        As for :func:`featdiff.features.backbones.load_backbone`, which loads the weights.
    classes : sequence of str
        Names in the order of the logits, at least two.
    seed : int
        Of the head's first weights. The caller's random state is left alone.

    Raises
    ------
    UsageError
        The name, the classes or an argument make no sense, or the network takes no other classifier.
    WeightsError
        The weights cannot be had or do not fit.
    """
    import timm

    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise UsageError(f"a classifier needs two classes or more, each named once, not {', '.join(classes) or 'none'}")
    given = {key: value for key, value in (model_args or {}).items() if key != "num_classes"}
    backbone = load_backbone(name, weights, pretrained, given)
    model: Any = backbone.model
    with seeded(seed):
        if hasattr(model, "reset_classifier"):
            model.reset_classifier(len(classes))
    with torch.device("meta"):
        wanted = timm.create_model(name, pretrained=False, num_classes=len(classes), **given)
    if repr(model) != repr(wanted):  # a saved one could not be built again
        raise UsageError(f"{backbone.tag} cannot be given a classifier of its own; choose another network")
    if name.startswith(_LOCAL):
        given = _own_args(_read_config(Path(name.partition(":")[2]))) | given
    return _classifier(backbone, tuple(classes), given)


def load_classifier(folder: str | os.PathLike[str]) -> Classifier:
    """A timm classifier in a folder: one of :func:`save_classifier`, or of your own; read strictly.

    Classes without names in the folder are called ``0``, ``1`` and so on.

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
    try:
        backbone = load_backbone(f"local-dir:{folder}", model_args={"num_classes": len(classes)})
    except UsageError as error:  # what the user asked for made sense; what the folder says does not
        raise ModelError(f"the classifier at {folder} is damaged: {error}") from None
    if (folder / TENSORS).is_file():
        check_pair(folder, config)
    return _classifier(backbone, classes, _own_args(config))


def classifier_folder(name: str) -> Path | None:
    """The folder of the classifier that ``name`` means, in what was hardened that of the student; else None.

    Raises
    ------
    UsageError
        A path at which there is no folder, or a folder that is called like a backbone.
    """
    import timm

    folder = Path(name)
    if folder.is_dir():
        if not _is_path(name) and timm.is_model(name.partition(".")[0]):
            raise UsageError(f"{name} is a backbone of timm's, and a folder here: write ./{name}, or rename the folder")
        return folder / STUDENT if is_hardened(folder) else folder
    if _is_path(name) and ":" not in name:  # no name of a backbone
        raise UsageError(f"there is no folder {name}")
    return None


def _is_path(name: str) -> bool:
    return "/" in name or os.sep in name


def training_facts(name: str) -> dict[str, Any]:
    """What featdiff wrote of the training of a classifier in a folder (or ``local-dir:FOLDER``); nothing for others."""
    folder = Path(name[len(_LOCAL) :]) if name.startswith(_LOCAL) else classifier_folder(name)
    facts = _read_config(folder).get(FACTS) if folder else None
    return facts if isinstance(facts, dict) else {}


@torch.inference_mode()
def check_head(classifier: Classifier) -> None:
    """Refuse a network whose logits do not come from pre-logits by one linear layer alone (``UsageError``)."""
    model: Any = classifier.model
    if not isinstance(head := model.get_classifier(), nn.Linear):
        raise UsageError(f"{classifier.name} ends in {type(head).__name__}, not in one linear layer: take another one")
    probe = torch.randn(1, *classifier.data_config["input_size"], generator=torch.Generator().manual_seed(0))
    probe = probe.to(head.weight.device)
    with evaluating(model):
        logits, alone = model(probe), head(model.forward_head(model.forward_features(probe), pre_logits=True))
    if logits.shape != alone.shape or not torch.allclose(logits, alone, rtol=1e-3, atol=1e-4):
        raise UsageError(f"the logits of {classifier.name} do not come from its last layer alone: take another one")


def save_classifier(classifier: Classifier, folder: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
    """Write a folder that timm loads by ``timm.create_model("local-dir:FOLDER", pretrained=True)``, to the same logits.

    An earlier classifier of featdiff's in the folder is replaced, other files in it stay. ``facts``, of which JSON must
    be possible, are kept in ``config.json`` under ``featdiff``.

    Raises
    ------
    UsageError
        The folder holds something else.
    ModelError
        The disk is full or the place cannot be written; an older classifier stays whole.
    """
    check_classifier_target(folder)
    write_pair(folder, _config(classifier, facts), classifier.model.state_dict())


def check_classifier_target(folder: str | os.PathLike[str]) -> None:
    """Refuse to write into anything but an earlier classifier of featdiff's or an empty folder (``UsageError``)."""
    check_target(folder, _is_ours, "classifier that featdiff wrote")


def _classifier(backbone: Backbone, classes: tuple[str, ...], model_args: dict[str, Any]) -> Classifier:
    model: Any = backbone.model.eval().requires_grad_(True)
    name = ".".join(filter(None, (model.pretrained_cfg["architecture"], model.pretrained_cfg.get("tag"))))
    return Classifier(model, name, classes, backbone.data_config, backbone.transform, model_args)


def _config(classifier: Classifier, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What timm writes for this network, with classes, preprocessing, arguments and ``facts``."""
    from timm.models._hub import save_config_for_hf

    extra = {"label_names": list(classifier.classes), FACTS: dict(facts)}
    with tempfile.TemporaryDirectory() as folder:  # timm gives it as a file only
        save_config_for_hf(classifier.model, f"{folder}/{CONFIG}", extra, classifier.model_args)
        config: dict[str, Any] = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    config["pretrained_cfg"] |= classifier.data_config
    return config


def _read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a timm folder (``ModelError`` if there is none)."""
    import timm

    file = folder / CONFIG
    if not file.is_file():
        what = f"it has no {CONFIG}" if folder.is_dir() else "no such folder"
        raise ModelError(f"no timm classifier at {folder}: {what}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the classifier at {folder} is damaged: {CONFIG}: {first_line(error)}") from None
    if not isinstance(config, dict) or not timm.is_model(str(config.get("architecture"))):
        raise ModelError(f"no timm classifier at {folder}: {CONFIG} names no architecture that timm knows")
    return config


def _class_names(config: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """Names in the order of the logits (``ModelError`` if the folder says how many classes, but not so many names)."""
    inner = config.get("pretrained_cfg")
    inner = inner if isinstance(inner, dict) else config  # as timm once wrote it
    count = config.get("num_classes", inner.get("num_classes"))
    if not isinstance(count, int) or count < 1:
        raise ModelError(f"no timm classifier at {folder}: {CONFIG} says {count} classes")
    names = config.get("label_names") or inner.get("label_names") or [str(i) for i in range(count)]
    if isinstance(names, dict):  # number -> name
        names = [names.get(str(i), str(i)) for i in range(count)]
    if not isinstance(names, list) or len(names) != count:
        raise ModelError(f"the classifier at {folder} is damaged: {CONFIG} has {count} classes and other label_names")
    return tuple(str(name) for name in names)


def _own_args(config: dict[str, Any]) -> dict[str, Any]:
    args = config.get("model_args") or {}
    return {key: value for key, value in args.items() if key != "num_classes"}


def _is_ours(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and FACTS in config and "architecture" in config
