"""Files of networks -> ONNX Runtime or OpenVINO on the CPU, with the options that featdiff wants. Knows no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
        # said in so many words: some processors would round to bfloat16 by default
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
    }
    return openvino.Core().compile_model(model, "CPU", options)
