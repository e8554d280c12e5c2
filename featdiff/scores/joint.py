"""The global and the local score of an image -> one score, high where either is, higher where both are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .local import Local

#: Names of the two, as columns of results use them.
GLOBAL = "global"
LOCAL = "local"
NAMES = (GLOBAL, LOCAL)


class Joint(nn.Module):
    """The local score, and how it is joined with the global one.

    Both are standardised over the calibration images, and what each has above the usual is added (softplus): two signs
    that agree count for more than one, and a very ordinary part takes hardly anything away from a strange one. This is
    close to Fisher's sum of the logarithms of both p-values, on a scale that does not end where the calibration images
    do. The two are not independent, so the sum is calibrated on its own, with the same images.

    Parameters
    ----------
    local : Local

    Attributes
    ----------
    location, scale : Tensors of shape (3,)
        Of the global, the local and the joint score, over the calibration images.

    References
    ----------
    Fisher, "Statistical Methods for Research Workers", 4th edition, 1932, section 21.1.
    """

    location: Tensor
    scale: Tensor

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.local = local
        self.register_buffer("location", torch.zeros(3))
        self.register_buffer("scale", torch.ones(3))
        self.requires_grad_(False).eval()

    def fit(self, global_scores: np.ndarray, local_scores: np.ndarray) -> None:
        """Set the scales.

        Parameters
        ----------
        global_scores, local_scores : ndarrays of shape (n,)
            Of the calibration images, in one order.
        """
        both = torch.from_numpy(np.stack([global_scores, local_scores], axis=1)).float().to(self.scale.device)
        self._set(slice(0, 2), both)
        self._set(slice(2, 3), _added(self._both(both))[:, None])

    def _set(self, columns: slice, values: Tensor) -> None:
        deviation = values.std(0, correction=0)
        self.location[columns] = values.mean(0)
        self.scale[columns] = torch.where(deviation > 0, deviation, 1.0)

    def forward(self, global_score: Tensor, local_score: Tensor) -> tuple[Tensor, Tensor]:
        """Join the scores of B images.

        Parameters
        ----------
        global_score, local_score : Tensors of shape (B,)
            As the detector's heads and :class:`featdiff.scores.local.Local` give them.

        Returns
        -------
        ood_score : Tensor of shape (B,)
        parts : Tensor of shape (B, 2)
            The two, standardised. All higher = more OOD, about 0 +- 1 for in-domain images.
        """
        parts = self._both(torch.stack([global_score, local_score.to(global_score)], dim=1))
        return (_added(parts) - self.location[2]) / self.scale[2], parts

    def _both(self, scores: Tensor) -> Tensor:
        return (scores - self.location[:2]) / self.scale[:2]


def _added(parts: Tensor) -> Tensor:
    """Standardised parts (B, 2) -> (B,)."""
    return F.softplus(parts).sum(1)
