"""Commands on small real inputs, each with an output that can be compared with that of another run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers import heed_ctrl_c
from safetensors.torch import load_file
from weights_files import write_seeded_backbone

from featdiff.data import samples

#: Keys of JSON files that differ from run to run: times, and what depends on them.
_TIMES = ("seconds", "per_second", "id", "digest", "date")
_PIXEL = """[detector]
mode = "pixel"
size = 16
width = 8
multipliers = [1, 2]
attention = []
mask_blocks = 4
repetitions = 2
steps = 4
distances = ["mse", "ssim"]
recipe = { epochs = 4, min_steps = 0, batch_size = 16 }
"""
_TRAIN = """[detector]
backbone = "test_resnet"
layers = "layer1,layer2,layer4"
recipe = { epochs = 5, min_steps = 50, batch_size = 64 }
"""
_SUITE = """title = "small"

[sources.train]
path = "sets/train"

[sources.test]
path = "sets/test"

[sources.digits]
path = "sets/digits"

[[tasks]]
name = "small"
train = "train"
test = "test"
ood = ["digits"]

[detectors.featdiff]
calibration = 0.2
recipe = { epochs = 2, min_steps = 20 }
"""
_WEIGHTS = ["--weights", "test_resnet.safetensors"]
_BACKBONE = ["--backbone", "test_resnet", *_WEIGHTS, "--layers", "layer1,layer2,layer4"]


@dataclass(frozen=True)
class Command:
    """A command without its output.

    Attributes
    ----------
    name : str
    arguments : list of str
        Paths are relative to the folder of inputs.
    output : str
        Name of the file or folder after ``-o``.
    again : list of str
        What is added when it runs again after it was stopped.
    """

    name: str
    arguments: list[str]
    output: str
    again: list[str] = field(default_factory=list)

    def line(self, output: Path, cache: Path) -> list[str]:
        return [sys.executable, "-m", "featdiff_cli", *self.arguments, "-o", str(output), "--cache", str(cache), "-q"]


def make_inputs(folder: Path) -> dict[str, Command]:
    """Write the inputs of all commands, and train the model that some of them need."""
    write_seeded_backbone(folder / "test_resnet.safetensors")
    images = samples.write(folder / "sets")
    (folder / "sets" / "digits" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for kind in ("china", "flower"):
        (folder / "classes" / kind).mkdir(parents=True)
        for file in sorted(images["train"].glob(f"{kind}*"))[:40]:
            shutil.copy(file, folder / "classes" / kind)
    (folder / "pixel.toml").write_text(_PIXEL)
    (folder / "train.toml").write_text(_TRAIN)
    (folder / "suite.toml").write_text(_SUITE)

    done = execute(train().line(folder / "model", folder / "cache"), folder)
    if done.returncode not in (0, 3):
        raise SystemExit(f"the model that all need could not be trained: {done.stderr}")

    model = ["-m", "model", *_WEIGHTS]
    resume = ["--resume"] if "--resume" in execute(_help("score"), folder).stdout else []
    harden = ["harden", "classes", "--student", "test_resnet", "--epochs", "3", "--train-batch", "16", "--fpr", "0.1"]
    commands = [
        train(),
        Command("harden", [*harden, *_WEIGHTS], "hardened"),
        Command("bench", ["bench", "suite.toml", "--data", ".", *_BACKBONE], "comparison.json"),
        *(
            Command(f"score {kind}", ["score", "sets/digits", *model, "--batch-size", "4"], f"scores.{kind}", resume)
            for kind in ("csv", "jsonl", "parquet")
        ),
        Command("pixel mode", ["train", "sets/test", "--config", "pixel.toml"], "model"),
        Command("outliers", ["outliers", "classes", "-n", "500", *model], "outliers.safetensors"),
    ]
    return {command.name: command for command in commands}


def _help(name: str) -> list[str]:
    return [sys.executable, "-m", "featdiff_cli", name, "--help"]


def train() -> Command:
    return Command("train", ["train", "sets/test", "--config", "train.toml", *_WEIGHTS], "model")


def audit(kind: str) -> Command:
    return Command(f"audit {kind}", ["audit", "sets/test", *_BACKBONE], f"odd.{kind}")


def export() -> Command:
    return Command("export", ["export", "-m", "model", *_WEIGHTS], "exported")


def execute(line: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


def start(line: list[str], folder: Path) -> subprocess.Popen[str]:
    """A process that Ctrl-C reaches, also where this one runs in the background."""
    return subprocess.Popen(
        line,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )


# ---- outputs that can be compared ----


def content(path: Path) -> dict[str, str]:
    """A digest of each file at or below a path, times left out; empty if there is none."""
    if path.is_file():
        return {path.name: _digest(path)}
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not is_leftover(file)]
    return {file.relative_to(path).as_posix(): _digest(file) for file in files}


def is_leftover(file: Path) -> bool:
    """Whether a file carries a temporary name."""
    return file.name.startswith(".") or file.suffix in (".tmp", ".partial")


def leftovers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*") if file.is_file() and is_leftover(file))


def _digest(file: Path) -> str:
    data = file.read_bytes()
    try:
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            data = b"".join(
                f"{name} {tensors[name].dtype}".encode() + _bytes(tensors[name]) for name in sorted(tensors)
            )
        elif file.suffix == ".json":
            data = json.dumps(_without_times(json.loads(data)), sort_keys=True).encode()
    except Exception as error:  # half a file
        return f"{type(error).__name__} {len(data)}"
    return hashlib.sha256(data).hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(inner) for key, inner in value.items() if not key.endswith(_TIMES)}
    if isinstance(value, list):
        return [_without_times(inner) for inner in value]
    return value


def fill_disk(folder: Path) -> None:
    """Leave not a byte free."""
    with (folder / "filler").open("wb", buffering=0) as stream:
        size = 1 << 20
        while size:
            try:
                stream.write(bytes(size))
            except OSError:
                size //= 2
    os.sync()
