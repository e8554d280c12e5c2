"""One pass through any network -> its stages, by where the resolution changes, or by its longest list of blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..exceptions import UsageError
from .hooks import first_tensor

#: Two maps are of another resolution if one has at least this many times the positions of the other.
CHANGE = 1.5
#: So many modules are proposed where no stages are found.
MOST_CANDIDATES = 10


@dataclass(frozen=True)
class Output:
    """What a module gave in its last call of a pass.

    Attributes
    ----------
    name : str
        As in ``named_modules``.
    module : nn.Module
    shape : tuple of int
        Of its output, without the batch.
    before, positions : int
        Positions of the map or tokens that it took and gave: H * W or N; 0 for a vector, or for anything else that has
        no place in the image.
    channels_last : bool or None
        Whether its map is (H, W, C); None where the shape does not tell.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    before: int
    positions: int
    channels_last: bool | None

    @property
    def is_block(self) -> bool:
        """Whether the module holds others."""
        return next(self.module.children(), None) is not None


@torch.no_grad()
def watch(model: nn.Module, run: Callable[[], object], pixels: Tensor) -> dict[str, Output]:
    """What each module gives for each image in a pass ``run()`` over ``pixels``, in the order of their last calls.

    Parameters
    ----------
    model : nn.Module
    run : callable
        Passes ``pixels`` through the model.
    pixels : Tensor of shape (B, C, H, W)

    Returns
    -------
    dict of Output
        By name; modules that do not give one map, token sequence or vector per image are left out.
    """
    batch = len(pixels)
    sides = (int(pixels.shape[2]), int(pixels.shape[3]))
    outputs: dict[str, Output] = {}

    def look(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs.pop(name, None)  # of several calls the last one counts, since hooks keep that
        value = first_tensor(output)
        if not _is_feature(value, batch):
            return

        taken = [value for value in (*args, *kwargs.values()) if _is_feature(value, batch)]
        before, _ = _positions(taken[0], sides) if taken else (0, None)
        positions, channels_last = _positions(value, sides)
        outputs[name] = Output(name, module, tuple(value.shape[1:]), before, positions, channels_last)

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(functools.partial(look, name), with_kwargs=True) for name, module in named]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _is_feature(value: Any, batch: int) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.dim() in (2, 3, 4) and value.shape[0] == batch


def _positions(value: Tensor, sides: tuple[int, int]) -> tuple[int, bool | None]:
    """Positions of a map or of tokens, 0 for a vector; and whether the channels of the map come last, if that shows.

    A map has the aspect ratio of the images: that tells (B, H, W, C) from (B, C, H, W).
    """
    if value.dim() == 2:
        return 0, None
    if value.dim() == 3:
        return int(value.shape[1]), None

    a, b, c = (int(side) for side in value.shape[1:])
    last = _fits(a, b, sides)
    first = _fits(b, c, sides)
    if first:
        return b * c, None if last else False
    return (a * b, True) if last else (0, False)


def _fits(height: int, width: int, sides: tuple[int, int]) -> bool:
    """Whether a map of this size has the aspect ratio of the images; unless they are square, up to two positions."""
    return abs(height * sides[1] - width * sides[0]) <= (0 if sides[0] == sides[1] else 2 * max(sides))


def maps_with_channels_last(outputs: dict[str, Output]) -> set[str]:
    """Names of the modules that give maps (B, H, W, C).

    Where height, width and channels are equal, most of the network's other blocks decide.
    """
    votes = [output.channels_last for output in outputs.values() if output.is_block and len(output.shape) == 3]
    usual = votes.count(True) > votes.count(False)

    names = set()
    for name, output in outputs.items():
        if len(output.shape) != 3:
            continue
        channels_last = usual if output.channels_last is None else output.channels_last
        if channels_last:
            names.add(name)
    return names


def find_stages(model: nn.Module, outputs: dict[str, Output], image: tuple[int, ...]) -> list[str]:
    """Names of the stages of a network, from early to late.

    These are the last blocks before each change of resolution; where that does not change, the blocks of the longest
    list. Pooling counts as no layer.

    Parameters
    ----------
    model : nn.Module
    outputs : dict of Output
        From :func:`watch`.
    image : (C, H, W)
        Size of the images, which are no features.

    Returns
    -------
    list of str

    Raises
    ------
    UsageError
        There are neither; the message proposes modules.

    Examples
    --------
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU())
    >>> pixels = torch.rand(1, 3, 32, 32)
    >>> find_stages(network, watch(network, lambda: network(pixels), pixels), (3, 32, 32))
    ['1', '3']
    """
    features = {name: output for name, output in outputs.items() if output.shape != image and not _is_pooled(output)}
    order = list(features)
    path = sorted(_main_path(model, "", features), key=lambda output: order.index(output.name))
    stages = _last_of_each_resolution(path)
    if len(stages) < 2:
        stages = _longest_list(model, features)
    if not stages:
        _propose(model, features)
    return stages


