"""The losses of a student.

In: a batch of training images and everything the student's answers are compared with. Out: the weighted losses by name.
One forward pass of one module, so that it runs on one device or on several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .club import DEEP, Club
from .losses import FeatureDistillation, ProjectedTeacher, distillation, energy_margin
from .recipe import HardenRecipe


@dataclass(frozen=True)
class TrainingBatch:
    """Training images, and everything that the student's answers to them are compared with.

    Attributes
    ----------
    x : Tensor of shape (B, ...)
        Input of the trained part of the student.
    labels : Tensor of int, shape (B,)
    teacher_features : Tensor of shape (B, width), optional
        The teacher's pre-logits.
    teacher_logits : Tensor of shape (B, classes), optional
    outliers : tuple of Tensor of shape (B, width)
        Of each kind of outliers, a random choice.
    student_outliers : Tensor of shape (M, features), optional
        Outliers among the student's own pre-logits.
    """

    x: Tensor
    labels: Tensor
    teacher_features: Tensor | None = None
    teacher_logits: Tensor | None = None
    outliers: tuple[Tensor, ...] = ()
    student_outliers: Tensor | None = None


class Objective(nn.Module):
    """The trained part of a student, and the networks that its losses need.

    Parameters
    ----------
    network : nn.Module
        A timm classifier, or the layers behind its frozen part.
    features : int
        Width of its pre-logits.
    recipe : HardenRecipe
        Weights of the losses.
    teacher : int, default 0
        Width of the teacher's pre-logits; 0 without a teacher.
    outliers : tuple of int, default ()
        Width of each kind of outliers.

    Attributes
    ----------
    has_teacher : bool
    projection : nn.Module or None
        Compares pre-logits of student and teacher.
    clubs : nn.ModuleList
        The bound of mutual information for each kind of outliers.
    """

    def __init__(
        self, network: nn.Module, features: int, recipe: HardenRecipe, teacher: int = 0, outliers: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.has_teacher = bool(teacher)

        self.projection: nn.Module | None = None
        if teacher and recipe.feature_distillation:
            comparison = ProjectedTeacher if recipe.project_teacher else FeatureDistillation
            self.projection = comparison(teacher, features)

        self.clubs = nn.ModuleList()
        if recipe.micl:
            for i, width in enumerate(outliers):
                deep = i > 0 and recipe.bound_as_loss  # as published, for latents
                self.clubs.append(Club(width, features, DEEP) if deep else Club(width, features))

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Parameters
        ----------
        batch : TrainingBatch

        Returns
        -------
        dict of str to Tensor of shape ()
            Weighted losses; their sum is to be minimised.
        """
        recipe = self.recipe
        features, logits = self.answer(batch.x)
        losses = {"labels": F.cross_entropy(logits, batch.labels)}

        if batch.teacher_logits is not None and recipe.distillation:
            loss = distillation(logits, batch.teacher_logits, recipe.temperature)
            losses["distillation"] = recipe.distillation * loss
        if self.projection is not None and batch.teacher_features is not None:
            loss = self.projection(features, batch.teacher_features)
            losses["feature_distillation"] = recipe.feature_distillation * loss

        for i, (club, outliers) in enumerate(zip(self.clubs, batch.outliers, strict=True)):
            name = "micl" if i == 0 else f"micl_{i + 1}"
            losses |= self._information(club, outliers, features, name, 2**i)

        if batch.student_outliers is not None and recipe.energy:
            loss = energy_margin(logits, self._head()(batch.student_outliers), recipe.margin)
            losses["energy"] = recipe.energy * loss
        return losses

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the student.

        Parameters
        ----------
        x : Tensor of shape (B, ...)

        Returns
        -------
        pre_logits : Tensor of shape (B, features)
        logits : Tensor of shape (B, classes)
        """
        network: Any = self.network
        features = network.forward_head(network.forward_features(x), pre_logits=True)
        return features, self._head()(features)

    def _head(self) -> nn.Module:
        network: Any = self.network
        return network.get_classifier()

    def _information(
        self, club: nn.Module, outliers: Tensor, features: Tensor, name: str, weight: float
    ) -> dict[str, Tensor]:
        """The bound, which trains the student, and the likelihood, which trains the networks of the bound alone."""
        assert isinstance(club, Club)
        weight *= self.recipe.micl
        if self.recipe.bound_as_loss:
            return {name: weight * club(outliers, features)}

        fixed = {key: value.detach() for key, value in club.named_parameters()}
        bound = functional_call(club, fixed, (outliers, features))
        return {
            name: weight * bound,
            f"{name}_likelihood": -club.log_likelihood(outliers, features.detach()),
        }
