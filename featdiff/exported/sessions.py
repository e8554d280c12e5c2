"""An .onnx file in ONNX Runtime or OpenVINO: its metadata, and a function from arrays to arrays."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..exceptions import ModelError, UsageError, did_you_mean, first_line
from ..runtime.cpus import thread_count
from ..runtime.sessions import onnxruntime_session, openvino_program
from .layout import INPUT, check_format

AUTO = "auto"
# The one that starts faster first.
_ENGINES = ("onnxruntime", "openvino")

#: Preprocessed images (B, 3, H, W) float32 -> outputs of the file by name.
Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Session:
    """An exported file that is ready to run.

    Attributes
    ----------
    run : callable
        Preprocessed images (B, 3, H, W) float32 -> outputs by name. Several threads may call it.
    facts : dict
        The metadata of the file.
    engine : str
        Name and version of what runs it.
    """

    run: Run
    facts: dict[str, Any]
    engine: str


def open_session(file: Path, engine: str = AUTO) -> Session:
    """Load an exported file.

    Parameters
    ----------
    file : Path
        An .onnx file that ``featdiff export`` has written.
    engine : {"auto", "onnxruntime", "openvino"}, default "auto"
        ``auto`` takes the first of the other two that is installed.

    Returns
    -------
    Session

    Raises
    ------
    UsageError
        The engine is unknown or not installed.
    ModelError
        The file cannot be loaded, or is of another program or format.
    """
    name = _chosen(engine)
    try:
        run, texts = _OPEN[name](file)
    except Exception as error:  # both libraries raise nearly anything on a damaged file
        raise ModelError(f"{file} cannot be loaded: {first_line(error)}") from None

    try:
        facts = {key: json.loads(text) for key, text in texts.items()}
    except ValueError:
        facts = {}  # as other programs write it
    check_format(facts, file)
    return Session(run, facts, f"{name} {version(name)}")


def _chosen(engine: str) -> str:
    """An engine that is installed."""
    if engine not in (AUTO, *_ENGINES):
        known = (AUTO, *_ENGINES)
        problem = f"an exported model runs in {' or '.join(_ENGINES)}, not in {engine!r}"
        raise UsageError(f"{problem}{did_you_mean(engine, list(known))}", argument="engine")

    for name in _ENGINES if engine == AUTO else (engine,):
        if importlib.util.find_spec(name) is not None:
            return name
    if engine == AUTO:
        raise UsageError("an exported model needs ONNX Runtime or OpenVINO: pip install onnxruntime")
    raise UsageError(f"the engine {engine} is not installed: pip install {engine}", argument="engine")


def _open_onnxruntime(file: Path) -> tuple[Run, dict[str, str]]:
    session = onnxruntime_session(file, thread_count())
    names = [output.name for output in session.get_outputs()]

    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(None, {INPUT: pixels}), strict=True))

    return run, session.get_modelmeta().custom_metadata_map


def _open_openvino(file: Path) -> tuple[Run, dict[str, str]]:
    import openvino

    model = openvino.Core().read_model(file)
    metadata = dict(model.get_rt_info().items()).get("framework", {})
    texts = {key: str(text.value) for key, text in metadata.items()}

    compiled = openvino_program(model, thread_count())
    names = [output.get_any_name() for output in compiled.outputs]
    request = compiled.create_infer_request()
    lock = threading.Lock()  # a request runs once at a time

    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        with lock:
            outputs = request.infer({INPUT: pixels})
            return {name: outputs[i] for i, name in enumerate(names)}

    return run, texts


_OPEN = {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino}
