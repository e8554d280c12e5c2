"""Runs a backbone's forward pass in another engine than eager PyTorch, where that agrees with PyTorch and is faster.

A pass is traced once. The engine folds batch norms, fuses operations and plans its memory. A trace may hold numbers
that belong to one size of images only, so each new size is compared with PyTorch first; what disagrees runs in PyTorch.
"""

from __future__ import annotations

import importlib.util
import io
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor, nn

from ..exceptions import FeatdiffError, UsageError, first_line
from .layout import Key

#: Chooses among those that are installed.
AUTO = "auto"
#: PyTorch as it is.
TORCH = "torch"
OPENVINO = "openvino"
ONNXRUNTIME = "onnxruntime"
COMPILE = "compile"
#: What ``engine`` may be.
ENGINES = (AUTO, TORCH, OPENVINO, ONNXRUNTIME, COMPILE)
# Packages that each needs, and the extra that installs them.
_PACKAGES = {OPENVINO: ("openvino",), ONNXRUNTIME: ("onnxruntime", "onnx"), COMPILE: ()}
_EXTRAS = {OPENVINO: "openvino", ONNXRUNTIME: "onnx"}
# What ``auto`` tries, the faster one first; compiling takes a compiler and most of a minute.
_TRIED = (OPENVINO, ONNXRUNTIME)
# Two passes agree if no number differs by more than this share of the largest of its layer.
_TOLERANCE = 1e-4
# An engine must be that much faster to be worth a difference in the last digits.
_FASTER = 1.1
# How often a pass of how many images is timed.
_ROUNDS = 2
_TIMED = 8

#: Preprocessed images (B, C, H, W) -> vectors and maps by layer and kind.
Read = Callable[[Tensor], dict[Key, Tensor]]
# The same with arrays, in a fixed order.
_Run = Callable[[np.ndarray], Sequence[np.ndarray]]


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
    """A traced pass in another engine; it gives what ``read`` gives.

    It holds a copy of the weights, and is for images on the CPU. Several threads may use it at once.

    Parameters
    ----------
    name : {"openvino", "onnxruntime", "compile"}
    network : nn.Module
        The backbone, which owns the weights.
    read : callable
        Its pass in PyTorch, in eval mode.
    example : Tensor of shape (B, C, H, W)
        Images to trace it with, two at least.

    Attributes
    ----------
    label : str
        The name and the version of the engine.

    Raises
    ------
    UsageError
        It is not installed.
    FeatdiffError
        The pass cannot be traced or converted.
    """

    def __init__(self, name: str, network: nn.Module, read: Read, example: Tensor) -> None:
        need(name)
        self.name = name
        self.label = f"{name} {version(name if name != COMPILE else 'torch')}"
        self._network = network
        self._read = read
        self._agrees: dict[tuple[int, ...], bool] = {}
        self._lock = threading.Lock()

        traced = Pass(network, read)
        example = example if len(example) > 1 else example.repeat(2, 1, 1, 1)  # tracers take 1 for a constant
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tracers warn of sizes, which are compared below
                traced(example)
                self.keys = list(traced.keys)
                self._run = _BUILDERS[name](traced, example)
            agrees = self.agrees(example)
        except Exception as error:  # converters fail in many ways
            raise FeatdiffError(f"{name} cannot run this backbone: {first_line(error)}") from None
        if not agrees:
            raise FeatdiffError(f"{name} gives other features than PyTorch for this backbone")

    def read(self, pixels: Tensor) -> dict[Key, Tensor]:
        """Preprocessed images (B, C, H, W) on the CPU -> vectors and maps by layer and kind, float32."""
        return self._outputs(pixels) if self.agrees(pixels) else self._read(pixels)

    def agrees(self, pixels: Tensor) -> bool:
        """Whether it gives what PyTorch gives for images of this size, found with the first of them."""
        size = tuple(pixels.shape[1:])
        with self._lock:
            if size in self._agrees:
                return self._agrees[size]
            if not torch.isfinite(pixels[:1]).all():  # says nothing about others of its size
                return False
            expected = self._read(pixels[:1])
            try:
                self._agrees[size] = _alike(expected, self._outputs(pixels[:1]))
            except Exception:  # a trace may not take this size at all
                self._agrees[size] = False
            return self._agrees[size]

    def rebuilt(self, example: Tensor) -> Choice:
        """The same engine for what the pass gives now, or PyTorch if that fails."""
        try:
            return Choice(Engine(self.name, self._network, self._read, example), self.label)
        except FeatdiffError as error:
            return Choice(None, f"torch, for {error}")

    def _outputs(self, pixels: Tensor) -> dict[Key, Tensor]:
        arrays = self._run(pixels.contiguous().numpy())
        return {key: torch.from_numpy(values) for key, values in zip(self.keys, arrays, strict=True)}


