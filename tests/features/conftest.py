"""The seeded weights of ``test_resnet``, as tensors and as a fingerprint, and a disk that fills."""

from __future__ import annotations

from collections.abc import Callable
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


@pytest.fixture
def small_disk(tmp_path: Path, mounted: Callable[[Path, str], Path]) -> Path:
    """A real file system of 256 KiB."""
    return mounted(tmp_path / "disk", "256k")
