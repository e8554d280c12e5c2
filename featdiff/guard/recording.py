"""Hooks around a classifier's own forward pass, kept outside torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..exceptions import UsageError, first_line
from ..features.extractor import FeatureExtractor
from ..features.layout import FeatureLayout, Key


def _run(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return network(*args, **kwargs)


class _Recording:
    """Installs and removes hooks outside torch.compile, and explains a failed pass where the cause is known.

    Parameters
    ----------
    extractor : FeatureExtractor
        Reads layers of the classifier.
    images : Tensor of shape (B, C, H, W)
        Input of the pass.
    classifier : nn.Module
        As the user passed it, possibly wrapped.
    """

    def __init__(self, extractor: FeatureExtractor, images: Tensor, classifier: nn.Module) -> None:
        self._context = extractor.recording()
        self._network = extractor.model
        self._images = images
        self._classifier = classifier

    @torch.compiler.disable
    def __enter__(self) -> dict[Key, Tensor]:
        return self._context.__enter__()

    @torch.compiler.disable
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            self._context.__exit__(kind, error, trace)
        except UsageError as unreached:  # a layer was not reached
            if self._is_compiled:
                raise UsageError(f"{unreached}: compile the guard, not the classifier inside it") from None
            raise

        if isinstance(error, RuntimeError) and "type" in str(error):
            self._check_precision(error)

    def _check_precision(self, error: RuntimeError) -> None:
        """Raise ``UsageError`` if the pass failed because images and weights differ in precision."""
        weights = _precisions(self._network)
        images = self._images.dtype
        if not weights or images in weights:
            return
        names = " and ".join(sorted(_name(precision) for precision in weights))
        raise UsageError(
            f"the images are {_name(images)}, the classifier's weights {names}: convert either, or use "
            f"torch.autocast ({first_line(error)})"
        ) from error

    @property
    def _is_compiled(self) -> bool:
        """Whether the classifier, or a module inside it, was compiled before the guard was made."""
        for module in self._classifier.modules():
            if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
                return True
        return False


def _unwrapped(classifier: nn.Module) -> nn.Module:
    """The network inside torch.compile, DataParallel and DistributedDataParallel."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(classifier, wrappers):
            classifier = classifier.module
        elif isinstance(classifier, torch._dynamo.OptimizedModule):
            classifier = classifier._orig_mod
        else:
            return classifier


def check_finite(features: Tensor, images: Tensor, layout: FeatureLayout, classifier: nn.Module) -> None:
    """Refuse features (B, D) with NaN or infinite values, and say where they come from (``UsageError``)."""
    # the sum takes one pass, but may overflow where all are finite
    if features.sum().isfinite() or features.isfinite().all():
        return

    finite = features.isfinite()
    bad = (~finite.all(1)).nonzero().flatten().tolist()
    where = ", ".join(map(str, bad[:5])) + (" ..." if len(bad) > 5 else "")
    if not torch.isfinite(images[bad[0]]).all():
        raise UsageError(f"images with NaN or infinite pixels in the batch, rows {where}: leave them out")

    column = int((~finite[bad[0]]).nonzero()[0])
    layer = layout.named(column).name
    hint = "; float16 ends at 65,504: use bfloat16" if torch.float16 in _precisions(classifier) else ""
    raise UsageError(f"layer {layer!r} gives NaN or infinite values for rows {where} of the batch{hint}")


def _precisions(network: nn.Module) -> set[torch.dtype]:
    """Precisions of a network's floating-point weights."""
    return {weight.dtype for weight in network.parameters() if weight.is_floating_point()}


def _name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")
