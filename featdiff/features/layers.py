"""Layer names and indices -> the layers of a network."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from torch import nn

from ..exceptions import UsageError, did_you_mean
from .layout import PRE_LOGITS

#: ``layers="auto"`` takes every stage of a CNN or Swin, and this many evenly spaced blocks of a plain ViT.
AUTO_LAYERS = 5
Layers = str | Sequence[str | int]


def resolve_layers(
    layers: Layers, stages: Sequence[str], modules: Sequence[str], has_classifier: bool = False
) -> tuple[str, ...]:
    """``auto``, names or indices -> layer names, in network order as given; ``auto`` ends with ``pre_logits``.

    Raises
    ------
    UsageError
        A layer that does not exist (near names are offered), or ``auto`` for a module without stages.
    """
    if isinstance(layers, str):
        layers = [part.strip() for part in layers.split(",") if part.strip()]
    if not isinstance(layers, Iterable):
        raise UsageError(f"layers are 'auto', names or indices, not {layers!r}")
    if list(layers) == ["auto"]:
        if not stages:
            raise UsageError("layers='auto' needs a timm model; name the layers of your module")
        count = len(stages)
        if count > AUTO_LAYERS + 1:
            stages = [stages[round((i + 1) * count / AUTO_LAYERS) - 1] for i in range(AUTO_LAYERS)]
        return tuple(dict.fromkeys([*stages, PRE_LOGITS] if has_classifier else stages))
    if has_classifier and PRE_LOGITS not in modules:
        modules = [*modules, PRE_LOGITS]
    names = tuple(_layer_name(layer, stages, modules) for layer in layers)
    if not names or len(set(names)) < len(names):
        raise UsageError("name at least one layer, and each layer once")
    if has_classifier and names == (PRE_LOGITS,):
        raise UsageError(f"name another layer beside {PRE_LOGITS!r}: it is used for neighbours, not for diffusion")
    return names


def _layer_name(layer: object, stages: Sequence[str], modules: Sequence[str]) -> str:
    if isinstance(layer, str) and (layer in stages or layer in modules):
        return str(layer)
    index = _as_index(layer)
    if index is None:
        known = list(dict.fromkeys([*stages, *modules]))
        hint = did_you_mean(str(layer), known)
        raise UsageError(f"unknown layer {layer!r}{hint or '; known: ' + ', '.join(stages or known[:20])}")
    if not -len(stages) <= index < len(stages):
        raise UsageError(f"no layer {index}: this backbone has {len(stages)} ({', '.join(stages) or 'name them'})")
    return stages[index]


def _as_index(layer: object) -> int | None:
    try:
        return int(layer) if isinstance(layer, str) else operator.index(layer)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def stage_names(model: nn.Module) -> list[str]:
    """Names of a timm model's stages; of any other module, none."""
    if not hasattr(model, "forward_intermediates"):
        return []
    return [info["module"] for info in model.feature_info]  # type: ignore[union-attr]
