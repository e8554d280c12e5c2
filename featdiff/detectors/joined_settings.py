"""Settings of a detector that looks through several encoders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence  # noqa: F401  (Mapping, Recipe, Transform and Layers: in inherited fields)
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.decoding import Transform  # noqa: F401
from ..diffusion.training import Recipe  # noqa: F401
from ..exceptions import UsageError
from ..features.engines import AUTO, TORCH
from ..features.layers import Layers  # noqa: F401
from .checks import check_choice, is_list
from .config import EncoderSettings, FeatureSettings
from .joining import JOINS, Z_SUM

# What is each encoder's own business.
_OWN = ("model_args", "transform", "input_size")
# What a member has of its own: its backbone, and no local score.
_MEMBERS = ("backbone", "weights", "local")


@dataclass(frozen=True, kw_only=True)
class JoinedSettings(EncoderSettings):
    """Settings of :class:`featdiff.JoinedDetector`, which documents them."""

    backbone: Sequence[str] = field(kw_only=False)
    weights: Sequence[str | os.PathLike[str] | None] | None = None
    join: str = Z_SUM

    def __post_init__(self) -> None:
        names = self.backbone
        if not is_list(names) or len(names) < 2 or not all(isinstance(name, str) and name for name in names):
            raise UsageError(f"backbone must name two encoders or more, not {names!r}", "backbone")
        weights = self.weights
        if weights is not None and (not is_list(weights) or len(weights) != len(names)):
            raise UsageError(f"weights must be one file for each of {len(names)} backbones, not {weights!r}", "weights")
        check_choice("join", self.join, JOINS)
        for name in _OWN:
            if getattr(self, name) is not None:
                raise UsageError(f"several encoders each have their own {name}: drop {name}", argument=name)
        if self.local is True:
            raise UsageError("several encoders have no local score: drop local, or take one backbone", "local")
        if self.coreset != "random":
            raise UsageError("several encoders share one bank, chosen by chance: drop coreset", argument="coreset")
        if self.engine not in (AUTO, TORCH):
            raise UsageError("several encoders run in PyTorch alone: drop engine", argument="engine")
        super().__post_init__()
        self.members()

    def members(self) -> list[FeatureSettings]:
        """The settings of the detector of each encoder."""
        shared = {name: getattr(self, name) for name in FeatureSettings.names() if name not in _MEMBERS}
        weights = self.weights or [None] * len(self.backbone)
        return [
            FeatureSettings(backbone=name, weights=file, local=False, **shared)
            for name, file in zip(self.backbone, weights, strict=True)
        ]

    def saved(self) -> dict[str, Any]:
        """What ``config.json`` says of them: all but how it runs."""
        files = self.weights
        values = self.with_(weights=None).saved() if files is not None else super().saved()
        if files is not None:
            values["weights"] = [None if file is None else str(Path(file).absolute()) for file in files]
        return values
