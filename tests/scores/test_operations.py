"""How many operations scoring takes and how much memory: what makes it slow shows here, on any machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from featdiff.features.layout import PRE_LOGITS, FeatureLayout, Kind
from featdiff.scores.diffusion import Diffusion
from featdiff.scores.fused import Heads
from featdiff.scores.registry import Options, make_scores
from featdiff.verdicts.calibration import Calibration

#: The layers of the default backbone, a quarter as wide.
STAGES = {"blocks.0": 4, "blocks.1": 6, "blocks.2": 10, "blocks.4": 28, "blocks.6": 80}
LAYOUT = FeatureLayout.of(
    {
        **{(name, Kind.MEAN): width for name, width in STAGES.items()},
        (PRE_LOGITS, Kind.PRE_LOGITS): 320,
        ("blocks.6", Kind.SPATIAL_STD): 80,
        (PRE_LOGITS, Kind.SPATIAL_STD): 320,
    }
)
BANK = 2000
#: Of all heads, for one image and for a batch of any size; views are not counted.
OPERATIONS, OPERATIONS_OF_MANY = 320, 360


class Counted(TorchDispatchMode):
    """Counts operations, and the bytes of what they return that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            if isinstance(result, Tensor):
                self.largest = max(self.largest, result.nbytes)
        return result


def features(rows: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, LAYOUT.width, generator=source) + 0.5).clamp_min(0) + 1e-3


def fitted() -> Heads:
    sizes = {"joint": False, "hidden_ratio": 2.0, "hidden_max": 320, "blocks": 3, "timesteps": 100}
    diffusion = Diffusion(LAYOUT, **sizes, start_times=(70, 95), draws=2, stride=None, seed=0)  # type: ignore[arg-type]
    heads = Heads(diffusion, make_scores("neighbors", LAYOUT, Options(BANK)))
    for score in heads.members:
        score.fit(features(BANK))  # type: ignore[operator]
    return heads


class OnOneDevice(TorchDispatchMode):
    """Refuses operations on tensors of several devices, but for single numbers: these would have to travel."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor) and leaf.dim()]
        assert len({tensor.device for tensor in tensors}) <= 1, func
        return result


def counted(heads: Heads, rows: Tensor) -> Counted:
    with torch.inference_mode():
        heads(rows)  # builds what is kept
        with Counted() as counted:
            heads(rows)
    return counted


def test_one_image_takes_few_operations_and_no_copy_of_the_bank() -> None:
    found = counted(fitted(), features(1, seed=1))
    assert found.operations <= OPERATIONS
    assert found.largest < BANK * 80  # bytes; the shortest vectors of the bank take twice as many


def test_operations_do_not_grow_with_the_batch() -> None:
    heads = fitted()
    for count in (32, 256):
        assert counted(heads, features(count, seed=1)).operations <= OPERATIONS_OF_MANY


def test_nothing_is_looked_at_or_copied_while_a_gpu_scores() -> None:
    """Tensors on the device ``meta`` have no values: what would make the host wait for a GPU fails there."""
    heads = fitted()
    heads(features(1))  # builds the indices
    indices = [score._index[0].to("meta") for score in heads.members]  # type: ignore[union-attr]
    heads.to("meta")
    for score, index in zip(heads.members, indices, strict=True):
        score._index = (index,)  # type: ignore[assignment]
    calibration = Calibration(np.random.default_rng(0).normal(size=200))
    calibration.flags(torch.empty(1, device="meta"), 0.05)  # takes its scores there, once

    for count in (1, 64):
        rows = torch.empty(count, LAYOUT.width, device="meta")
        heads(rows)  # computes constants
        with OnOneDevice():
            score, layers = heads(rows)
            heads(rows, torch.empty(count, dtype=torch.int64, device="meta"))
            _, is_ood = calibration.flags(score, 0.05)
        assert (score.shape, layers.shape, is_ood.shape) == ((count,), (count, len(STAGES)), (count,))

    with pytest.raises(RuntimeError, match="meta"):  # as it should, had anything been looked at
        bool(score.sum() > 0)
