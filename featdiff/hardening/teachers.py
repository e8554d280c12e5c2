"""Teachers: larger or longer-trained classifiers whose answers a student learns to give.

In: the name of a backbone, or the folder of a classifier. Out: a network that turns images into pre-logits, which can
be cached, and these into logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.decoding import Transform
from ..exceptions import UsageError, WeightsError, some_of
from ..features.backbones import Backbone, load_backbone
from ..features.networks import device_of, evaluating, fingerprint
from .frozen import FrozenLayers, split_at
from .students import Classifier, check_head, classifier_folder, load_classifier, training_facts

# Raised when the same weights give other numbers.
_VERSION = 1
# Inverse strengths of a new head's regularisation; held-out images decide between them.
_INVERSE_STRENGTHS = (0.001, 0.01, 0.1)
#: Images that a new head is trained on, at most.
MAX_HEAD_IMAGES = 20_000


@dataclass
class Teacher:
    """A network that turns images into pre-logits, and its last layer.

    It is an :class:`featdiff.features.extraction.Extractor`, so pre-logits can be cached.

    Parameters
    ----------
    network : Backbone or Classifier
    name : str
        For people.
    width : int
        Of the pre-logits.
    head : nn.Module, optional
        Turns pre-logits (B, ``width``) into logits in the order of the student's classes. A backbone has none until
        :meth:`fit_head`.
    frozen : FrozenLayers, optional
        The layers that stayed frozen when featdiff trained this teacher. The cache may have their output.
    trained : nn.Module, optional
        The layers behind ``frozen``.
    classes : tuple of str, default ()
        Those of a teacher that came with a last layer.
    """

    network: Backbone | Classifier
    name: str
    width: int
    head: nn.Module | None = None
    frozen: FrozenLayers | None = None
    trained: nn.Module | None = None
    classes: tuple[str, ...] = ()

    @property
    def transform(self) -> Transform:
        """RGB image -> (3, H, W) tensor, as the teacher was trained with."""
        return self.network.transform

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return device_of(self.network.model)

    def key(self, variant: str = "") -> str:
        """A short hash of everything that decides the pre-logits."""
        facts = [_VERSION, fingerprint(self.network.model), repr(self.network.model)]
        return hashlib.sha256(repr([*facts, self.network.data_config, variant]).encode()).hexdigest()[:16]

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Preprocessed images (B, 3, H, W) -> pre-logits (B, ``width``), float32."""
        return _pre_logits(self.network.model, pixels)

    @torch.inference_mode()
    def from_frozen(self, features: Tensor) -> Tensor:
        """Output of ``frozen`` (B, D) -> pre-logits (B, ``width``), float32, up to the rounding to half precision."""
        assert self.frozen is not None and self.trained is not None
        return _pre_logits(self.trained, self.frozen.maps(features.to(device_of(self.trained))))

    def logits(self, pre_logits: Tensor) -> Tensor:
        """Pre-logits (B, ``width``) -> logits (B, classes)."""
        assert self.head is not None
        return self.head(pre_logits)

    def accuracy(self, pre_logits: Tensor, labels: np.ndarray) -> float:
        """Share of correct answers.

        Parameters
        ----------
        pre_logits : Tensor of shape (N, ``width``)
        labels : ndarray of int, shape (N,)

        Returns
        -------
        float
            In [0, 1].
        """
        logits = self.logits(pre_logits.to(device_of(self.network.model)))
        return float((logits.argmax(1).cpu().numpy() == labels).mean())

    def fit_head(self, pre_logits: Tensor, labels: np.ndarray, held_out: Tensor, held_out_labels: np.ndarray) -> None:
        """Fit a last layer by logistic regression, with the regularisation that suits held-out images best.

        Parameters
        ----------
        pre_logits : Tensor of shape (N, ``width``)
        labels : ndarray of int, shape (N,)
        held_out : Tensor of shape (M, ``width``)
        held_out_labels : ndarray of int, shape (M,)
        """
        from sklearn.linear_model import LogisticRegression

        mean = pre_logits.mean(0)
        std = pre_logits.std(0).clamp_min(1e-6)
        train = ((pre_logits - mean) / std).numpy()
        test = ((held_out - mean) / std).numpy()
        fits = [LogisticRegression(C=c, max_iter=200).fit(train, labels) for c in _INVERSE_STRENGTHS]
        best = max(fits, key=lambda fit: fit.score(test, held_out_labels))

        weight = torch.from_numpy(np.asarray(best.coef_, dtype=np.float32))
        bias = torch.from_numpy(np.asarray(best.intercept_, dtype=np.float32))
        if len(weight) == 1:  # for two classes, scikit-learn stores the difference
            weight = torch.cat([-weight, weight]) / 2
            bias = torch.cat([-bias, bias]) / 2
        head = nn.Linear(self.width, len(weight))
        with torch.no_grad():  # takes pre-logits that are not standardised
            head.weight.copy_(weight / std)
            head.bias.copy_(bias - (weight / std) @ mean)
        self.head = head.requires_grad_(False).to(device_of(self.network.model))


def load_teacher(name: str, classes: Sequence[str], device: torch.device | str = "cpu") -> Teacher:
    """Load a teacher.

    Parameters
    ----------
    name : str
        The folder of a classifier for the same classes, or the name of a timm backbone.
    classes : sequence of str
        In the order of the student's logits.
    device : torch.device or str, default "cpu"

    Returns
    -------
    Teacher

    Raises
    ------
    UsageError
        An unknown name, or a classifier of other classes.
    ModelError, WeightsError
        The folder holds no classifier, or the weights are not available.
    """
    folder = classifier_folder(name)
    if folder is None:
        return _backbone_teacher(name, device)

    classifier = load_classifier(folder)
    if sorted(classifier.classes) != sorted(classes):
        raise UsageError(
            f"the teacher at {folder} knows the classes {some_of(classifier.classes)}, the images have "
            f"{some_of(classes)}: train a teacher on these images (harden without a teacher), or name a backbone",
            argument="teacher",
        )
    check_head(classifier)
    model: Any = classifier.model.to(device)
    order = torch.tensor([classifier.classes.index(name) for name in classes])
    head = nn.Sequential(model.get_classifier(), _Reordered(order)).to(device).eval()

    frozen = None
    trained = None
    if layer := training_facts(name).get("train_from"):
        frozen, trained = split_at(classifier, layer)
    model.requires_grad_(False)
    label = f"{Path(name).name} ({classifier.name})"
    width = _width(model, classifier.data_config)
    return Teacher(classifier, label, width, head, frozen, trained, classifier.classes)


def _backbone_teacher(name: str, device: torch.device | str) -> Teacher:
    try:
        backbone = load_backbone(name, view="crop")  # what its student sees
    except WeightsError as error:
        raise WeightsError(
            f"the teacher: {error}. (The argument weights is the student's: put the teacher's into a folder, as "
            "model.safetensors beside timm's config.json, and name it local-dir:FOLDER)"
        ) from None
    backbone.model.to(device)
    return Teacher(backbone, backbone.tag, _width(backbone.model, backbone.data_config))


class _Reordered(nn.Module):
    """Logits in another order of the classes."""

    order: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)

    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, self.order]


def _pre_logits(model: nn.Module, x: Tensor) -> Tensor:
    network: Any = model
    x = x.to(device_of(model))
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    with evaluating(model):
        return network.forward_head(network.forward_features(x), pre_logits=True).float()


@torch.inference_mode()
def _width(model: nn.Module, data_config: dict[str, Any]) -> int:
    return _pre_logits(model, torch.zeros(1, *data_config["input_size"])).shape[1]
