"""Fingerprints: every weight counts, the memory layout does not."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from weights_files import KERNEL

from featdiff.features.backbones import load_backbone
from featdiff.features.networks import fingerprint


def test_fingerprint_follows_every_weight(seeded_backbone: Path, seeded_sha256: str) -> None:
    model = load_backbone("test_resnet", weights=seeded_backbone).model
    assert fingerprint(model) == seeded_sha256
    for name in (KERNEL, "bn1.running_var", "layer4.0.bn2.num_batches_tracked"):
        tensor = dict(model.state_dict())[name].view(-1)
        before = tensor[-1].clone()
        tensor[-1] = torch.nextafter(before, before + 1) if before.is_floating_point() else before + 1
        assert fingerprint(model) != seeded_sha256, name
        tensor[-1] = before
    assert fingerprint(model) == seeded_sha256


def test_fingerprint_tells_names_shapes_and_types_apart() -> None:
    def holder(name: str, value: Tensor) -> torch.nn.Module:
        module = torch.nn.Module()
        module.register_buffer(name, value)
        return module

    values = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(2, dtype=torch.float64),
    ]
    prints = {fingerprint(holder("a", value)) for value in values} | {fingerprint(holder("b", values[0]))}
    assert len(prints) == 5
    columns = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(holder("a", columns.T.contiguous().T)) == fingerprint(holder("a", columns))  # memory order


def test_fingerprint_does_not_depend_on_the_memory_layout(seeded_sha256: str, seeded_backbone: Path) -> None:
    model = load_backbone("test_resnet", weights=seeded_backbone).model
    assert fingerprint(model.to(memory_format=torch.channels_last)) == seeded_sha256  # type: ignore[call-overload]
