"""The methods to beat, on the same features of the same images: kNN, Mahalanobis, PCA residual. None is trained."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .exceptions import UsageError
from .features import PRE_LOGITS, FeatureExtractor, block_normalise
from .gaussian import Mahalanobis, PrincipalResidual, moments
from .neighbors import Index, make_index
from .store import FeatureTable


class Rivals:
    """Classic detectors, fitted on in-domain features; each score is higher = more OOD.

    ``rival_knn`` : distance to the ``k``-th neighbour of the last stage, L2-normalised (Sun et al., ICML 2022).
    ``rival_mahalanobis`` : Mahalanobis distance of the last stage, L2-normalised (Mahalanobis++, Mueller & Hein, ICML
    2025, without labels). ``rival_mahalanobis_all`` : of all stages, block-normalised and joined; and
    ``rival_mahalanobis_<stage>`` of each alone. ``rival_pca`` : distance of the last stage to the principal subspace
    that holds 90 % of the in-domain variance.

    Parameters
    ----------
    extractor : FeatureExtractor
        Whose rows are scored.
    k : int
        Which neighbour; 5 as in the papers on pretrained networks.
    """

    def __init__(self, extractor: FeatureExtractor, k: int = 5) -> None:
        self.k = k
        self._stages = [name for name in extractor.layers if name != PRE_LOGITS]
        self._columns = extractor.columns

    def fit(self, table: FeatureTable) -> Rivals:
        """Fit all in one pass over in-domain features, which stay on disk.

        Raises
        ------
        UsageError
            Too few images for ``k``.
        """
        if len(table) < max(2, self.k):
            raise UsageError(f"the rivals need at least {max(2, self.k)} in-domain images, and there are {len(table)}")
        last = torch.cat([self._last(rows) for rows in table.chunks()])
        self._index: Index = make_index(last)
        width = sum(self._width(name) for name in self._stages)
        joined = moments((self._joined(rows) for rows in table.chunks()), width)
        self._all = Mahalanobis(width).fit(joined)
        found = moments(last.split(1024), last.shape[1])
        self._of_last, self._pca = Mahalanobis(last.shape[1]).fit(found), PrincipalResidual(last.shape[1]).fit(found)
        self._alone = {}
        for name in self._stages:
            chunks = (self._normalised(rows, name) for rows in table.chunks())
            self._alone[name] = Mahalanobis(self._width(name)).fit(moments(chunks, self._width(name)))
        return self

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> dict[str, np.ndarray]:
        """Rows of the extractor (B, D) -> {name: (B,)}."""
        last = self._last(features)
        scores = {
            "rival_knn": self._index.search(last, self.k)[0][:, -1],
            "rival_mahalanobis": self._of_last(last),
            "rival_mahalanobis_all": self._all(self._joined(features)),
            "rival_pca": self._pca(last),
        }
        for name, gaussian in self._alone.items():
            scores[f"rival_mahalanobis_{name}"] = gaussian(self._normalised(features, name))
        return {name: values.double().numpy() for name, values in scores.items()}

    def _width(self, name: str) -> int:
        return int(self._columns[name].stop - self._columns[name].start)

    def _last(self, features: Tensor) -> Tensor:
        return F.normalize(features[:, self._columns[self._stages[-1]]], dim=1)

    def _normalised(self, features: Tensor, name: str) -> Tensor:
        return block_normalise(features[:, self._columns[name]], [self._width(name)])

    def _joined(self, features: Tensor) -> Tensor:
        return torch.cat([self._normalised(features, name) for name in self._stages], 1)
