"""The settings with which a student is fine-tuned, and checks of them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from ..diffusion.training import check_number
from ..exceptions import UsageError

_WHOLE = ("epochs", "batch_size", "patience")
_ABOVE_ZERO = (*_WHOLE, "learning_rate", "temperature")
_WEIGHTS = ("weight_decay", "distillation", "feature_distillation", "micl", "energy", "margin", "warm_up")


@dataclass(frozen=True)
class HardenRecipe:
    """SGD with Nesterov momentum, a warm-up and a cosine schedule, and the weight of each loss.

    Cross entropy of the labels has weight 1; a weight of 0 leaves a loss out.

    Parameters
    ----------
    epochs : int, default 10
    batch_size : int, default 64
        At least 2.
    learning_rate : float, default 0.02
        With a teacher, it is divided by 1 + ``distillation``, so that steps stay about as long as without one.
    weight_decay : float, default 5e-4
    distillation : float, default 4.0
        Weight of the teacher's logits.
    temperature : float, default 1.0
        At which logits of teacher and student are compared.
    feature_distillation : float, default 2.0
        Weight of the teacher's pre-logits.
    micl : float, default 0.1
        Weight of the bound of mutual information between outliers and features; twice that for Stable Diffusion
        latents.
    energy : float, default 0.0
        Weight of the margin between the energies of images and of outliers in the student's features.
    margin : float, default 5.0
        That margin, in nats.
    warm_up : float, default 0.1
        Share of all steps in which the learning rate rises, in [0, 1].
    patience : int, default 10
        Training ends early when held-out accuracy has not risen for so many epochs. Few would be too early: accuracy
        often rises only when the learning rate has fallen.
    bound_as_loss : bool, default False
        As in the released code of outlier-aware learning: the networks of the bound are trained by the bound itself
        and by SGD, not by their likelihood, and the one for latents is deeper.
    project_teacher : bool, default False
        As in that code: the teacher's features are mapped to the student's, not the other way round.

    Raises
    ------
    UsageError
        A value outside its range.

    Examples
    --------
    >>> HardenRecipe(epochs=2).batch_size
    64
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    distillation: float = 4.0
    temperature: float = 1.0
    feature_distillation: float = 2.0
    micl: float = 0.1
    energy: float = 0.0
    margin: float = 5.0
    warm_up: float = 0.1
    patience: int = 10
    bound_as_loss: bool = False
    project_teacher: bool = False

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            check_number(name, getattr(self, name), above=0, whole=name in _WHOLE)
        for name in _WEIGHTS:
            if check_number(name, getattr(self, name), above=-math.inf) < 0:
                raise UsageError(f"{name} must be 0 or more, not {getattr(self, name)!r}", argument=name)
        if self.warm_up > 1:
            raise UsageError(f"warm_up is a share of all steps, at most 1, not {self.warm_up!r}", argument="warm_up")
        if self.batch_size < 2:
            raise UsageError("batch_size must be 2 or more: batch normalisation compares images", argument="batch_size")

    @classmethod
    def as_published(cls) -> HardenRecipe:
        """The settings of the released code for CIFAR-10 (arXiv 2406.16525), which trains all layers.

        One difference remains: that code gives outliers the lengths that CLIP's text encoder gives the class names,
        while featdiff's have the lengths of real pre-logits.
        """
        return cls(
            epochs=100,
            batch_size=128,
            learning_rate=5 * 0.005,
            feature_distillation=8.0,
            warm_up=0.0,
            patience=100,
            bound_as_loss=True,
            project_teacher=True,
        )


def check_losses(recipe: HardenRecipe, chosen: Collection[str], teacher: bool, outliers: bool) -> None:
    """Check that every loss has what it needs, and that every setting has an effect.

    Parameters
    ----------
    recipe : HardenRecipe
    chosen : collection of str
        Names of the recipe's fields that the user set.
    teacher, outliers : bool
        Whether there are such.

    Raises
    ------
    UsageError
    """
    enabled = [name for name in chosen if getattr(recipe, name)]
    for name in ("distillation", "feature_distillation", "temperature"):
        if name in enabled and not teacher:
            raise UsageError(f"{name} needs a teacher", argument="teacher")
    if teacher and not (recipe.distillation or recipe.feature_distillation):
        raise UsageError(
            "with distillation and feature_distillation of 0 the teacher has no effect: drop it", argument="teacher"
        )

    if "micl" in enabled and not outliers:
        raise UsageError("micl needs outliers: make some with featdiff outliers", argument="outliers")
    if outliers and not recipe.micl:
        raise UsageError("outliers are used by micl alone, and its weight is 0: drop one of them", argument="outliers")

    for name, loss in (("margin", "energy"), ("temperature", "distillation")):
        if name in chosen and not getattr(recipe, loss):
            raise UsageError(f"{name} belongs to {loss}, whose weight is 0", argument=name)
