"""How a student is fine-tuned."""

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
    """SGD with Nesterov momentum, a warm-up and a cosine, and the weight of each loss (0 leaves it out).

    Cross entropy has weight 1. With a teacher, ``learning_rate`` is divided by 1 + ``distillation``, so that steps stay
    about as long as without. ``distillation`` is the weight of the teacher's logits (at ``temperature``),
    ``feature_distillation`` that of its pre-logits, ``micl`` that of the bound of mutual information between outliers
    and features (twice that for Stable Diffusion latents), ``energy`` that of the margin (``margin``, in nats) between
    the energies of images and of outliers beside them. The learning rate rises for ``warm_up`` of all steps. Training
    ends early when held-out accuracy has not risen for ``patience`` epochs; not for few, since much is learnt only when
    the rate has fallen. Two switches do as the released code of outlier-aware learning. ``bound_as_loss``: the networks
    of the bound are trained by the bound itself, in place of their likelihood, and by SGD, and the one for latents is
    deeper. ``project_teacher``: the teacher's features are mapped to the student's, in place of the other way round.
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
                raise UsageError(f"{name} must be 0 or more, not {getattr(self, name)!r}")
        if self.warm_up > 1:
            raise UsageError(f"warm_up is a share of all steps, at most 1, not {self.warm_up!r}")
        if self.batch_size < 2:
            raise UsageError("batch_size must be 2 or more: batch normalisation compares images")

    @classmethod
    def as_published(cls) -> HardenRecipe:
        """The settings of the released code for CIFAR-10 (arXiv 2406.16525), which trains all layers.

        What it does besides: it gives outliers the lengths that CLIP's text encoder gives the class names, where
        featdiff's have those of real pre-logits.
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


def check_losses(recipe: HardenRecipe, given: Collection[str], teacher: bool, outliers: bool) -> None:
    """Whether there is what a loss that was asked for needs, and everything that was asked for counts.

    Parameters
    ----------
    given : names of the recipe's fields that somebody set, rather than their defaults
    teacher, outliers : whether there are such

    Raises
    ------
    UsageError
    """
    wanted = {name for name in given if getattr(recipe, name)}
    if not teacher and wanted & {"distillation", "feature_distillation", "temperature"}:
        raise UsageError("--kd, --feature-kd and --temperature need a --teacher")
    if teacher and not (recipe.distillation or recipe.feature_distillation):
        raise UsageError("with --kd 0 and --feature-kd 0 the --teacher has no say: leave it away")
    if "micl" in wanted and not outliers:
        raise UsageError("--micl needs --outliers FILE: make one with featdiff outliers")
    if outliers and not recipe.micl:
        raise UsageError("--outliers are used by --micl alone, and its weight is 0: leave one of them away")
    for option, needs in (("margin", "energy"), ("temperature", "distillation")):
        if option in given and not getattr(recipe, needs):
            raise UsageError(f"--{option} belongs to --{'kd' if needs == 'distillation' else needs}, whose weight is 0")
