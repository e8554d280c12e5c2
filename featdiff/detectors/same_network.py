"""Whether a classifier holds the network that a detector was fitted on: compared by weights, and by what they give."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..exceptions import ModelError
from ..features.extractor import FeatureExtractor


def check_same_weights(network: nn.Module, classifier: nn.Module) -> None:
    """Refuse a classifier without the network's weights under the same names (``ModelError``)."""
    theirs = classifier.state_dict()
    for name, value in network.state_dict().items():
        if name not in theirs or not _same(value, theirs[name]):
            what = "has other weights" if name in theirs else "has no such weights"
            raise ModelError(f"the classifier is not the network this detector was fitted on: {name} {what}")


def check_same_features(ours: FeatureExtractor, theirs: FeatureExtractor) -> None:
    """Refuse an extractor with other layers, or one that gives other features of some picture (``ModelError``)."""
    if theirs.layout != ours.layout or not _alike(ours, theirs):
        raise ModelError("the classifier gives other layers than this detector was fitted on: call fit on it")


def _alike(a: FeatureExtractor, b: FeatureExtractor) -> bool:
    """Whether two extractors give the same features of some picture, but for rounding."""
    pixels = a.probe()
    rows = a(pixels).cpu()
    others = b(pixels).cpu()
    limit = 1e-3 if a.precision == b.precision else 5e-2
    return bool((rows - others).abs().max() <= limit * rows.abs().max())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
