"""A saved and an exported tiny model, pictures, and a server for each model that many tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_servers import Server

from featdiff import Detector
from featdiff.export.export import export


@pytest.fixture(scope="session")
def exported_model(tiny_detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported tiny detector, whose server starts fast; do not change it."""
    folder = tmp_path_factory.mktemp("exported-for-serving")
    export(tiny_detector, folder, ["onnx"])
    return folder


@pytest.fixture(scope="session")
def pictures(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 tiles, 10 digits and 2 files that are no images."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, count in (("test", 20), ("digits", 10)):
        for file in sorted(sample_folders[name].iterdir())[:count]:
            shutil.copy(file, folder)
    tile = next(folder.glob("china*"))
    (folder / "cut.png").write_bytes(tile.read_bytes()[:200])
    (folder / "words.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="session")
def server(tiny_model: Path) -> Iterator[Server]:
    """Serves the saved model; by PyTorch, as the command line scores so few images."""
    with Server(tiny_model, "--engine", "torch", "--name", "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def small(exported_model: Path) -> Iterator[Server]:
    """Serves the exported model, takes little on, and has a second for each request."""
    options = ("--max-queue", 40, "--max-batch", 1, "--timeout", 1, "--max-request", 200_000)
    with Server(exported_model, *options) as running:
        yield running
