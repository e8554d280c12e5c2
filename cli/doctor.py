"""``featdiff doctor``."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import click

from .main import EXIT_FAILED
from .speech import show

_PACKAGES = ("featdiff", "torch", "torchvision", "timm", "diffusers", "scikit-learn", "pillow", "safetensors")
_EXTRAS = {
    "parquet": ["pyarrow"],
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
    "openvino": ["openvino"],
    "pixel": ["accelerate", "lpips", "torchmetrics"],
    "serve": ["fastapi", "uvicorn", "httptools", "prometheus-client", "python-multipart"],
}


@click.command("doctor")
def command() -> int:
    """Check this installation: versions, device, embedded weights, optional parts, cache, hub access.

    \b
    Example: featdiff doctor
    """
    problems = []
    for line, problem in _checks():
        show(line)
        if problem:
            problems.append(problem)

    if not problems:
        show("all well")
        return 0

    for problem in problems:
        show(f"PROBLEM: {problem}")
    show(f"{len(problems)} problem(s)")
    return EXIT_FAILED


def _checks() -> Iterator[tuple[str, str]]:
    """A line for each check, and what is wrong, empty if nothing is."""
    yield _line("python", f"{platform.python_version()} on {platform.platform()}"), ""
    for name in _PACKAGES:
        installed = _version(name)
        yield _line(name, installed or "missing"), "" if installed else f"pip install {name}"

    yield _line("device", _device()), ""
    yield _faiss()
    for extra, names in _EXTRAS.items():
        yield _line(extra, _extra(extra, names)), ""

    yield _embedded()
    yield _cache()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    yield _line("hub", "offline (HF_HUB_OFFLINE): cached weights and files only" if offline else "online"), ""


def _line(name: str, text: str) -> str:
    return f"{name:<14} {text}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _extra(extra: str, names: list[str]) -> str:
    """The packages of an optional part, or how to install them."""
    versions = {name: _version(name) for name in names}
    if not all(versions.values()):
        return f"not installed (pip install featdiff[{extra}])"
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return "mps"
    return f"cpu, {torch.get_num_threads()} threads"


def _faiss() -> tuple[str, str]:
    from featdiff.exceptions import first_line

    try:
        import faiss
    except ModuleNotFoundError:
        return _line("faiss", "not installed (optional)"), ""
    except Exception as error:  # faiss-gpu raises RuntimeError where CUDA is missing
        return _line("faiss", f"cannot be loaded: {first_line(error)}"), "faiss is installed but cannot be loaded"

    wheels = [name for name in ("faiss-cpu", "faiss-gpu") if _version(name)]
    problem = ""
    if len(wheels) > 1:
        problem = "faiss-cpu and faiss-gpu overwrite each other: pip uninstall -y faiss-cpu faiss-gpu, then install one"
    return _line("faiss", f"{faiss.__version__} ({', '.join(wheels)})"), problem


def _embedded() -> tuple[str, str]:
    from featdiff.exceptions import FeatdiffError
    from featdiff.features.backbones import load_backbone
    from featdiff.features.weights import DEFAULT_BACKBONE

    try:
        backbone = load_backbone()
    except FeatdiffError as error:
        return _line("weights", "embedded: broken"), str(error)
    return _line("weights", f"embedded {DEFAULT_BACKBONE}, SHA-256 {backbone.fingerprint[:16]}"), ""


def _cache() -> tuple[str, str]:
    from featdiff.files.cache import default_cache

    folder = default_cache()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    line = _line("cache", f"{folder} ({size:,.1f} MB; may be deleted at any time)")

    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if parent.is_dir() and os.access(parent, os.W_OK):
        return line, ""
    return line, f"the cache {folder} cannot be written: set FEATDIFF_CACHE to a folder of yours"
