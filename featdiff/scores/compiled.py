"""Heads as one compiled graph, for a GPU: to start their hundreds of small kernels takes longer than to run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .fused import Heads

# The largest difference of a score, in in-domain standard deviations.
_MOST_CHANGE = 1e-4

#: Rows of features and rows of the bank to leave out -> scores, as :meth:`Heads.forward`.
Run = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class CompiledHeads:
    """Heads that are compiled when first used, for any number of images; they give what the heads give.

    The first scores are compared with those of the heads as they are, which stay in use where they cannot be compiled
    (FAISS) or give anything else.

    Parameters
    ----------
    heads : Heads
        Fitted; later changes of their weights count.

    Attributes
    ----------
    works : bool or None
        Whether the graph is used; None: nobody knows yet.
    """

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        self.works: bool | None = None
        self._run: Run | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, features: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`featdiff.scores.fused.Heads.forward`."""
        if self.works is False:
            return self.heads(features, own)
        features = features.clone() if features.is_inference() else features  # the compiler refuses those
        if self.works:
            return self._as_graph(features, own)

        expected = self.heads(features, own)
        try:
            given = self._as_graph(features, own)
            differences = [(ours - theirs).abs().max() for ours, theirs in zip(given, expected, strict=True)]
            self.works = all(bool(difference <= _MOST_CHANGE) for difference in differences)
        except Exception:  # compilers fail in many ways
            self.works = False
        return expected

    def _as_graph(self, features: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._run is None:
            self._run = torch.compile(self.heads, fullgraph=True, dynamic=False)
        for tensor in (features, own):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self._run(features, own)

    def __getstate__(self) -> dict[str, Any]:
        return {"heads": self.heads, "works": None, "_run": None}  # a copy compiles its own
