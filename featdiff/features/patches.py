"""Which maps of a network tell where in a picture something is strange, and how they are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from .hooks import Hook
from .layers import final_norm, stage_names
from .layout import PRE_LOGITS
from .stages import CHANGE, Output

# Of networks without resolutions, such as plain ViTs, so many of the deepest layers.
_DEEPEST = 3


def choose_maps(layers: Sequence[str], outputs: Mapping[str, Output]) -> list[str]:
    """The modules whose maps show places, the finest first.

    These are the last stage, where content is; the stage before it that is finer, where details are; and a block
    between the two, the first at the resolution of the last. Earlier stages see textures in windows too small to tell a
    defect from its surroundings.

    Parameters
    ----------
    layers : sequence of str
        Layers of an extractor, early ones first.
    outputs : mapping of str to Output
        What the modules of the network give (:func:`featdiff.features.stages.watch`).

    Returns
    -------
    list of str
        Empty if no layer gives a map.

    Examples
    --------
    >>> network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 2, 2)), nn.Sequential(nn.Conv2d(8, 16, 2, 2)))
    >>> sides = {"0": 8, "1": 4}
    >>> outputs = {name: Output(name, network[int(name)], (8, n, n), 0, n * n, False) for name, n in sides.items()}
    >>> choose_maps(["0", "1"], outputs)
    ['0', '1']
    """
    maps = [name for name in layers if name != PRE_LOGITS and name in outputs and outputs[name].positions > 1]
    if not maps:
        return []
    last = maps[-1]
    positions = outputs[last].positions
    finer = [name for name in maps if outputs[name].positions >= CHANGE * positions]
    if not finer:
        return maps[-_DEEPEST:]

    order = list(outputs)
    between = order[order.index(finer[-1]) + 1 : order.index(last)]
    blocks = [name for name in between if outputs[name].is_block and outputs[name].positions == positions]
    inner = min(blocks, key=lambda name: name.count("."), default=None)
    return [finer[-1], *([inner] if inner else []), last]


def map_hooks(
    names: Sequence[str], model: nn.Module, outputs: Mapping[str, Output], channels_last: Collection[str]
) -> list[Hook]:
    """What reads these maps; tokens that stand for no place are left out."""
    tokens: int = getattr(model, "num_prefix_tokens", 0)
    hooks = []
    for name in names:
        skip = tokens if len(outputs[name].shape) == 2 else 0
        is_last = name in channels_last
        norm = final_norm(model) if name in stage_names(model) else ""
        hooks.append(Hook(name, name, pooled=None, skip=skip, channels_last=is_last, keeps_map=True, norm=norm))
    return hooks
