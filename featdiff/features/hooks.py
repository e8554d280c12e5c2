"""Pooled features from a module's own forward pass, by hooks that are there only while it runs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn

from ..exceptions import UsageError

#: ``<layer>:std`` is the spatial deviation of a layer's channels.
SPREAD = ":std"


@dataclass(frozen=True)
class Tap:
    """What is read at ``module``: what it gives, or (``incoming``) what it is given.

    The mean over space is kept under ``mean``, the deviation under ``spread``, if these have a name. The first ``skip``
    tokens (class tokens) are left out.
    """

    module: str
    mean: str = ""
    spread: str = ""
    incoming: bool = False
    skip: int = 0


class Taps:
    """Reads layers of a module while it runs, with any number of threads at once.

    Hooks are in place only while :meth:`recording`, once for all threads, and each thread sees what it ran itself.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap]) -> None:
        self.model, self.taps = model, list(taps)
        self._prepare()

    def _prepare(self) -> None:
        # the same functions at every pass: torch.compile would work anew for others
        self._readers = [functools.partial(self._read, tap) for tap in self.taps]
        self._handles: list[Any] = []
        self._running = 0
        self._lock = threading.Lock()
        self._here = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "taps": self.taps}  # locks can be neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Collect pooled layers (B, C) by name from the passes that this thread makes meanwhile.

        Raises
        ------
        UsageError
            A layer is gone, or, at the end, was not reached.
        """
        outer, found = getattr(self._here, "found", None), dict[str, Tensor]()
        with self._lock:
            if not self._running:
                modules = [self._module(tap) for tap in self.taps]
                pairs = zip(modules, self._readers, strict=True)
                self._handles = [module.register_forward_hook(reader) for module, reader in pairs]
            self._running += 1
        self._here.found = found
        try:
            yield found
        finally:
            self._here.found = outer
            with self._lock:
                self._running -= 1
                if not self._running:
                    for handle in self._handles:
                        handle.remove()
        for tap in self.taps:
            if tap.mean and tap.mean not in found:
                raise UsageError(f"layer {tap.mean!r} was not reached in the forward pass")

    def _module(self, tap: Tap) -> nn.Module:
        try:
            return self.model.get_submodule(tap.module)
        except AttributeError:
            raise UsageError(f"the network has no layer {tap.module!r} any more") from None

    def _read(self, tap: Tap, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = getattr(self._here, "found", None)
        if found is None:  # another thread's pass through the same module
            return
        with torch.no_grad():
            first = first_tensor(args if tap.incoming else output)
            features = channels_first(first, module, self.model)
            if tap.skip:
                features = features[:, tap.skip :]
            # pooled at once: the next module may work in place
            if tap.mean:
                found[tap.mean] = pool(features, tap.mean).clone()
            if tap.spread:
                found |= spread(features, tap.spread.removesuffix(SPREAD))


def first_tensor(output: Any) -> Any:
    """What a module gives; of several things, the first."""
    return output[0] if isinstance(output, tuple | list) and output else output


@torch.no_grad()
def find_module(model: nn.Module, run: Callable[[], object], fits: Callable[[nn.Module, Any], bool]) -> str:
    """Name of the last module in a pass ``run`` for which ``fits(module, output)``; empty if there is none."""
    found = ""

    def look(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal found
        if fits(module, first_tensor(output)):
            found = name

    handles = [m.register_forward_hook(functools.partial(look, n)) for n, m in model.named_modules() if n]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def channels_first(output: Tensor, module: nn.Module, model: nn.Module) -> Tensor:
    """Maps (B, H, W, C) -> (B, C, H, W), where module or model say that theirs are; others as they are."""
    # linear layers and layer norms work on the last axis, so a map that leaves them has its channels there
    formats = (getattr(module, "output_fmt", None), getattr(model, "output_fmt", None))
    nhwc = type(module) in (nn.Linear, nn.LayerNorm) or "NHWC" in formats
    return output.movedim(-1, 1) if nhwc and isinstance(output, Tensor) and output.dim() == 4 else output


def pool(features: Tensor, name: str = "") -> Tensor:
    """Global average: (B, C, H, W) maps or (B, N, C) tokens -> (B, C); vectors stay as they are."""
    if not isinstance(features, Tensor) or features.dim() not in (2, 3, 4):
        what = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise UsageError(f"layer {name!r} gives {what}; featdiff needs (B, C, H, W), (B, N, C) or (B, C)")
    if features.dim() == 4:
        return reduce(features, "b c h w -> b c", "mean")
    return reduce(features, "b n c -> b c", "mean") if features.dim() == 3 else features


def spread(features: Tensor, name: str) -> dict[str, Tensor]:
    """Deviations over space: (B, C, H, W) or (B, N, C) -> {"<name>:std": (B, C)}; nothing for vectors."""
    if features.dim() == 2:
        return {}
    places = (2, 3) if features.dim() == 4 else (1,)
    # as std(correction=0), which torch computes 15 times more slowly on a CPU
    centred = features.float() - features.float().mean(places, keepdim=True)
    return {name + SPREAD: centred.square().mean(places).sqrt()}
