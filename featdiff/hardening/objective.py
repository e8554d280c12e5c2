"""A student and what it is trained for: one forward pass -> its losses, so that it runs on one device or several."""

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
class Lesson:
    """Training rows, and all that the student's answer to them is compared with.

    x : (B, ...) what the trained part of the student takes. labels : (B,). teacher_features, teacher_logits : (B,
    width) and (B, classes), if there is a teacher. outliers : for each kind, (B, width) drawn at random. beside : (M,
    features) outliers among the student's own pre-logits.
    """

    x: Tensor
    labels: Tensor
    teacher_features: Tensor | None = None
    teacher_logits: Tensor | None = None
    outliers: tuple[Tensor, ...] = ()
    beside: Tensor | None = None


class Objective(nn.Module):
    """The trained part of a student, and the networks that its losses need.

    Parameters
    ----------
    network : module
        A timm classifier, or the part of one behind frozen layers.
    features : int
        Width of its pre-logits.
    recipe : HardenRecipe
    teacher : int
        Width of the teacher's pre-logits; 0 without a teacher.
    outliers : for each kind of outliers, its width
    """

    def __init__(
        self, network: nn.Module, features: int, recipe: HardenRecipe, teacher: int = 0, outliers: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.network, self.recipe, self.taught = network, recipe, bool(teacher)
        compared = ProjectedTeacher if recipe.project_teacher else FeatureDistillation
        self.projection = compared(teacher, features) if teacher and recipe.feature_distillation else None
        kinds = enumerate(outliers if recipe.micl else ())
        self.clubs = nn.ModuleList(
            Club(width, features, DEEP) if i and recipe.bound_as_loss else Club(width, features) for i, width in kinds
        )

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """The losses by name, weighted; their sum is to be minimised."""
        recipe = self.recipe
        features, logits = self.answer(lesson.x)
        losses = {"labels": F.cross_entropy(logits, lesson.labels)}
        if lesson.teacher_logits is not None and recipe.distillation:
            kept = distillation(logits, lesson.teacher_logits, recipe.temperature)
            losses["distillation"] = recipe.distillation * kept
        if self.projection is not None and lesson.teacher_features is not None:
            kept = self.projection(features, lesson.teacher_features)
            losses["feature_distillation"] = recipe.feature_distillation * kept
        for i, (club, outliers) in enumerate(zip(self.clubs, lesson.outliers, strict=True)):
            losses |= self._information(club, outliers, features, "micl" if i == 0 else f"micl_{i + 1}", 2**i)
        if lesson.beside is not None and recipe.energy:
            apart = energy_margin(logits, self._head()(lesson.beside), recipe.margin)
            losses["energy"] = recipe.energy * apart
        return losses

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-logits (B, features) and logits (B, classes)."""
        network: Any = self.network
        features = network.forward_head(network.forward_features(x), pre_logits=True)
        return features, self._head()(features)

    def _head(self) -> nn.Module:
        network: Any = self.network
        return network.get_classifier()

    def _information(
        self, club: nn.Module, outliers: Tensor, features: Tensor, name: str, weight: float
    ) -> dict[str, Tensor]:
        """The bound, for the student; and what trains the bound's own networks, which tells the student nothing."""
        assert isinstance(club, Club)
        weight *= self.recipe.micl
        if self.recipe.bound_as_loss:
            return {name: weight * club(outliers, features)}
        fixed = {key: value.detach() for key, value in club.named_parameters()}
        bound = functional_call(club, fixed, (outliers, features))
        return {name: weight * bound, f"{name}_likelihood": -club.log_likelihood(outliers, features.detach())}
