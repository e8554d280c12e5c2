"""The part of a guard that torch.compile must not see: hooks around the classifier's own pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..exceptions import UsageError, first_line
from ..features.extractor import FeatureExtractor
from ..features.layout import Key


def _run(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return network(*args, **kwargs)


class _Recording:
    """The coming and going of hooks, out of sight of torch.compile; tells why a pass failed where that is known."""

    def __init__(self, extractor: FeatureExtractor, images: Tensor, classifier: nn.Module) -> None:
        self._context, self._network, self._images = extractor.recording(), extractor.model, images
        self._classifier = classifier

    @torch.compiler.disable
    def __enter__(self) -> dict[Key, Tensor]:
        return self._context.__enter__()

    @torch.compiler.disable
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            self._context.__exit__(kind, error, trace)
        except UsageError as missed:  # a layer was not reached
            if self._is_compiled:
                raise UsageError(f"{missed}: compile the guard, not the classifier inside it") from None
            raise
        precisions, given = _precisions(self._network), self._images.dtype
        if not isinstance(error, RuntimeError) or "type" not in str(error):
            return
        if precisions and given not in precisions:
            wanted = " and ".join(sorted(str(precision).removeprefix("torch.") for precision in precisions))
            raise UsageError(
                f"the images are {str(given).removeprefix('torch.')}, the classifier's weights {wanted}: convert "
                f"either, or use torch.autocast ({first_line(error)})"
            ) from error

    @property
    def _is_compiled(self) -> bool:
        """Whether torch.compile took the classifier, or what it is in, before the guard did."""
        compiled = torch._dynamo.OptimizedModule
        return any(isinstance(m, compiled) or m._compiled_call_impl is not None for m in self._classifier.modules())


def _unwrapped(classifier: nn.Module) -> nn.Module:
    """The network inside torch.compile, DataParallel and DistributedDataParallel."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(classifier, (torch._dynamo.OptimizedModule, *wrappers)):
        classifier = classifier.module if isinstance(classifier, wrappers) else classifier._orig_mod
    return classifier


def _precisions(classifier: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in classifier.parameters() if p.is_floating_point()}