def _is_pooled(output: Output) -> bool:
    """Whether a module does no more than pool, or works on what is pooled already."""
    if not output.is_block and _is_pool(output.module):
        return True
    if output.positions != 1:
        return False
    # the last stage of a network on small images may end with one position
    shrinks = output.is_block and output.before > 1
    return not shrinks or any(_is_pool(module) for module in output.module.modules())


def _is_pool(module: nn.Module) -> bool:
    return "pool" in type(module).__name__.lower()


def _main_path(module: nn.Module, prefix: str, features: dict[str, Output]) -> Iterator[Output]:
    """The outermost modules within each of which the resolution changes at most once, at its beginning."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        output = features.get(path)
        if output is not None and output.positions and not _holds_several_stages(output, features):
            yield output
        else:
            yield from _main_path(child, f"{path}.", features)


def _holds_several_stages(output: Output, features: dict[str, Output]) -> bool:
    """Whether a module works at another resolution than that of its output for longer than it takes to leave it."""
    if not _differ(output.before, output.positions):
        return False

    inner = [feature for name, feature in features.items() if name.startswith(f"{output.name}.")]
    for feature in inner:
        is_between = output.before > feature.positions > output.positions
        if is_between and _differ(feature.positions, output.before) and _differ(feature.positions, output.positions):
            return True

        # a whole block ahead of the change, as in a stage that ends by merging its tokens
        is_before = feature.positions == feature.before == output.before
        if is_before and feature.is_block and _weights(feature.module) > 1:
            return True
    return False


def _weights(module: nn.Module) -> int:
    """Number of matrices and kernels among the parameters."""
    return sum(parameter.dim() > 1 for parameter in module.parameters())


def _differ(a: int, b: int) -> bool:
    """Whether so many positions mean another resolution; class tokens do not."""
    return max(a, b) >= CHANGE * min(a, b)


def _last_of_each_resolution(path: list[Output]) -> list[str]:
    """Of each stretch of one resolution the last block; where there are no blocks, the last layer."""
    stretches: list[list[Output]] = []
    for output in path:
        if not stretches or _differ(stretches[-1][0].positions, output.positions):
            stretches.append([])
        stretches[-1].append(output)

    names = []
    for stretch in stretches:
        blocks = [output for output in stretch if output.is_block]
        names.append((blocks or stretch)[-1].name)
    return names


def _longest_list(model: nn.Module, features: dict[str, Output]) -> list[str]:
    """Names of the most blocks in a row, of one class and one shape, that one module holds; empty if there are none."""
    longest: list[str] = []
    for prefix, parent in model.named_modules():
        row: list[Output] = []
        for name, _ in parent.named_children():
            output = features.get(f"{prefix}.{name}" if prefix else name)
            if output is None or not output.is_block or not output.positions:
                row = []
                continue

            if row and (type(row[-1].module), row[-1].shape) != (type(output.module), output.shape):
                row = []
            row.append(output)
            if len(row) > max(len(longest), 1):
                longest = [block.name for block in row]
    return longest


def _propose(model: nn.Module, features: dict[str, Output]) -> NoReturn:
    """Say which modules could be named (``UsageError``)."""
    useful = []
    for name, output in features.items():
        parent = features.get(name.rpartition(".")[0])
        is_repeated = parent is not None and parent.shape == output.shape
        if _weights(output.module) and not is_repeated:
            useful.append(output)

    hint = "its modules give no features (B, C), (B, N, C) or (B, C, H, W)"
    if useful:
        step = max(1, -(-len(useful) // MOST_CANDIDATES))
        chosen = useful[step - 1 :: step]
        shapes = [f"{output.name} ({', '.join(map(str, output.shape))})" for output in chosen]
        hint = f"name some, from early to late, as in layers=[{chosen[0].name!r}]: {', '.join(shapes)}"
    raise UsageError(f"layers='auto' finds no stages in {type(model).__name__}; {hint}", argument="layers")
