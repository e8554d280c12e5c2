"""The fitted middle of the pipeline: features -> noise -> denoise -> residual -> fuse, as one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..features.hooks import SPREAD
from ..features.layout import LOGITS, PRE_LOGITS
from .diffusion import DIFFUSION, DiffusionHeads, full_precision
from .fusion import Fusion
from .logits import LogitHeads
from .nearest import Banks

#: Scores that can be asked for.
HEADS = ("fused", *DIFFUSION)
_DIFFUSION_WEIGHT = 0.75


class FusedHeads(nn.Module):
    """Diffusion and neighbours in one score; its state dict is what a saved detector holds.

    ``diffusion`` reconstructs the stages, ``banks`` look up neighbours of deep features, ``logits`` asks a classifier's
    own logits, where that is wanted. Each of the heads ``layerwise``, ``knn_<space>`` ... and ``energy`` ... becomes a
    z-score (of a distance: of its logarithm) among held-out in-domain images (``mean`` and ``deviation`` (heads,)), and
    ``fusion`` joins them.

    Parameters
    ----------
    columns : mapping of names to slices
        Where the vectors lie: :attr:`featdiff.features.extractor.FeatureExtractor.columns`.
    neighbors : int
        Neighbours that count; 0 does without them.
    bank_rows : int
        Vectors in each bank.
    fusion, backend : str
        See :class:`featdiff.scores.fusion.Fusion` and :func:`featdiff.scores.neighbors.make_index`.
    logit_heads : some of :data:`featdiff.scores.logits.LOGIT_HEADS`
    diffusion : further arguments of :class:`DiffusionHeads`
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        columns: Mapping[str, slice],
        *,
        neighbors: int,
        bank_rows: int,
        fusion: str,
        backend: str,
        logit_heads: Sequence[str] = (),
        **diffusion: Any,
    ) -> None:
        super().__init__()
        layers = [name for name in columns if not name.endswith(SPREAD) and name != LOGITS]
        stages = [name for name in layers if name != PRE_LOGITS]
        self.diffusion = DiffusionHeads([columns[name].stop - columns[name].start for name in stages], **diffusion)
        self._stage_columns = [i for name in stages for i in range(columns[name].start, columns[name].stop)]
        self.banks = Banks(columns, bank_rows, neighbors, backend) if neighbors else None
        self.layers = [*stages, *(name for name in layers if self.banks and name == PRE_LOGITS)]
        self.logits = LogitHeads(logit_heads, columns) if logit_heads else None
        self.names = ["layerwise", *(self.banks.names if self.banks else []), *logit_heads]
        weights = [_DIFFUSION_WEIGHT, *(1.0 for _ in self.names[1:])]
        self.fusion = Fusion(len(self.names), fusion, weights)
        self.register_buffer("mean", torch.zeros(len(self.names)))
        self.register_buffer("deviation", torch.ones(len(self.names)))
        self.requires_grad_(False).eval()

    def stages(self, features: Tensor) -> Tensor:
        """Rows of an extractor (B, D) -> what the denoiser works on: block-normalised stages (B, sum of widths)."""
        return self.diffusion.normalised(self.pooled(features))

    def pooled(self, features: Tensor) -> Tensor:
        """Rows of an extractor (B, D) -> the stages as they are: what ``diffusion`` takes."""
        return features[:, self._stage_columns]

    def fill_banks(self, features: Tensor) -> None:
        """Give the banks their in-domain features (bank_rows, D); nothing to do without neighbours."""
        if self.banks is not None:
            self.banks.fit(features)

    @torch.inference_mode()
    def fit_statistics(self, features: Tensor) -> None:
        """Set all means and deviations from held-out in-domain features (N, D)."""
        with full_precision(self.mean):
            self.diffusion.fit_statistics(self.pooled(features))
            raw = torch.cat([self._raw(rows, ("layerwise",))[0] for rows in features.split(1024)])
            self.mean.copy_(raw.mean(0))
            self.deviation.copy_(raw.std(0, correction=0).clamp_min(0.05))
            self.fusion.fit(self._z(raw))

    @torch.inference_mode()
    def forward(self, features: Tensor, names: Sequence[str] = HEADS) -> tuple[dict[str, Tensor], Tensor]:
        """Rows of an extractor (B, D) -> ({name: (B,)}, layer scores (B, L)); higher = more OOD.

        ``fused`` joins the heads; asked for, it brings each ``knn_<space>`` along: the geometric mean of distances, and
        the heads that look at logits.
        The score of layer ``pre_logits`` is its neighbours', in standard deviations of its logarithm.
        """
        with full_precision(self.mean):
            raw, out, layers = self._raw(features, (*names, "layerwise"))
            z = self._z(raw)
            if "layerwise" not in names:
                del out["layerwise"]
            if "fused" in names:
                out = {"fused": self.fusion(z)} | out
                apart = {name: raw[:, i] for i, name in enumerate(self.names) if i}
                out |= {name: score.exp() if name.startswith("knn_") else score for name, score in apart.items()}
            if PRE_LOGITS in self.layers:
                layers = torch.cat([layers, z[:, [self.names.index(f"knn_{PRE_LOGITS}")]]], dim=1)
        return out, layers

    def _raw(self, features: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """What is standardised, (B, heads): the diffusion score, logarithms of distances, and scores of logits."""
        out, layers = self.diffusion(self.pooled(features), names)
        raw = out["layerwise"][:, None]
        if self.banks is not None:
            raw = torch.cat([raw, self.banks(features).log()], dim=1)
        if self.logits is not None:
            raw = torch.cat([raw, self.logits(features.to(raw.device))], dim=1)
        return raw, out, layers

    def _z(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.deviation
