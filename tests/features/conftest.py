"""A disk that fills."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path, mounted: Callable[[Path, str], Path]) -> Path:
    """A real file system of 256 KiB."""
    return mounted(tmp_path / "disk", "256k")
