"""What a classifier's own logits say about being out-of-distribution, for fusion with the other heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..exceptions import UsageError
from ..features.layout import LOGITS, PRE_LOGITS

#: energy: Liu et al., NeurIPS 2020; msp: Hendrycks & Gimpel, ICLR 2017; vim: Wang et al., CVPR 2022.
LOGIT_HEADS = ("energy", "msp", "vim")


class LogitHeads(nn.Module):
    """Scores from logits (and, for ViM, pre-logits), higher = more OOD.

    ``energy``: -logsumexp of the logits. ``msp``: the logarithm of 1 - the largest probability. ``vim``: the norm of
    what of the pre-logits lies outside the principal subspace of in-domain ones, brought to the scale of logits, minus
    their logsumexp. ``origin`` (d,), ``basis`` (d, d), of which the principal directions are zero, and ``scale`` () are
    ViM's.

    Parameters
    ----------
    names : some of ``LOGIT_HEADS``
    columns : mapping of names to slices
        Where ``logits`` and ``pre_logits`` lie in a row of features.

    Raises
    ------
    UsageError
        ViM without ``pre_logits``, or MSP with a single logit.
    """

    origin: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, names: Sequence[str], columns: Mapping[str, slice]) -> None:
        super().__init__()
        self.names = tuple(names)
        self._columns = {name: columns[name] for name in (LOGITS, PRE_LOGITS) if name in columns}
        if "msp" in names and columns[LOGITS].stop - columns[LOGITS].start < 2:
            raise UsageError("msp compares probabilities of classes, and this classifier gives a single logit")
        if "vim" in names:
            if PRE_LOGITS not in columns:
                raise UsageError(f"vim looks at the layer {PRE_LOGITS}: name it among the layers")
            width = columns[PRE_LOGITS].stop - columns[PRE_LOGITS].start
            self.register_buffer("origin", torch.zeros(width))
            self.register_buffer("basis", torch.eye(width))
            self.register_buffer("scale", torch.ones(()))

    @torch.inference_mode()
    def fit_vim(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> LogitHeads:
        """Fit ViM on in-domain rows (N, D), for a classifier of these weights (classes, d) and biases (classes,)."""
        weight = weight.detach().flatten(1).double()
        if bias is not None:
            self.origin.copy_(-(torch.linalg.pinv(weight) @ bias.detach().double()))
        logits, pre_logits = (features.to(self.origin)[:, self._columns[name]] for name in (LOGITS, PRE_LOGITS))
        shifted = (pre_logits - self.origin).double()
        _, directions = torch.linalg.eigh(shifted.T @ shifted / len(shifted))  # ascending
        width = len(directions)
        principal = 1000 if width > 1500 else 512 if width >= 768 else width // 2  # as the paper has it
        directions[:, width - principal :] = 0
        self.basis.copy_(directions)
        residual = ((pre_logits - self.origin) @ self.basis).norm(dim=1)
        tiny = torch.finfo(residual.dtype).tiny
        self.scale.copy_(logits.amax(1).mean().clamp_min(tiny) / residual.mean().clamp_min(tiny))
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Rows (B, D) -> (B, heads), in the order of ``names``."""
        logits = features[:, self._columns[LOGITS]]
        energy = -logits.logsumexp(1)
        scores = {"energy": energy}
        if "msp" in self.names:
            # of all but the largest, so that nothing is lost where it is almost 1
            others = logits.topk(logits.shape[1], dim=1).values[:, 1:]
            scores["msp"] = others.logsumexp(1) + energy
        if "vim" in self.names:
            residual = ((features[:, self._columns[PRE_LOGITS]] - self.origin) @ self.basis).norm(dim=1)
            scores["vim"] = self.scale * residual + energy
        return torch.stack([scores[name] for name in self.names], dim=1)
