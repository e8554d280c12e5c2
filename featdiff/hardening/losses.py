"""Losses of a student besides the cross entropy of its labels.

In: answers of the student and what they are compared with. Out: means over the batch; lower is better.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) (Hinton et al., arXiv 1503.02531).

    Parameters
    ----------
    student, teacher : Tensor of shape (B, classes)
        Logits.
    temperature : float, default 1.0
        T.

    Returns
    -------
    Tensor of shape ()

    Examples
    --------
    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> distillation(logits, logits).item()
    0.0
    """
    log_q = (student / temperature).log_softmax(1)
    log_p = (teacher / temperature).log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


class FeatureDistillation(nn.Module):
    """Distance between a linear map of the student's pre-logits and the teacher's pre-logits.

    The mean squared error of the teacher's features, each standardised over the batch: 0 if the student's features
    determine them, 1 if they say nothing about them. The student is the one that is mapped, as in FitNets (Romero et
    al., arXiv 1412.6550), so it must hold everything that the teacher's features hold. Both may differ in width.

    Parameters
    ----------
    teacher, student : int
        Widths of their pre-logits.
    """

    def __init__(self, teacher: int, student: int) -> None:
        super().__init__()
        self.standardise = nn.BatchNorm1d(teacher, affine=False)
        self.project = nn.Linear(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Pre-logits (B, student), (B, teacher) -> ()."""
        return F.mse_loss(self.project(student), self.standardise(teacher))


class ProjectedTeacher(nn.Module):
    """KL(softmax(projected teacher) || softmax(student)) of pre-logits, as in outlier-aware learning (2406.16525).

    The projection (norm, linear, ReLU, norm) is trained together with the student, so it may drop what the student
    does not know.

    Parameters
    ----------
    teacher, student : int
        Widths of their pre-logits.
    """

    def __init__(self, teacher: int, student: int) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.BatchNorm1d(teacher),
            nn.Linear(teacher, student),
            nn.ReLU(),
            nn.BatchNorm1d(student),
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Pre-logits (B, student), (B, teacher) -> ()."""
        return distillation(student, self.project(teacher))


def energy_margin(in_domain: Tensor, outliers: Tensor, margin: float) -> Tensor:
    """How much the energies of images and outliers fall short of being ``margin`` apart.

    softplus(margin - (s_i - s_j)), averaged over all pairs, with s = logsumexp(logits): a pairwise form of the energy
    regularisers of Liu et al. (arXiv 2010.03759) and VOS (arXiv 2202.01197), which needs no absolute level.

    Parameters
    ----------
    in_domain : Tensor of shape (B, classes)
        Logits of images.
    outliers : Tensor of shape (M, classes)
        Logits of outliers.
    margin : float
        In nats.

    Returns
    -------
    Tensor of shape ()
    """
    gap = in_domain.logsumexp(1)[:, None] - outliers.logsumexp(1)[None]
    return F.softplus(margin - gap).mean()
