"""A teacher: a larger or longer-trained classifier whose answers the student keeps."""

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
from .frozen import Trunk, split_at
from .students import Classifier, check_head, classifier_folder, load_classifier, training_facts

# Raised when the numbers that a teacher gives for the same weights change.
_TEACHER_VERSION = 1
# Inverse strengths of a new head's regularisation, of which held-out images choose.
_STRENGTHS = (0.001, 0.01, 0.1)
#: Rows that a new head learns from, at most.
HEAD_ROWS = 20_000


@dataclass
class Teacher:
    """Images -> pre-logits, as rows that can be kept; and its last layer.

    ``head`` turns pre-logits (B, ``width``) into logits in the order of the student's classes; a teacher by the name of
    a backbone has none until :meth:`fit_head`. ``trunk`` are the layers that stayed frozen while featdiff trained it,
    if any, ``tail`` what lies behind: the cache may still have what the trunk gave. ``classes`` are those of a teacher
    that has its own last layer.
    """

    network: Backbone | Classifier
    name: str
    width: int
    head: nn.Module | None = None
    trunk: Trunk | None = None
    tail: nn.Module | None = None
    classes: tuple[str, ...] = ()

    @property
    def transform(self) -> Transform:
        """RGB picture -> (3, H, W) tensor, as the teacher was trained with."""
        return self.network.transform

    def key(self, variant: str = "") -> str:
        """A short hash of what decides the numbers."""
        facts = [_TEACHER_VERSION, fingerprint(self.network.model), repr(self.network.model)]
        return hashlib.sha256(repr([*facts, self.network.data_config, variant]).encode()).hexdigest()[:16]

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) preprocessed images -> (B, ``width``) float32 pre-logits."""
        return _pre_logits(self.network.model, pixels)

    @torch.inference_mode()
    def behind(self, rows: Tensor) -> Tensor:
        """Rows (B, D) of the trunk -> (B, ``width``) float32 pre-logits, up to the rounding of what was kept."""
        assert self.trunk is not None and self.tail is not None
        return _pre_logits(self.tail, self.trunk.maps(rows.to(device_of(self.tail))))

    def logits(self, features: Tensor) -> Tensor:
        """Pre-logits (B, ``width``) -> logits (B, classes)."""
        assert self.head is not None
        return self.head(features)

    def accuracy(self, features: Tensor, labels: np.ndarray) -> float:
        """Share of pre-logits (N, ``width``) whose largest logit is that of their label."""
        predicted = self.logits(features.to(device_of(self.network.model))).argmax(1).cpu().numpy()
        return float((predicted == labels).mean())

    def fit_head(self, features: Tensor, labels: np.ndarray, held_out: Tensor, wanted: np.ndarray) -> None:
        """Logistic regression on pre-logits (N, ``width``), as strongly regularised as held-out rows like it best."""
        from sklearn.linear_model import LogisticRegression

        mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
        rows, others = (((part - mean) / deviation).numpy() for part in (features, held_out))
        fits = [LogisticRegression(C=c, max_iter=200).fit(rows, labels) for c in _STRENGTHS]
        best = max(fits, key=lambda fit: fit.score(others, wanted))
        weight, bias = (torch.from_numpy(np.asarray(part, dtype=np.float32)) for part in (best.coef_, best.intercept_))
        if len(weight) == 1:  # of two classes, scikit-learn keeps the difference
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        head = nn.Linear(self.width, len(weight))
        with torch.no_grad():
            head.weight.copy_(weight / deviation)
            head.bias.copy_(bias - (weight / deviation) @ mean)
        self.head = head.requires_grad_(False).to(device_of(self.network.model))


def load_teacher(name: str, classes: Sequence[str], device: torch.device | str = "cpu") -> Teacher:
    """A teacher by the folder of a classifier for the same classes, or by the name of a timm backbone.

    Raises
    ------
    UsageError
        An unknown name, or a classifier of other classes.
    ModelError, WeightsError
        The folder holds no classifier, or the weights cannot be had.
    """
    if (folder := classifier_folder(name)) is None:
        try:
            backbone = load_backbone(name)
        except WeightsError as error:
            raise WeightsError(
                f"the teacher: {error}. (A teacher takes no --weights: put them into a folder, as model.safetensors "
                "beside timm's config.json, and name it local-dir:FOLDER)"
            ) from None
        backbone.model.to(device)
        return Teacher(backbone, backbone.tag, _width(backbone.model, backbone.data_config))
    found = load_classifier(folder)
    if sorted(found.classes) != sorted(classes):
        raise UsageError(
            f"the teacher at {folder} knows the classes {some_of(found.classes)}, the images have {some_of(classes)}: "
            "train a teacher on these images (featdiff harden without --teacher), or name a backbone"
        )
    check_head(found)
    order = torch.tensor([found.classes.index(name) for name in classes])
    found.model.to(device)
    model: Any = found.model
    head = nn.Sequential(model.get_classifier(), _Ordered(order)).to(device).eval()
    layer = training_facts(name).get("train_from")
    trunk, tail = split_at(found, layer) if layer else (None, None)
    found.model.requires_grad_(False)
    label, width = f"{Path(name).name} ({found.name})", _width(found.model, found.data_config)
    return Teacher(found, label, width, head, trunk, tail, found.classes)


class _Ordered(nn.Module):
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
