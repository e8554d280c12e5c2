"""``featdiff doctor``."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import click

from .main import EXIT_FAILED

_PACKAGES = ("featdiff", "torch", "torchvision", "timm", "diffusers", "scikit-learn", "pillow", "safetensors")
_EXTRAS = {
    "parquet": ["pyarrow"],
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
    "pixel": ["accelerate", "lpips", "torchmetrics"],
}


@click.command("doctor")
def command() -> int:
    """Check this installation: versions, device, embedded weights, optional parts, cache, hub access.

    \b
    Example: featdiff doctor
    """
    problems = []
    for line, problem in _checks():
        click.echo(line)
        problems += [problem] if problem else []
    for problem in problems:
        click.echo(f"PROBLEM: {problem}")
    click.echo("all well" if not problems else f"{len(problems)} problem(s)")
    return EXIT_FAILED if problems else 0


def _checks() -> Iterator[tuple[str, str]]:
    """(what was found, what is wrong with it or nothing)."""
    yield f"python         {platform.python_version()} on {platform.platform()}", ""
    for name in _PACKAGES:
        found = _version(name)
        yield f"{name:<14} {found or 'missing'}", "" if found else f"pip install {name}"
    yield _device(), ""
    yield _faiss()
    for extra, names in _EXTRAS.items():
        parts = {name: _version(name) for name in names}
        whole = ", ".join(f"{name} {number}" for name, number in parts.items())
        yield f"{extra:<14} {whole if all(parts.values()) else f'not installed (pip install featdiff[{extra}])'}", ""
    yield _embedded()
    yield _cache()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    yield (
        f"{'hub':<14} {'offline (HF_HUB_OFFLINE): cached weights and files only' if offline else 'online'}",
        "",
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{'device':<14} cuda: {torch.cuda.get_device_name()}"
    return f"{'device':<14} {'mps' if torch.backends.mps.is_available() else f'cpu, {torch.get_num_threads()} threads'}"


def _faiss() -> tuple[str, str]:
    wheels = [name for name in ("faiss-cpu", "faiss-gpu") if _version(name)]
    both = "faiss-cpu and faiss-gpu overwrite each other: pip uninstall -y faiss-cpu faiss-gpu, then install one"
    try:
        import faiss
    except Exception as error:  # faiss-gpu raises RuntimeError where CUDA is missing
        missing = isinstance(error, ModuleNotFoundError)
        text = "not installed (optional)" if missing else f"cannot be loaded: {str(error).splitlines()[0]}"
        return f"{'faiss':<14} {text}", "" if missing else "faiss is installed but cannot be loaded"
    return f"{'faiss':<14} {faiss.__version__} ({', '.join(wheels)})", both if len(wheels) > 1 else ""


def _embedded() -> tuple[str, str]:
    from featdiff.exceptions import FeatdiffError
    from featdiff.features.backbones import load_backbone
    from featdiff.features.weights import DEFAULT_BACKBONE

    try:
        found = load_backbone()
    except FeatdiffError as error:
        return f"{'weights':<14} embedded: broken", str(error)
    return f"{'weights':<14} embedded {DEFAULT_BACKBONE}, SHA-256 {found.fingerprint[:16]}", ""


def _cache() -> tuple[str, str]:
    from featdiff.files.cache import default_cache

    folder = default_cache()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK)
    line = f"{'cache':<14} {folder} ({size:,.1f} MB; may be deleted at any time)"
    return (
        line,
        "" if writable else f"the cache {folder} cannot be written: set FEATDIFF_CACHE to a folder of yours",
    )
