"""How a student is fine-tuned."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..exceptions import UsageError

_WHOLE = ("epochs", "batch_size", "patience")
_ABOVE_ZERO = (*_WHOLE, "learning_rate", "temperature")


@dataclass(frozen=True)
class HardenRecipe:
    """SGD with Nesterov momentum, a short warm-up and a cosine, and the weight of each loss (0 leaves it out).

    Cross entropy has weight 1. ``distillation`` is the weight of the teacher's logits (at ``temperature``),
    ``feature_distillation`` that of its pre-logits, ``micl`` that of the bound of mutual information between outliers
    and features (twice that for Stable Diffusion latents), ``energy`` that of the margin (``margin``, in nats) between
    the energies of images and of outliers beside them. Training ends early when held-out accuracy has not risen for
    ``patience`` epochs. ``bound_as_loss`` trains the networks of the bound by the bound itself, as the released code of
    outlier-aware learning does, in place of their likelihood.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    distillation: float = 4.0
    temperature: float = 1.0
    feature_distillation: float = 8.0
    micl: float = 0.1
    energy: float = 0.0
    margin: float = 5.0
    patience: int = 4
    bound_as_loss: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "bound_as_loss":
                continue
            whole = field.name in _WHOLE
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise UsageError(f"{field.name} must be a {'whole ' if whole else ''}number, not {value!r}")
            if not math.isfinite(value) or value < 0 or (value == 0 and field.name in _ABOVE_ZERO):
                wanted = "above 0" if field.name in _ABOVE_ZERO else "0 or more"
                raise UsageError(f"{field.name} must be {wanted}, not {value!r}")

    @classmethod
    def as_published(cls) -> HardenRecipe:
        """The settings of the released code for CIFAR-10 (arXiv 2406.16525), which trains all layers."""
        return cls(epochs=100, batch_size=128, learning_rate=0.005, patience=100, bound_as_loss=True)
