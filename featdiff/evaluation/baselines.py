"""The methods to beat, on the same features of the same images: kNN, Mahalanobis, PCA residual. None is trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..exceptions import UsageError
from ..features.extractor import FeatureExtractor
from ..features.layout import PRE_LOGITS, block_normalise
from ..features.store import FeatureTable
from ..scores.gaussian import Mahalanobis, Moments, PrincipalResidual, moments
from ..scores.neighbors import make_index

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rival:
    """A fitted method: rows of the extractor (B, D) -> (B,), higher = more OOD.

    ``view`` picks what it looks at; ``numbers`` is how many floats it keeps, ``seconds`` what fitting took.
    """

    view: View
    measure: View
    numbers: int
    seconds: float

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> Tensor:
        return self.measure(self.view(features))


class Rivals:
    """Classic detectors, fitted on in-domain features: ``methods`` by name.

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
        self.methods: dict[str, Rival] = {}
        self._stages = [name for name in extractor.layers if name != PRE_LOGITS]
        self._columns = extractor.columns

    def fit(self, table: FeatureTable) -> Rivals:
        """Fit all on in-domain features, which stay on disk: Gaussians in one pass each.

        Raises
        ------
        UsageError
            Too few images for ``k``.
        """
        if len(table) < max(2, self.k):
            raise UsageError(f"the rivals need at least {max(2, self.k)} in-domain images, and there are {len(table)}")

        def gaussian(view: View, kind: type[Mahalanobis] | type[PrincipalResidual] = Mahalanobis) -> Rival:
            start = time.perf_counter()
            found = _moments(table, view)
            fitted = kind(len(found.mean)).fit(found)
            return Rival(view, fitted, sum(b.numel() for b in fitted.buffers()), time.perf_counter() - start)

        self.methods = {
            "rival_knn": self._neighbours(table),
            "rival_mahalanobis": gaussian(self._last),
            "rival_mahalanobis_all": gaussian(self._joined(self._stages)),
            "rival_pca": gaussian(self._last, PrincipalResidual),
        }
        for name in self._stages:
            self.methods[f"rival_mahalanobis_{name}"] = gaussian(self._joined([name]))
        return self

    def __call__(self, features: Tensor) -> dict[str, np.ndarray]:
        """Rows of the extractor (B, D) -> {name: (B,)}."""
        return {name: method(features).double().numpy() for name, method in self.methods.items()}

    def _neighbours(self, table: FeatureTable) -> Rival:
        start = time.perf_counter()
        index = make_index(torch.cat([self._last(rows) for rows in table.chunks()]))

        def kth(x: Tensor) -> Tensor:
            return index.search(x, self.k)[0][:, -1]

        return Rival(self._last, kth, index.bank.numel(), time.perf_counter() - start)

    def _last(self, features: Tensor) -> Tensor:
        return F.normalize(features[:, self._columns[self._stages[-1]]], dim=1)

    def _joined(self, stages: list[str]) -> View:
        columns = [self._columns[name] for name in stages]
        widths = [part.stop - part.start for part in columns]
        return lambda features: block_normalise(torch.cat([features[:, part] for part in columns], 1), widths)


def _moments(table: FeatureTable, view: View) -> Moments:
    return moments((view(rows) for rows in table.chunks()), view(table[np.zeros(1, dtype=int)]).shape[1])
