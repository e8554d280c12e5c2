"""Runs a backbone's forward pass in another engine than eager PyTorch, where that agrees with PyTorch and is faster.

A pass is traced once (:mod:`featdiff.features.conversions`). The engine folds batch norms, fuses operations and plans
its memory. A trace may hold numbers that belong to one size of images only, so each new size is compared with PyTorch
first; what disagrees runs in PyTorch.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from ..exceptions import FeatdiffError, UsageError, first_line
from .conversions import COMPILE, ONNXRUNTIME, OPENVINO, has_bfloat16, running
from .layout import Key

#: Chooses among those that are installed.
AUTO = "auto"
#: PyTorch as it is.
TORCH = "torch"
#: What ``engine`` may be.
ENGINES = (AUTO, TORCH, OPENVINO, ONNXRUNTIME, COMPILE)
# Packages that each needs, and the extra that installs them.
_PACKAGES = {OPENVINO: ("openvino",), ONNXRUNTIME: ("onnxruntime", "onnx"), COMPILE: ()}
_EXTRAS = {OPENVINO: "openvino", ONNXRUNTIME: "onnx"}
# What ``auto`` tries; compiling takes a compiler, and half a minute for each size of images.
_TRIED = (OPENVINO, ONNXRUNTIME)
# Sizes of images that are compiled; others run in PyTorch. One graph for all sizes is no way out: its symbolic heights
# and widths keep the compiler busy for more than six minutes (padding as TensorFlow's, PyTorch 2.14).
_MOST_COMPILED = 4
# Graphs that may come of these: for one image, for several, and for so many that indices need more bits.
_GRAPHS = 3 * _MOST_COMPILED
# Two passes agree if no number differs by more than this share of the largest of its layer.
_TOLERANCE = 1e-4
_TOLERANCE_OF_BFLOAT16 = 0.2
# An engine must be that much faster to be worth a difference in the last digits.
_FASTER = 1.1
# How often a pass of how many images is timed.
_ROUNDS = 2
_TIMED = 8

#: Preprocessed images (B, C, H, W) -> vectors and maps by layer and kind.
Read = Callable[[Tensor], dict[Key, Tensor]]


@dataclass(frozen=True)
class Pass:
    """A backbone's forward pass in PyTorch.

    Attributes
    ----------
    network : nn.Module
        Owns the weights.
    read : callable
        The pass as it runs.
    traced : callable
        The pass as tracers follow it: the same in float32.
    bfloat16 : bool
        Whether ``read`` computes in bfloat16 (on a GPU: in float16), so that another engine should, too.
    folder : Path, optional
        Where the files of engines are kept for this very pass.
    """

    network: nn.Module
    read: Read
    traced: Read
    bfloat16: bool
    folder: Path | None


@dataclass(frozen=True)
class Choice:
    """Which engine runs the backbone, and why.

    Attributes
    ----------
    engine : Engine, optional
        None: PyTorch.
    note : str
        In a few words.
    """

    engine: Engine | None
    note: str


class Engine:
    """A traced pass in another engine; it gives what PyTorch gives.

    All but ``compile`` hold a copy of the weights, and are for images on the CPU. Several threads may use it at once.

    Parameters
    ----------
    name : {"openvino", "onnxruntime", "compile"}
    forward : Pass
        What it runs.
    example : Tensor of shape (B, C, H, W)
        Images to trace it with.

    Attributes
    ----------
    label : str
        The name and the version of the engine.

    Raises
    ------
    UsageError
        It is not installed.
    FeatdiffError
        The pass cannot be traced or converted, or gives other features.
    """

    def __init__(self, name: str, forward: Pass, example: Tensor) -> None:
        need(name)
        if forward.bfloat16 and not has_bfloat16(name):
            raise FeatdiffError(f"{name} has no bfloat16 on this processor")
        self.name = name
        self.label = f"{name} {version(name if name != COMPILE else 'torch')}"
        self._forward = forward
        self._agrees: dict[tuple[int, ...], bool] = {}
        self._lock = threading.Lock()

        self.keys = list(forward.read(example[:1]))
        folder = forward.folder / self.label.replace(" ", "-") if forward.folder else None
        try:
            if name == COMPILE:
                self._run = _compiled(Traced(forward.network, forward.read))
            else:
                self._run = running(name, Traced(forward.network, forward.traced), example, forward.bfloat16, folder)
            agrees = self.agrees(example)
        except Exception as error:  # converters fail in many ways
            raise FeatdiffError(f"{name} cannot run this backbone: {first_line(error)}") from None
        if not agrees:
            raise FeatdiffError(f"{name} gives other features than PyTorch for this backbone")

    def read(self, pixels: Tensor) -> dict[Key, Tensor]:
        """Preprocessed images (B, C, H, W) -> vectors and maps by layer and kind, float32."""
        return self._outputs(pixels) if self.agrees(pixels) else self._forward.read(pixels)

    def agrees(self, pixels: Tensor) -> bool:
        """Whether it gives what PyTorch gives for images of this size, found with the first of them."""
        size = tuple(pixels.shape[1:])
        with self._lock:
            if size in self._agrees:
                return self._agrees[size]
            if self.name == COMPILE and len(self._agrees) >= _MOST_COMPILED:
                return False
            few = pixels[: 2 if self.name == COMPILE else 1]  # for one alone a graph of its own would be compiled
            if not torch.isfinite(few).all():  # says nothing about others of its size
                return False
            expected = self._forward.read(few)
            tolerance = _TOLERANCE_OF_BFLOAT16 if self._forward.bfloat16 else _TOLERANCE
            try:
                self._agrees[size] = _alike(expected, self._outputs(few), tolerance)
            except Exception:  # a trace may not take this size at all
                self._agrees[size] = False
            return self._agrees[size]

    def _outputs(self, pixels: Tensor) -> dict[Key, Tensor]:
        return dict(zip(self.keys, self._run(pixels.contiguous()), strict=True))


def _compiled(traced: Traced) -> Callable[[Tensor], Sequence[Tensor]]:
    """A pass that is compiled anew for each size of images, and for any number of them."""
    run = torch.compile(traced, dynamic=False)

    def outputs(pixels: Tensor) -> tuple[Tensor, ...]:
        torch._dynamo.maybe_mark_dynamic(pixels, 0)
        with torch._dynamo.config.patch(recompile_limit=_GRAPHS):
            found: tuple[Tensor, ...] = run(pixels)
        return found

    return outputs


class Traced(nn.Module):
    """A pass as tracers want it: a module that gives a tuple.

    Parameters
    ----------
    network : nn.Module
        Owns the weights.
    read : callable
        Images (B, C, H, W) -> vectors and maps, which become the tuple in their order.
    """

    def __init__(self, network: nn.Module, read: Read) -> None:
        super().__init__()
        self.network = network  # tracers want to find its weights
        self.read = read
        self.training = False  # exporters put all of it back into the mode that they find here

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(values.float() for values in self.read(pixels).values())


def choose(wanted: str, forward: Pass, pixels: Tensor) -> Choice:
    """The engine for a backbone: the fastest of those that are installed and agree with PyTorch, if it is faster.

    Parameters
    ----------
    wanted : str
        One of :data:`ENGINES`.
    forward : Pass
        The backbone's pass in PyTorch.
    pixels : Tensor of shape (B, C, H, W)
        Some real images, where the network is.

    Returns
    -------
    Choice
        PyTorch, where an engine fails or disagrees: the note says so.

    Raises
    ------
    UsageError
        The wanted engine is not installed.
    """
    if wanted == TORCH:
        return Choice(None, "torch, as asked")
    names = [name for name in _TRIED if installed(name)] if wanted == AUTO else [wanted]
    if not names:
        return Choice(None, "torch, for no other engine is installed (pip install 'featdiff[openvino]')")

    tried = [_tried(name, forward, pixels) for name in names]
    engines = [engine for engine, _ in tried if engine]
    if not engines:
        return Choice(None, f"torch, for {'; '.join(reason for _, reason in tried)}")

    gains = _gains(forward.read, [engine.read for engine in engines], pixels[:_TIMED])
    gain, engine = max(zip(gains, engines, strict=True), key=lambda pair: pair[0])
    others = [f"{other.name} {slower:.1f} x" for slower, other in zip(gains, engines, strict=True) if other != engine]
    times = f"{gain:.1f} x as fast as torch{f' ({others[0]})' if others else ''}"
    if wanted == AUTO and gain < _FASTER:
        return Choice(None, f"torch, for {engine.name} is {times}")
    return Choice(engine, f"{engine.label}, {times}")


def again(name: str, forward: Pass, pixels: Tensor) -> Choice:
    """The same engine for what a pass gives now, or PyTorch if that fails; as :func:`choose`, but not timed."""
    engine, reason = _tried(name, forward, pixels)
    return Choice(engine, engine.label if engine else f"torch, for {reason}")


def _tried(name: str, forward: Pass, pixels: Tensor) -> tuple[Engine | None, str]:
    """An engine, or why there is none."""
    try:
        return Engine(name, forward, pixels), ""
    except UsageError:
        raise
    except FeatdiffError as error:
        return None, str(error)


def installed(name: str) -> bool:
    """Whether an engine's packages are there."""
    return all(importlib.util.find_spec(package) is not None for package in _PACKAGES[name])


