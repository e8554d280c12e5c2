"""Classic methods on the same features, to be compared with: kNN, Mahalanobis, PCA residual. None is trained."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..exceptions import UsageError
from ..features.layout import FeatureLayout, Part, block_normalise
from .gaussian import Mahalanobis, PrincipalResidual, moments
from .neighbors import Index, make_index
from .registry import Context, Features, Options, Score, register


@register("knn", baseline=True)
class KthNeighbor(Score):
    """Distance to the 5th nearest vector of the last stage, of length 1 each (Sun et al., ICML 2022), in [0, 2].

    The fifth, as in the papers on pretrained networks.
    """

    k = 5
    _index: Index

    @torch.no_grad()
    def fit(self, features: Features, context: Context | None = None) -> Self:
        """Keep in-domain features (N, D).

        Raises
        ------
        UsageError
            Fewer than five.
        """
        if len(features) < self.k:
            raise UsageError(
                f"the baseline knn needs at least {self.k} in-domain images, and there are {len(features)}"
            )
        self._index = make_index(torch.cat([self._view(chunk) for chunk in features.chunks()]))
        return self

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), higher = more OOD."""
        return self._index.search(self._view(features), self.k)[0][:, -1]

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors that it keeps."""
        return self._index.bank.nbytes

    def _view(self, features: Tensor) -> Tensor:
        return F.normalize(features[:, self.layout.last_stage.columns], dim=1)


class GaussianScore(Score):
    """A Gaussian of some stages, fitted in one pass over in-domain features.

    Parameters
    ----------
    layout : FeatureLayout
    stages : sequence of Part
        Joined, each block-normalised; a single last stage may be brought to length 1 instead.
    measure : Mahalanobis or PrincipalResidual
    unit : bool
        Length 1 in place of block normalisation.
    """

    log_scale = True

    def __init__(
        self, layout: FeatureLayout, stages: list[Part], measure: Mahalanobis | PrincipalResidual, unit: bool
    ) -> None:
        super().__init__(layout)
        self.stages = stages
        self.measure = measure
        self.unit = unit
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def fit(self, features: Features, context: Context | None = None) -> Self:
        """Fit on in-domain features (N, D).

        Raises
        ------
        UsageError
            Fewer than two, or all the same.
        """
        if len(features) < 2:
            raise UsageError(f"a Gaussian needs at least 2 in-domain images, and there are {len(features)}")
        device = self.measure.mean.device
        chunks = (self._view(chunk.to(device)) for chunk in features.chunks())
        self.measure.fit(moments(chunks, len(self.measure.mean), device))
        return self

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Rows of features (B, D) -> (B,), >= 0, higher = more OOD."""
        distances: Tensor = self.measure(self._view(features.to(self.measure.mean.device)))
        return distances

    def _view(self, features: Tensor) -> Tensor:
        joined = self.layout.take(features, self.stages)
        if self.unit:
            return F.normalize(joined, dim=1)
        return block_normalise(joined, [part.width for part in self.stages])


@register("mahalanobis", head=True, baseline=True)
class LastStageMahalanobis(GaussianScore):
    """Mahalanobis distance of the last stage, brought to length 1.

    Mahalanobis++ (Mueller & Hein, ICML 2025), without labels.
    """

    def __init__(self, layout: FeatureLayout) -> None:
        last = layout.last_stage
        super().__init__(layout, [last], Mahalanobis(last.width), unit=True)


@register("mahalanobis_all", head=True, baseline=True)
class JoinedMahalanobis(GaussianScore):
    """Mahalanobis distance of all stages, block-normalised and joined."""

    def __init__(self, layout: FeatureLayout) -> None:
        width = sum(part.width for part in layout.stages)
        super().__init__(layout, layout.stages, Mahalanobis(width), unit=False)


@register("pca", head=True, baseline=True)
class LastStageResidual(GaussianScore):
    """Distance of the last stage to the principal subspace that holds 90 % of the in-domain variance."""

    def __init__(self, layout: FeatureLayout) -> None:
        last = layout.last_stage
        super().__init__(layout, [last], PrincipalResidual(last.width), unit=True)


@register("mahalanobis_stages", baseline=True)
def stage_mahalanobis(layout: FeatureLayout, options: Options) -> list[Score]:
    """Mahalanobis distance of each stage alone, block-normalised: ``mahalanobis_<stage>``."""
    scores: list[Score] = []
    for part in layout.stages:
        score = GaussianScore(layout, [part], Mahalanobis(part.width), unit=False)
        score.name = f"mahalanobis_{part.layer}"
        scores.append(score)
    return scores
