"""Weights files of ``test_resnet`` for tests: good ones, ones that do not fit, and one that would run code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
KERNEL = "layer1.0.conv1.weight"  # some tensor in the middle of test_resnet
CONFIG = {
    "architecture": "test_resnet",
    "num_classes": 1000,
    "pretrained_cfg": {
        "num_classes": 1000,
        "classifier": "fc",
        "input_size": [3, 96, 96],
        "mean": [0.1, 0.2, 0.3],
    },
}


def without(state: State, *prefixes: str) -> State:
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def floats(state: State, dtype: torch.dtype) -> State:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def head_of(classes: int, state: State) -> State:
    width = state["fc.weight"].shape[1]
    return {**without(state, "fc."), "fc.weight": torch.ones(classes, width), "fc.bias": torch.ones(classes)}


def write_seeded_backbone(file: Path) -> Path:
    """``test_resnet`` with seeded random weights."""
    import timm

    torch.manual_seed(0)
    return write(timm.create_model("test_resnet", pretrained=False).state_dict(), file)


def write(content: Any, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in content.items()}, file)
    else:
        torch.save(content, file)
    return file


#: Changes after which a state no longer fits, and what the error says of it.
MISFITS: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (lambda s: without(s, KERNEL), f"1 tensors missing (first {KERNEL})"),
    "missing_buffers": (
        lambda s: {k: v for k, v in s.items() if "running_mean" not in k},
        "15 tensors missing",
    ),
    "extra": (lambda s: {**s, "neck.weight": torch.ones(3)}, "1 tensors not known (first neck.weight)"),
    "reshaped": (
        lambda s: {**s, KERNEL: s[KERNEL].flatten()},
        f"1 tensors of another shape (first {KERNEL})",
    ),
    "nan": (lambda s: {**s, KERNEL: s[KERNEL] * float("nan")}, f"1 tensors NaN or infinite (first {KERNEL})"),
    "infinite": (
        lambda s: {**s, "bn1.bias": s["bn1.bias"] + float("inf")},
        "NaN or infinite (first bn1.bias)",
    ),
    "overflow": (lambda s: {**s, KERNEL: s[KERNEL].double() * 1e300}, f"NaN or infinite (first {KERNEL})"),
    "integers": (lambda s: {**s, KERNEL: s[KERNEL].to(torch.int32)}, KERNEL),
    "complex": (lambda s: {**s, KERNEL: s[KERNEL].to(torch.complex64)}, KERNEL),
    "empty": (lambda s: {}, "90 tensors missing"),
}


class Trap:
    """Unpickling this would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)
