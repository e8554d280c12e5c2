"""Config files and benchmark suites with other keys, values and bytes."""

from __future__ import annotations

import functools
import importlib
import random
import re
from pathlib import Path

from helpers import ROOT

from featdiff import Detector
from featdiff.detectors.config import SETTINGS
from featdiff.evaluation.suites import load_suite
from featdiff.exceptions import FeatdiffError

from .harness import Target
from .mutators import mutate
from .place import Place, require

_VALUES = (
    *('""', '"x"', "0", "-1", "1.5", "1e308", "nan", "inf", "true", "[]", "{}", "[[]]", "[1, 2]", '["a", "b"]'),
    *("{ a = 1 }", "1979-05-27", "99999999999999999999", '"\\u0000"', "[" * 3000 + "]" * 3000),
)
_EXAMPLE = """[detector]
backbone = "test_resnet"
layers = "layer1,layer4"
view = "whole"
size = 160
fpr = 0.05
calibration = 0.2
start_times = [30, 60]
seed = 0
hidden_max = 64
blocks = 1
joint = false
head = "mfsim"
neighbors = 5
bank_size = 100
extra_heads = []
[detector.recipe]
epochs = 2
min_steps = 20
batch_size = 64
learning_rate = 1e-3
[data]
images = ["photos"]
groups = "folder"
"""


@functools.cache
def seeds() -> dict[str, str]:
    """Presets and suites by kind and name."""
    folder = ROOT / "configs"
    files = {f"config-{file.stem}": file.read_text() for file in sorted(folder.glob("*.toml"))}
    suites = {f"suite-{file.stem}": file.read_text() for file in sorted((folder / "suites").glob("*.toml"))}
    return {"config-example": _EXAMPLE} | files | suites


def make(rng: random.Random, folder: Path, place: Place) -> None:
    name = rng.choice(list(seeds()))
    lines = seeds()[name].splitlines()
    for _ in range(rng.choice((1, 1, 2))):
        lines = _change(lines, rng)
    data = "\n".join(lines).encode()
    if rng.random() < 0.2:
        data = mutate(data, rng)
    (folder / f"{name}.toml").write_bytes(data)


def _change(lines: list[str], rng: random.Random) -> list[str]:
    """A line less, twice or elsewhere, or another value or key in it."""
    i = rng.randrange(len(lines))
    line = lines[i]
    how = rng.choice(("drop", "repeat", "move", "value", "value", "value", "value", "key"))
    if how == "drop":
        changed: list[str] = []
    elif how == "repeat":
        changed = [line, line]
    elif how == "move":
        other = list(lines)
        other.insert(rng.randrange(len(other)), other.pop(i))
        return other
    elif how == "key":
        changed = [re.sub(r"^[\w.\"]+|(?<=\[)\w+", rng.choice(("x", "a.b", '""', "mode", "recipe")), line)]
    else:
        value = rng.choice(_VALUES)
        changed = [re.sub(r"= .*", lambda _: f"= {value}", line)]
    return lines[:i] + changed + lines[i + 1 :]


def check(folder: Path, place: Place) -> int:
    (file,) = folder.glob("*.toml")
    load_config = importlib.import_module("featdiff_cli.config").load_config
    try:
        if file.name.startswith("suite"):
            for arguments in load_suite(file).detectors.values():
                Detector(**arguments)
        else:
            config = load_config(str(file))
            SETTINGS[config.mode].of(config.detector)
    except FeatdiffError as error:
        require("\n" not in str(error), "a message of several lines")
    return 1


TARGET = Target("configs", make, check)
