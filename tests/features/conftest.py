"""The seeded weights of ``test_resnet``, as tensors and as a fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from weights_files import State

from featdiff.features.backbones import load_backbone


@pytest.fixture
def state(seeded_backbone: Path) -> State:
    """The tensors of the seeded weights file, with its classifier ``fc`` of 1000 classes."""
    return load_file(seeded_backbone)


@pytest.fixture(scope="session")
def seeded_sha256(seeded_backbone: Path) -> str:
    return load_backbone("test_resnet", weights=seeded_backbone).fingerprint
