"""Folders of saved models in which something was changed: refused, or the very same scores."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from featdiff.detectors import load_detector
from featdiff.exceptions import FeatdiffError

from .harness import Target
from .mutators import mutate
from .place import Place, command, require

_CONFIG = "config.json"
_TENSORS = "model.safetensors"
_VALUES = (None, True, 0, -1, 1e308, math.nan, math.inf, "", "x", "1", [], [[]], {}, {"a": 1}, 2**70, "../../x")


def make(rng: random.Random, folder: Path, place: Place) -> None:
    model = folder / "model"
    shutil.copytree(place.model, model)
    how = rng.choice(
        ("bytes of config", "bytes of tensors", "value", "value", "value", "key", "deep", "tensor", "tensor")
    )
    if how == "bytes of config":
        _change_bytes(model / _CONFIG, rng)
    elif how == "bytes of tensors":
        _change_bytes(model / _TENSORS, rng)
    elif how == "tensor":
        _change_tensor(model / _TENSORS, rng)
    elif how == "deep":
        depth = rng.choice((100, 100_000))
        (model / _CONFIG).write_text("[" * depth + "]" * depth)
    else:
        _change_json(model / _CONFIG, rng, how)


def _change_bytes(file: Path, rng: random.Random) -> None:
    file.write_bytes(mutate(file.read_bytes(), rng))


def _change_json(file: Path, rng: random.Random, how: str) -> None:
    """Another value for a key at any depth, or a key less or more."""
    config = json.loads(file.read_text())
    tables = _tables(config)
    table = rng.choice(tables)
    key = rng.choice(list(table))
    if how == "value":
        table[key] = _other(table[key], rng)
    elif rng.random() < 0.5:
        del table[key]
    else:
        table[rng.choice(("x", "settings", "seed", ""))] = rng.choice(_VALUES)
    file.write_text(json.dumps(config))


def _tables(content: Any) -> list[dict[str, Any]]:
    """All objects of a JSON document that are not empty."""
    inner = list(content.values()) if isinstance(content, dict) else content if isinstance(content, list) else []
    found = [content] if isinstance(content, dict) and content else []
    for value in inner:
        found += _tables(value)
    return found


def _other(value: Any, rng: random.Random) -> Any:
    """A value of any kind, or one like the old."""
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.6:
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1.01))
    return rng.choice(_VALUES)


def _change_tensor(file: Path, rng: random.Random) -> None:
    """Other numbers in a tensor; the file stays well formed, and keeps its metadata."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    flat = tensors[name].flatten()
    if len(flat) and flat.is_floating_point():
        flat[rng.randrange(len(flat))] = rng.choice((0.0, 1.0, -1.0, 1e30, math.nan, math.inf))
    elif len(flat):
        flat[rng.randrange(len(flat))] = 1
    tensors[name] = flat.reshape(tensors[name].shape)
    save_file(tensors, file, metadata)


def check(folder: Path, place: Place) -> int:
    command("info", folder / "model")
    try:
        detector = load_detector(folder / "model", weights=place.weights)
        rows = list(detector.score([str(file) for file in place.good]))
    except FeatdiffError:
        return 0
    for row, expected in zip(rows, place.rows, strict=True):
        same = (row.ood_score, row.p_value, row.is_ood, row.layers) == (
            expected.ood_score,
            expected.p_value,
            expected.is_ood,
            expected.layers,
        )
        require(same, f"a changed model loads and scores {row.ood_score!r}, not {expected.ood_score!r}")
    return len(rows)


TARGET = Target("models", make, check)
