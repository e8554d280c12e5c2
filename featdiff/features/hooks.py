"""Reads layers of a network in its own forward pass, through hooks that are in place only while it runs."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..exceptions import UsageError
from .layout import Key, Kind


@dataclass(frozen=True)
class Hook:
    """What is read at one module of a network.

    Parameters
    ----------
    module : str
        Name of the module, as in ``named_modules``.
    layer : str
        Name under which its features are kept.
    pooled : Kind or None
        Kind of the features that are its output's mean over space; None: the mean is not wanted.
    spatial_std : bool, default False
        Whether the standard deviation over space is kept, too.
    input : bool, default False
        Read the module's input in place of its output.
    skip : int, default 0
        Leave out so many tokens at the beginning (class tokens).
    channels_last : bool, default False
        Its map is (B, H, W, C), whatever the module declares.
    keeps_map : bool, default False
        Whether the map itself is kept, too; tokens must fill a square.
    norm : str, default ""
        Name of a module that its output goes through first (:func:`featdiff.features.layers.final_norm`).
    """

    module: str
    layer: str
    pooled: Kind | None = Kind.MEAN
    spatial_std: bool = False
    input: bool = False
    skip: int = 0
    channels_last: bool = False
    keeps_map: bool = False
    norm: str = ""

    @property
    def key(self) -> Key | None:
        """What a pass must have given, if anything must."""
        if self.keeps_map:
            return self.layer, Kind.MAP
        return (self.layer, self.pooled) if self.pooled else None


class Hooks:
    """Reads layers of a network while it runs, in any number of threads at once.

    Hooks are installed once for all threads, and each thread sees only its own passes.

    Parameters
    ----------
    model : nn.Module
    hooks : sequence of Hook
    """

    def __init__(self, model: nn.Module, hooks: Sequence[Hook]) -> None:
        self.model = model
        self.hooks = list(hooks)
        self._prepare()

    def _prepare(self) -> None:
        # the same functions at every pass: torch.compile would compile again for others
        self._readers = [functools.partial(self._read, hook) for hook in self.hooks]
        self._handles: list[Any] = []
        self._running = 0
        self._lock = threading.Lock()
        self._thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "hooks": self.hooks}  # locks can be neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    @contextmanager
    def recording(self) -> Iterator[dict[Key, Tensor]]:
        """Collect pooled layers (B, C) from the passes that this thread makes meanwhile.

        Raises
        ------
        UsageError
            A layer does not exist any more, or, at the end, was not reached.
        """
        outer = getattr(self._thread, "features", None)
        features: dict[Key, Tensor] = {}
        self._install()
        self._thread.features = features

        try:
            yield features
        finally:
            self._thread.features = outer
            self._remove()

        for hook in self.hooks:
            if hook.key and hook.key not in features:
                raise UsageError(f"layer {hook.layer!r} was not reached in the forward pass")

    def _install(self) -> None:
        with self._lock:
            if not self._running:
                modules = [self._module(hook) for hook in self.hooks]
                pairs = zip(modules, self._readers, strict=True)
                self._handles = [module.register_forward_hook(reader) for module, reader in pairs]
            self._running += 1

    def _remove(self) -> None:
        with self._lock:
            self._running -= 1
            if self._running:
                return
            for handle in self._handles:
                handle.remove()

    def _module(self, hook: Hook) -> nn.Module:
        try:
            return self.model.get_submodule(hook.module)
        except AttributeError:
            raise UsageError(f"the network has no layer {hook.module!r} any more") from None

    def _read(self, hook: Hook, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        features: dict[Key, Tensor] | None = getattr(self._thread, "features", None)
        if features is None:  # another thread's pass through the same module
            return

        with torch.no_grad():
            activation = first_tensor(args if hook.input else output)
            if hook.norm:
                # not as a call of the module: hooks on it would take this for the network's own
                activation = self.model.get_submodule(hook.norm).forward(activation)
            if hook.channels_last and activation.dim() == 4:
                activation = activation.permute(0, 3, 1, 2)
            else:
                activation = channels_first(activation, module, self.model)
            if hook.skip:
                activation = activation[:, hook.skip :]

            # pooled at once: the next module may work in place
            if hook.pooled:
                pooled = pool(activation, hook.layer)
                features[hook.layer, hook.pooled] = pooled.clone() if activation.dim() == 2 else pooled
            if hook.spatial_std and (std := spatial_std(activation)) is not None:
                features[hook.layer, Kind.SPATIAL_STD] = std
            if hook.keeps_map:
                features[hook.layer, Kind.MAP] = as_map(activation, hook.layer).clone()


def first_tensor(output: Any) -> Any:
    """A module's output; of a tuple or list, the first item."""
    return output[0] if isinstance(output, tuple | list) and output else output


@torch.no_grad()
def find_module(model: nn.Module, run: Callable[[], object], matches: Callable[[nn.Module, Any], bool]) -> str:
    """Name of the last module in a pass ``run()`` for which ``matches(module, output)``; empty if there is none."""
    name_of_match = ""

    def look(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal name_of_match
        if matches(module, first_tensor(output)):
            name_of_match = name

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(functools.partial(look, name)) for name, module in named]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return name_of_match


def channels_first(output: Tensor, module: nn.Module, model: nn.Module) -> Tensor:
    """Maps (B, H, W, C) -> (B, C, H, W), where the module or the model declares that layout; others as they are."""
    # linear layers and layer norms work on the last axis, so the channels of their maps are there
    formats = (getattr(module, "output_fmt", None), getattr(model, "output_fmt", None))
    channels_last = type(module) in (nn.Linear, nn.LayerNorm) or "NHWC" in formats
    is_map = isinstance(output, Tensor) and output.dim() == 4
    return output.permute(0, 3, 1, 2) if channels_last and is_map else output


def as_map(features: Tensor, layer: str = "") -> Tensor:
    """A map (B, C, H, W) as it is, and tokens (B, N, C) as one, if they fill a square.

    Raises
    ------
    UsageError
        Anything else.
    """
    if isinstance(features, Tensor) and features.dim() == 4:
        return features
    if isinstance(features, Tensor) and features.dim() == 3:
        side = math.isqrt(features.shape[1])
        if side * side == features.shape[1] and side > 1:
            return features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    what = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
    raise UsageError(f"layer {layer!r} gives {what}, and no map of places (B, C, H, W)")


def pool(features: Tensor, layer: str = "") -> Tensor:
    """Global average over space.

    Parameters
    ----------
    features : Tensor of shape (B, C, H, W), (B, N, C) or (B, C)
        A map, tokens, or vectors, which stay as they are.
    layer : str, optional
        What it is called in an error.

    Returns
    -------
    Tensor of shape (B, C)

    Raises
    ------
    UsageError
        Anything else.
    """
    if not isinstance(features, Tensor) or features.dim() not in (2, 3, 4):
        what = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise UsageError(f"layer {layer!r} gives {what}; featdiff needs (B, C, H, W), (B, N, C) or (B, C)")
    if features.dim() == 4:
        return features.mean((2, 3))
    if features.dim() == 3:
        return features.mean(1)
    return features


def spatial_std(features: Tensor) -> Tensor | None:
    """Standard deviation of each channel over space: (B, C, H, W) or (B, N, C) -> (B, C); None for vectors (B, C)."""
    if features.dim() == 2:
        return None
    axes = (2, 3) if features.dim() == 4 else (1,)

    # as std(correction=0), which torch computes 15 times more slowly on a CPU
    values = features.float()
    centred = values - values.mean(axes, keepdim=True)
    return centred.square().mean(axes).sqrt()
