"""``auto``, names or indices of layers -> the names of a network's layers.

How ``auto`` finds the stages of networks that do not name them: :mod:`featdiff.features.stages`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from torch import nn

from ..exceptions import UsageError, did_you_mean
from .layout import PRE_LOGITS

#: ``layers="auto"`` takes all stages of a CNN or Swin. Where there are more than one above this number, such as the
#: blocks of a plain ViT, it takes this many, evenly spaced, the last among them.
AUTO_LAYERS = 5
Layers = str | Sequence[str | int]


def is_auto(layers: Layers) -> bool:
    """Whether ``layers`` are to be chosen, and not named.

    Parameters
    ----------
    layers : str or sequence of str or int

    Returns
    -------
    bool

    Examples
    --------
    >>> is_auto("auto"), is_auto(["auto"]), is_auto(["layer1"])
    (True, True, False)
    """
    return layers == "auto" or (isinstance(layers, list | tuple) and list(layers) == ["auto"])


def resolve_layers(
    layers: Layers, stages: Sequence[str], modules: Sequence[str], has_classifier: bool = False
) -> tuple[str, ...]:
    """The names of the layers that are meant, in the given order.

    Parameters
    ----------
    layers : str or sequence of str or int
        ``auto``, or names and indices of layers: a sequence, or one text with commas.
    stages : sequence of str
        Names of the network's stages, which indices count.
    modules : sequence of str
        Names of all modules of the network.
    has_classifier : bool, default False
        Whether the pre-logits are a layer as well; ``auto`` then ends with ``pre_logits``.

    Returns
    -------
    tuple of str

    Raises
    ------
    UsageError
        A layer that does not exist (similar names are suggested), no layer or one twice, ``auto`` for a network whose
        stages are not known, or ``pre_logits`` alone.

    Examples
    --------
    >>> resolve_layers("auto", ["layer1", "layer2"], [])
    ('layer1', 'layer2')
    >>> resolve_layers([0, -1], ["layer1", "layer2", "layer3"], [])
    ('layer1', 'layer3')
    """
    if isinstance(layers, str):
        layers = [part.strip() for part in layers.split(",") if part.strip()]
    if not isinstance(layers, Iterable):
        raise UsageError(f"layers are 'auto', names or indices, not {layers!r}", argument="layers")
    if list(layers) == ["auto"]:
        return _auto_layers(stages, has_classifier)

    if has_classifier and PRE_LOGITS not in modules:
        modules = [*modules, PRE_LOGITS]
    names = tuple(_layer_name(layer, stages, modules) for layer in layers)
    if not names or len(set(names)) < len(names):
        raise UsageError("name at least one layer, and each layer once", argument="layers")
    if has_classifier and names == (PRE_LOGITS,):
        raise UsageError(
            f"name another layer beside {PRE_LOGITS!r}: it is used for neighbours, not for diffusion",
            argument="layers",
        )
    return names


def _auto_layers(stages: Sequence[str], has_classifier: bool) -> tuple[str, ...]:
    """All stages, or evenly spaced ones if there are many; then the pre-logits."""
    if not stages:
        raise UsageError("layers='auto' finds no stages in this network: name its layers", argument="layers")

    count = len(stages)
    if count > AUTO_LAYERS + 1:
        stages = [stages[round((i + 1) * count / AUTO_LAYERS) - 1] for i in range(AUTO_LAYERS)]
    names = [*stages, PRE_LOGITS] if has_classifier else stages
    return tuple(dict.fromkeys(names))


def _layer_name(layer: object, stages: Sequence[str], modules: Sequence[str]) -> str:
    """The name of one layer, given by name or index."""
    if isinstance(layer, str) and (layer in stages or layer in modules):
        return str(layer)

    index = _as_index(layer)
    if index is None:
        known = list(dict.fromkeys([*stages, *modules]))
        hint = did_you_mean(str(layer), known) or f"; known: {', '.join(stages or known[:20])}"
        raise UsageError(f"unknown layer {layer!r}{hint}", argument="layers")
    if not -len(stages) <= index < len(stages):
        names = ", ".join(stages) or "name them"
        raise UsageError(f"no layer {index}: this backbone has {len(stages)} ({names})", argument="layers")
    return stages[index]


def _as_index(layer: object) -> int | None:
    try:
        return int(layer) if isinstance(layer, str) else operator.index(layer)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def stage_names(model: nn.Module) -> list[str]:
    """Names of a timm model's stages; an empty list for any other module."""
    if not hasattr(model, "forward_intermediates"):
        return []
    return [info["module"] for info in model.feature_info]  # type: ignore[union-attr]


def final_norm(model: nn.Module) -> str:
    """Name of the norm that a plain timm transformer applies after its last block; empty for other networks.

    Blocks of such a transformer add to one stream, so a few channels may be hundreds of times larger than the others,
    and hide them. The final norm brings channels to one scale. It is applied to all blocks that are read, as timm's
    ``forward_intermediates(norm=True)`` does, and not to the last alone: what is compared is then on one scale.
    CNNs and Swin change width from stage to stage, and have no norm for all of them.
    """
    if len(stage_names(model)) < 2 or not isinstance(getattr(model, "norm", None), nn.Module):
        return ""
    shapes = {(info["num_chs"], info["reduction"]) for info in model.feature_info}  # type: ignore[union-attr]
    is_plain = len(shapes) == 1 and hasattr(model, "blocks")
    return "norm" if is_plain and not isinstance(model.norm, nn.Identity) else ""
