"""Files of networks -> ONNX Runtime or OpenVINO on the CPU, with the options that featdiff wants. Knows no PyTorch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .cpus import available_cpus

# Sizes of images that have a program of their own, bytes of weights that all these programs may copy, and images of
# one size for which such a program pays.
_MOST_SIZES = 8
_MOST_WEIGHTS = 250_000_000
_FEW = 4

_few_expected: ContextVar[bool] = ContextVar("few images at a time", default=False)


@contextlib.contextmanager
def few_at_a_time() -> Iterator[None]:
    """What is started in OpenVINO in this block will be given a few images at a time, as a server has them."""
    token = _few_expected.set(True)
    try:
        yield
    finally:
        _few_expected.reset(token)


def onnxruntime_session(file: Path, threads: int) -> Any:
    """An .onnx file in ONNX Runtime.

    Parameters
    ----------
    file : Path
    threads : int
        That compute one operation.

    Returns
    -------
    onnxruntime.InferenceSession
        Several threads may use it at once.

    Raises
    ------
    Exception
        Of nearly any kind, if the file is damaged.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors are raised anyway
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would take CPUs from decoding
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


class OpenVinoPasses:
    """A network in OpenVINO, which any number of threads may run.

    Started within :func:`few_at_a_time`, it has a program of its own for each of the first sizes of images, which takes
    one image. The program for any size prepares itself anew whenever a size is not the one before, which takes a third
    of the time of a small network. Each program holds a copy of the weights, so a large network has fewer, or none.

    Parameters
    ----------
    file : Path
        As ``openvino.save_model`` writes it.
    threads : int
        That compute one operation.
    bfloat16 : bool, default False
        Whether to compute in bfloat16.

    Raises
    ------
    Exception
        Of nearly any kind, if the network cannot be run.
    """

    def __init__(self, file: Path, threads: int, bfloat16: bool = False) -> None:
        import openvino

        self._make = partial(openvino_program, threads=threads, bfloat16=bfloat16)
        self._model = openvino.Core().read_model(file)
        self._any_size = self._make(self._model)
        self._of_size: dict[tuple[int, ...], Any] = {}
        self._making = threading.Lock()
        self._requests = threading.local()

        weights = max(1, file.with_suffix(".bin").stat().st_size)
        self._most = min(_MOST_SIZES, _MOST_WEIGHTS // weights) if _few_expected.get() else 0

    def __call__(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Images (B, C, H, W) float32 -> each output (B, ...)."""
        program = self._of(pixels.shape[1:]) if len(pixels) <= _FEW else None
        if program is None:
            return self._pass(self._any_size, pixels)
        each = [self._pass(program, pixels[i : i + 1]) for i in range(len(pixels))]
        return [np.concatenate(parts) for parts in zip(*each, strict=True)]

    def _of(self, size: tuple[int, ...]) -> Any:
        """The program for a size; None if it has none."""
        with self._making:
            if size not in self._of_size and len(self._of_size) < self._most:
                model = self._model.clone()
                model.reshape({0: [1, *size]})
                self._of_size[size] = self._make(model)
            return self._of_size.get(size)

    def _pass(self, program: Any, pixels: np.ndarray) -> list[np.ndarray]:
        own = vars(self._requests)  # of this thread
        name = str(id(program))
        if name not in own:
            own[name] = program.create_infer_request()
        outputs = own[name].infer({0: pixels})
        return [outputs[i] for i in range(len(program.outputs))]


def openvino_program(model: Any, threads: int, bfloat16: bool = False) -> Any:
    """A network in OpenVINO.

    Parameters
    ----------
    model : openvino.Model
        From ``openvino.Core().read_model(file)``.
    threads : int
        That compute one operation.
    bfloat16 : bool, default False
        Whether to compute in bfloat16.

    Returns
    -------
    openvino.CompiledModel
        Each thread needs a request of its own.

    Raises
    ------
    Exception
        Of nearly any kind, if the network cannot be run.
    """
    import openvino

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(threads),
        # whoever leaves CPUs to other processes must not be tied to the same ones as they
        "ENABLE_CPU_PINNING": threads >= available_cpus(),
        # said in so many words: some processors would round to bfloat16 by default
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
    }
    return openvino.Core().compile_model(model, "CPU", options)
