"""How a detector runs: settings that are no part of a model."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ..data.decoding import MAX_PIXELS
from ..data.limits import MAX_BYTES
from ..features.engines import AUTO, ENGINES
from ..files.cache import default_cache
from ..runtime.allocator import keep_freed_memory
from ..runtime.devices import resolve_device
from .checks import check_choice, check_path, check_whole


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a detector runs; it is not saved, and may differ wherever a model is loaded.

    Parameters
    ----------
    device : str, default "auto"
        ``auto`` (CUDA, then MPS, then the CPU), ``cpu``, ``cuda``, ``cuda:1`` ...
    image_batch : int, default 32
        Images per backbone pass.
    engine : {"auto", "torch", "openvino", "onnxruntime", "compile"}, default "auto"
        What runs the backbone on a CPU (:mod:`featdiff.features.engines`). ``auto``: for 1,000 images and more, an
        engine that is installed, agrees with PyTorch and is faster; else PyTorch.
    workers : int, optional
        Decoding threads; default: one per CPU that this process may use, at most 16.
    max_pixels : int, default 89478485
        The largest picture that is opened.
    max_bytes : int, default 512000000
        The largest file, or member of an archive, that is read.
    cache : path, optional
        Folder of the feature store; default ``$FEATDIFF_CACHE`` or featdiff's folder in the user's cache.

    Raises
    ------
    UsageError
        A value outside its range.
    """

    device: str = "auto"
    image_batch: int = 32
    engine: str = AUTO
    workers: int | None = None
    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES
    cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name in ("image_batch", "max_pixels", "max_bytes"):
            check_whole(name, getattr(self, name))
        check_whole("workers", self.workers, optional=True)
        check_path("cache", self.cache)
        check_choice("engine", self.engine, ENGINES)

    @property
    def cache_folder(self) -> Path:
        """Where features are kept."""
        return Path(self.cache) if self.cache else default_cache()

    @property
    def place(self) -> torch.device:
        """The device that ``device`` means here (``UsageError`` if there is none); on the CPU, freed memory is kept."""
        device = resolve_device(self.device)
        if device.type == "cpu":
            keep_freed_memory()
        return device


#: Names of the settings that say how a detector runs.
RUNTIME = tuple(item.name for item in fields(Runtime))