def need(name: str) -> None:
    """Raise ``UsageError`` unless an engine's packages are there."""
    if not installed(name):
        remedy = f"pip install 'featdiff[{_EXTRAS[name]}]'"
        raise UsageError(f"the engine {name} is not installed: {remedy}, or drop engine", argument="engine")


# ---- compare ----


def _alike(expected: Mapping[Key, Tensor], given: Mapping[Key, Tensor], tolerance: float) -> bool:
    """Whether two passes gave the same, up to rounding."""
    for key, values in expected.items():
        values = values.float()
        if values.shape != given[key].shape or not torch.isfinite(given[key]).all():
            return False
        largest = values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)
        if (given[key] - values).abs().max() > tolerance * largest:
            return False
    return True


def _gains(before: Read, after: Sequence[Read], pixels: Tensor) -> list[float]:
    """How many times as fast each pass is as the one before, by the best times, taken in turns."""
    reads = [before, *after]
    best = [float("inf")] * len(reads)
    for _ in range(_ROUNDS):
        for i, read in enumerate(reads):
            start = time.perf_counter()
            read(pixels)
            if pixels.is_cuda:
                torch.cuda.synchronize(pixels.device)
            best[i] = min(best[i], time.perf_counter() - start)
    return [best[0] / taken for taken in best[1:]]
