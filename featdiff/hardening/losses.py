"""What a student is trained with besides its labels; each loss is a mean over the batch, lower = better."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) of logits (B, classes) (Hinton et al., 1503.02531)."""
    log_q, log_p = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


class FeatureDistillation(nn.Module):
    """How far a linear map of the student's pre-logits is from the teacher's, from 0 to 1 (the student tells nothing).

    The mean squared error of the teacher's features, each standardised over the batch. It is the student that is
    mapped, as in FitNets (Romero et al., arXiv 1412.6550), so that it has to hold all that the teacher's features tell;
    the two may differ in width.
    """

    def __init__(self, teacher: int, student: int) -> None:
        super().__init__()
        self.standardise = nn.BatchNorm1d(teacher, affine=False)
        self.project = nn.Linear(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Pre-logits (B, student), (B, teacher) -> ()."""
        return F.mse_loss(self.project(student), self.standardise(teacher))


class ProjectedTeacher(nn.Module):
    """KL(softmax(projected teacher) || softmax(student)) of pre-logits, after outlier-aware learning (2406.16525).

    The projection (norm, linear, ReLU, norm) is trained along, and so it may drop what the student does not know.
    """

    def __init__(self, teacher: int, student: int) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.BatchNorm1d(teacher), nn.Linear(teacher, student), nn.ReLU(), nn.BatchNorm1d(student)
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Pre-logits (B, student), (B, teacher) -> ()."""
        return distillation(student, self.project(teacher))


def energy_margin(in_domain: Tensor, outliers: Tensor, margin: float) -> Tensor:
    """Logits of images (B, classes) and of outliers (M, classes) -> how far their energies are from ``margin`` apart.

    softplus(margin - (s_i - s_j)), mean over all pairs, s = logsumexp(logits): a pairwise form of the energy
    regularisers of Liu et al. (arXiv 2010.03759) and VOS (arXiv 2202.01197), which needs no absolute level.
    """
    gap = in_domain.logsumexp(1)[:, None] - outliers.logsumexp(1)[None]
    return F.softplus(margin - gap).mean()
