"""What a classifier's own logits say about being out-of-distribution."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from ..exceptions import UsageError
from ..features.layout import FeatureLayout, Part
from .registry import Context, Features, Score, register


class LogitScore(Score):
    """A score of rows that hold a classifier's logits.

    Raises
    ------
    UsageError
        The rows do not.
    """

    reads_logits = True

    def __init__(self, layout: FeatureLayout) -> None:
        super().__init__(layout)
        if layout.logits is None:
            raise UsageError(
                f"the score {type(self).__name__} needs logits: give a classifier (a module) as backbone, or use "
                "featdiff.Guard"
            )
        self._logits: Part = layout.logits

    def logits(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> logits (B, classes)."""
        return features[:, self._logits.columns]


@register("energy", head=True)
class Energy(LogitScore):
    """-logsumexp of the logits (Liu et al., NeurIPS 2020)."""

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), higher = more OOD."""
        return -self.logits(features).logsumexp(1)


@register("msp", head=True)
class MaximumSoftmax(LogitScore):
    """Logarithm of 1 - the largest class probability (Hendrycks & Gimpel, ICLR 2017), <= 0.

    Raises
    ------
    UsageError
        A single logit.
    """

    def __init__(self, layout: FeatureLayout) -> None:
        super().__init__(layout)
        if self._logits.width < 2:
            raise UsageError("msp compares probabilities of classes, and this classifier gives a single logit")

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), higher = more OOD."""
        logits = self.logits(features)
        # of all but the largest, so that nothing is lost where it is almost 1
        others = logits.topk(logits.shape[1], dim=1).values[:, 1:]
        return others.logsumexp(1) - logits.logsumexp(1)


@register("vim", head=True)
class VirtualLogit(LogitScore):
    """ViM (Wang et al., CVPR 2022): what of the pre-logits lies outside their principal subspace, beside the logits.

    The norm of that residual, brought to the scale of logits, minus the logsumexp of the logits.

    Attributes
    ----------
    origin : Tensor of shape (d,)
    basis : Tensor of shape (d, d)
        The principal directions are zero.
    scale : Tensor of shape ()

    Raises
    ------
    UsageError
        The rows hold no pre-logits.
    """

    origin: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, layout: FeatureLayout) -> None:
        super().__init__(layout)
        if layout.pre_logits is None:
            raise UsageError("vim looks at the layer pre_logits: name it among the layers")
        self._pre_logits: Part = layout.pre_logits
        self.register_buffer("origin", torch.zeros(self._pre_logits.width))
        self.register_buffer("basis", torch.eye(self._pre_logits.width))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, features: Features, context: Context | None = None) -> Self:
        """Fit on in-domain features (N, D), for the context's classifier."""
        if context is None or context.classifier is None:
            raise UsageError("vim needs the linear layer that gives the logits")
        weight = context.classifier.weight.detach().flatten(1).double()
        bias = context.classifier.bias
        if bias is not None:
            self.origin.copy_(-(torch.linalg.pinv(weight) @ bias.detach().double()))

        rows = features[:].to(self.origin)
        shifted = (rows[:, self._pre_logits.columns] - self.origin).double()
        _, directions = torch.linalg.eigh(shifted.T @ shifted / len(shifted))  # ascending
        width = len(directions)
        principal = 1000 if width > 1500 else 512 if width >= 768 else width // 2  # as in the paper
        directions[:, width - principal :] = 0
        self.basis.copy_(directions)

        residual = self._residual(rows)
        tiny = torch.finfo(residual.dtype).tiny
        largest = self.logits(rows).amax(1)
        self.scale.copy_(largest.mean().clamp_min(tiny) / residual.mean().clamp_min(tiny))
        return self

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), higher = more OOD."""
        return self.scale * self._residual(features) - self.logits(features).logsumexp(1)

    def _residual(self, features: Tensor) -> Tensor:
        return ((features[:, self._pre_logits.columns] - self.origin) @ self.basis).norm(dim=1)
