"""Settings of detectors: frozen dataclasses that are checked when they are made.

A constructor's arguments, a config file and ``config.json`` are these and nothing else. Each class holds a detector's
own settings and, from :class:`featdiff.detectors.run_config.Runtime`, how it runs, which is not part of a model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from torch import nn

from ..data.decoding import Transform
from ..data.splits import CALIBRATION
from ..diffusion.training import Recipe
from ..exceptions import UsageError, did_you_mean
from ..features.engines import AUTO, TORCH
from ..features.layers import Layers
from ..features.networks import PRECISIONS
from ..features.views import check_view
from ..features.weights import DEFAULT_BACKBONE
from ..scores.coreset import CORESETS
from ..scores.diffusion import DIFFUSION
from ..scores.distances import DISTANCES
from ..scores.fused import FUSED
from ..scores.neighbors import BACKENDS
from ..scores.registry import check_registered, heads, need_logits
from ..verdicts.calibration import check_fpr
from .checks import (
    check_bool,
    check_choice,
    check_different_names,
    check_input_size,
    check_kept,
    check_local,
    check_names,
    check_neighbors,
    check_number,
    check_path,
    check_positive,
    check_seed,
    check_share,
    check_table,
    check_text,
    check_times,
    check_whole,
    is_list,
    is_number,
    is_whole,
    make_recipe,
)
from .run_config import RUNTIME, Runtime

#: Precisions that ``accelerate`` offers for training.
MIXED = ("no", "bf16")
#: Ten minutes on two CPU cores at 32 px.
SMALL_RECIPE = Recipe(
    epochs=1, batch_size=32, learning_rate=1e-3, weight_decay=0.0, patience=1000, min_steps=2000, ema_decay=0.999
)


@dataclass(frozen=True, kw_only=True)
class Settings(Runtime):
    """What detectors of all modes have in common.

    Parameters
    ----------
    recipe : Recipe or mapping of its fields, optional
        How networks are trained.
    calibration : "auto" or float, default "auto"
        Share of the images held out for p-values. ``auto``: up to 500 images all of them calibrate, by five folds; of
        more, a fifth. In pixel mode always a fifth.
    validation : float, default 0.05
        Share of the images held out for early stopping and standardising.
    fpr : float, default 0.05
        False-alarm rate: this share of in-domain images is flagged. Can be changed when scoring.
    seed : int, default 0
        Decides the split, the initial weights, the order of training and the stored noise.
    """

    recipe: Recipe | Mapping[str, Any] | None = None
    calibration: float | str = "auto"
    validation: float = 0.05
    fpr: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "recipe", make_recipe(self.recipe))
        if self.calibration != "auto":
            check_share("calibration", self.calibration)
        check_share("validation", self.validation)
        object.__setattr__(self, "fpr", check_fpr(self.fpr))
        check_seed("seed", self.seed)

    def with_(self, **changes: Any) -> Self:
        """The same settings with some changed, checked again."""
        return replace(self, **changes)

    def saved(self) -> dict[str, Any]:
        """What ``config.json`` says of them: all but how it runs."""
        values = {name: getattr(self, name) for name in self.names() if name not in RUNTIME}
        values["recipe"] = asdict(make_recipe(self.recipe))
        if values.get("weights") is not None:
            values["weights"] = str(Path(values["weights"]).absolute())
        return values

    @classmethod
    def names(cls) -> list[str]:
        """Names of all settings."""
        return [item.name for item in fields(cls)]

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Settings from a table of them.

        Raises
        ------
        UsageError
            An unknown name (its nearest neighbours are named, after ``where``), or a value outside its range.
        """
        check_names(values, cls.names(), where)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class EncoderSettings(Settings):
    """What detectors that look through one or more encoders have in common; :class:`featdiff.Detector` documents it."""

    backbone: Any = field(default=DEFAULT_BACKBONE, kw_only=False)
    weights: Any = None
    pretrained: bool = True
    model_args: Mapping[str, Any] | None = None
    transform: Mapping[str, Any] | Transform | None = None
    view: str = "whole"
    size: int | None = None
    input_size: Sequence[int] | None = None
    layers: Layers = "auto"
    precision: str = "auto"
    joint: bool = False
    hidden_ratio: float = 2.0
    hidden_max: int = 320
    blocks: int = 3
    timesteps: int = 100
    start_times: Sequence[int] = (70, 95)
    draws: int = 2
    stride: int | None = None
    head: str = FUSED
    neighbors: int = 5
    bank_size: int = 10_000
    coreset: str = "random"
    backend: str = "auto"
    local: bool | str = "auto"
    keep_paths: bool = True
    keep_thumbnails: bool = False
    extra_heads: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden_max", "blocks", "timesteps", "draws", "bank_size"):
            check_whole(name, getattr(self, name))
        check_whole("stride", self.stride, optional=True)
        check_positive("hidden_ratio", self.hidden_ratio)
        check_bool("joint", self.joint)
        check_bool("pretrained", self.pretrained)
        check_table("model_args", self.model_args)
        check_table("transform", self.transform, or_callable=True)
        check_times("start_times", self.start_times, self.timesteps - 1)
        check_neighbors(self.neighbors, self.bank_size)
        check_choice("coreset", self.coreset, CORESETS)
        check_choice("backend", self.backend, BACKENDS)
        check_kept(self.keep_paths, self.keep_thumbnails)
        check_local(self.local)
        self._check_precision()
        self._check_heads()
        check_input_size(self.input_size)
        check_view(self.view, self.size, isinstance(self.backbone, nn.Module))

    @property
    def registered_heads(self) -> list[str]:
        """Scores that are built by name beside those of diffusion."""
        if self.head in DIFFUSION:
            return []
        if self.head != FUSED:
            return [self.head]
        neighbors = ["neighbors"] if self.neighbors else []
        return [*neighbors, *self.extra_heads]

    @property
    def needs_logits(self) -> bool:
        """Whether one of the scores looks at a classifier's logits."""
        return need_logits(self.registered_heads)

    def _check_precision(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        if self.precision != "auto" and isinstance(self.backbone, nn.Module):
            raise UsageError(
                "a module runs in the precision that it has: drop precision, or put its passes under torch.autocast",
                argument="precision",
            )

    def _check_heads(self) -> None:
        if self.head not in (FUSED, *DIFFUSION):
            check_choice("head", self.head, [FUSED, *DIFFUSION, *_extra_heads()])
        names = self.extra_heads
        check_different_names("extra_heads", names)
        check_registered(names, among=_extra_heads, argument="extra_heads")
        if self.needs_logits and not isinstance(self.backbone, nn.Module):
            raise UsageError(
                f"{', '.join(names) or self.head} need logits: give a classifier (a module) as backbone, or use "
                "featdiff.Guard",
                argument="extra_heads" if names else "head",
            )
        if names and self.head != FUSED:
            raise UsageError("extra_heads are joined by head='fused' only", argument="extra_heads")


@dataclass(frozen=True, kw_only=True)
class FeatureSettings(EncoderSettings):
    """Settings of :class:`featdiff.Detector`, which documents them."""

    backbone: str | nn.Module = field(default=DEFAULT_BACKBONE, kw_only=False)
    weights: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if is_list(self.backbone):
            raise UsageError("Detector looks through one backbone: featdiff.JoinedDetector joins several", "backbone")
        if not isinstance(self.backbone, str | nn.Module):
            raise UsageError(f"backbone must be a name or a module, not {self.backbone!r}", argument="backbone")
        check_path("weights", self.weights)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class PixelSettings(Settings):
    """Settings of :class:`featdiff.PixelDetector`, which documents them."""

    image_batch: int = 8
    size: int | None = None
    channels: int | None = None
    width: int = 16
    multipliers: Sequence[int] = (1, 2, 4)
    blocks: int = 1
    attention: Sequence[int] = (8,)
    dropout: float = 0.0
    timesteps: int = 1000
    flip: bool = False
    pretrained: str | None = None
    mask: str = "checkerboard_alt"
    mask_blocks: int = 8
    mask_patch: int = 4
    mask_ratio: float = 0.5
    repetitions: int = 4
    sampler: str = "ddpm"
    steps: int = 20
    resamplings: int = 1
    distances: Sequence[str] = ("lpips", "mse", "ssim")
    aggregate: str = "median"
    trunk: str = "squeeze"
    weights: str | os.PathLike[str] | None = None
    backbone: str = DEFAULT_BACKBONE
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        if self.recipe is None:
            object.__setattr__(self, "recipe", SMALL_RECIPE)
        if self.engine not in (AUTO, TORCH):
            raise UsageError("the pixel mode runs in PyTorch alone: drop engine", argument="engine")
        if self.calibration == "auto":  # five trainings more would take hours
            object.__setattr__(self, "calibration", CALIBRATION)
        super().__post_init__()
        numbers = ["width", "blocks", "timesteps", "mask_blocks", "mask_patch", "repetitions", "steps", "resamplings"]
        numbers += [name for name in ("size", "channels") if getattr(self, name) is not None]
        for name in numbers:
            check_whole(name, getattr(self, name))
        for name in ("mask", "sampler", "aggregate", "trunk", "backbone"):
            check_text(name, getattr(self, name))
        if self.pretrained is not None:
            check_text("pretrained", self.pretrained)
        check_path("weights", self.weights)
        check_bool("flip", self.flip)
        check_choice("mixed_precision", self.mixed_precision, MIXED)
        self._check_network()
        self._check_distances()

    def _check_network(self) -> None:
        for name in ("multipliers", "attention"):
            values = getattr(self, name)
            if not is_list(values) or not all(is_whole(v) and v > 0 for v in values):
                raise UsageError(f"{name} must be whole numbers above 0, not {values!r}", argument=name)
        if not self.multipliers:
            raise UsageError("multipliers must name at least one level", argument="multipliers")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is a share between 0 and 1, not {self.dropout!r}", argument="dropout")
        check_number("mask_ratio", self.mask_ratio)

    def _check_distances(self) -> None:
        check_different_names("distances", self.distances)
        if not self.distances:
            raise UsageError("distances must name at least one distance", argument="distances")
        for name in self.distances:
            if name not in DISTANCES:
                known = f"{did_you_mean(name, list(DISTANCES))}; known: {', '.join(DISTANCES)}"
                raise UsageError(f"unknown distance {name!r}{known}", argument="distances")


#: Settings by mode, as saved models and config files name it.
SETTINGS: dict[str, type[FeatureSettings] | type[PixelSettings]] = {"feature": FeatureSettings, "pixel": PixelSettings}


def _extra_heads() -> list[str]:
    """What ``extra_heads`` may name: every head but neighbours, of which ``neighbors`` says how many."""
    return [name for name in heads() if name != "neighbors"]