class Pass(nn.Module):
    """A pass as tracers want it: a tuple of outputs, in the order of ``keys``."""

    def __init__(self, network: nn.Module, read: Read) -> None:
        super().__init__()
        self.network = network  # tracers want to find its weights
        self.read = read
        self.keys: list[Key] = []

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        features = self.read(pixels)
        self.keys = list(features)
        return tuple(values.float() for values in features.values())


def choose(wanted: str, network: nn.Module, read: Read, pixels: Tensor) -> Choice:
    """The engine for a backbone: the first that is installed and agrees with PyTorch, if it is faster.

    Parameters
    ----------
    wanted : str
        One of :data:`ENGINES`.
    network, read
        The backbone, and its pass in PyTorch; see :class:`Engine`.
    pixels : Tensor of shape (B, C, H, W)
        Some real images, on the CPU.

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

    reasons = []
    for name in names:
        try:
            engine = Engine(name, network, read, pixels)
        except UsageError:
            raise
        except FeatdiffError as error:
            reasons.append(str(error))
            continue
        gain = _gain(read, engine.read, pixels[:_TIMED])
        times = f"{gain:.1f} x as fast as torch"
        if wanted == AUTO and gain < _FASTER:
            return Choice(None, f"torch, for {name} is {times}")
        return Choice(engine, f"{engine.label}, {times}")
    return Choice(None, f"torch, for {'; '.join(reasons)}")


def installed(name: str) -> bool:
    """Whether an engine's packages are there."""
    return all(importlib.util.find_spec(package) is not None for package in _PACKAGES[name])


def need(name: str) -> None:
    """Raise ``UsageError`` unless an engine's packages are there."""
    if not installed(name):
        remedy = f"pip install 'featdiff[{_EXTRAS[name]}]'"
        raise UsageError(f"the engine {name} is not installed: {remedy}, or drop engine", argument="engine")


# ---- builders ----


def _openvino(traced: nn.Module, example: Tensor) -> _Run:
    import openvino

    script = torch.jit.trace(traced, example, check_trace=False)
    model = openvino.convert_model(script, example_input=example, input=[-1, example.shape[1], -1, -1])
    # whole numbers of precision: some processors would round to bfloat16 by default
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    compiled = openvino.Core().compile_model(model, "CPU", options)
    requests = threading.local()

    def run(pixels: np.ndarray) -> Sequence[np.ndarray]:
        if not hasattr(requests, "own"):
            requests.own = compiled.create_infer_request()
        outputs = requests.own.infer({0: pixels})
        return [outputs[i] for i in range(len(compiled.outputs))]

    return run


def _onnxruntime(traced: nn.Module, example: Tensor) -> _Run:
    import onnxruntime

    file = io.BytesIO()
    free = {"pixels": {0: "images", 2: "height", 3: "width"}}
    # the other exporter takes a minute for a network, and needs sizes that it can prove
    torch.onnx.export(traced, (example,), file, dynamo=False, input_names=["pixels"], dynamic_axes=free)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])

    def run(pixels: np.ndarray) -> Sequence[np.ndarray]:
        return session.run(None, {"pixels": pixels})

    return run


def _compile(traced: nn.Module, example: Tensor) -> _Run:
    compiled = torch.compile(traced, dynamic=True)

    def run(pixels: np.ndarray) -> Sequence[np.ndarray]:
        return [values.numpy() for values in compiled(torch.from_numpy(pixels))]

    return run


_BUILDERS: Mapping[str, Callable[[nn.Module, Tensor], _Run]] = {
    OPENVINO: _openvino,
    ONNXRUNTIME: _onnxruntime,
    COMPILE: _compile,
}


# ---- compare ----


def _alike(expected: Mapping[Key, Tensor], given: Mapping[Key, Tensor]) -> bool:
    """Whether two passes gave the same, up to rounding."""
    for key, values in expected.items():
        values = values.float()
        if values.shape != given[key].shape or not torch.isfinite(given[key]).all():
            return False
        largest = values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)
        if (given[key] - values).abs().max() > _TOLERANCE * largest:
            return False
    return True


def _gain(before: Read, after: Read, pixels: Tensor) -> float:
    """How many times as fast a pass is, by the best times, taken in turns."""
    best = [float("inf")] * 2
    for _ in range(_ROUNDS):
        for i, read in enumerate((before, after)):
            start = time.perf_counter()
            read(pixels)
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]
