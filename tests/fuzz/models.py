"""Folders of saved models in which something was changed: refused, or the very same scores."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from model_mutations import forge, mutate

from featdiff.detectors import load_detector
from featdiff.exceptions import FeatdiffError
from featdiff.files.model_folder import CONFIG, TENSORS

from .harness import Target
from .place import Place, alike, command, require

# Beside a model whose digest was made to fit what was changed: it may load, and score differently.
_FORGED = "forged"


def make(rng: random.Random, folder: Path, place: Place) -> None:
    model = folder / "model"
    other = folder / "other"
    shutil.copytree(place.model, model)
    shutil.copytree(place.model, other)
    forge(other, place.model, rng.randrange(1 << 32))
    if rng.random() < 0.7:
        mutate(model, other, rng.randrange(1 << 32))
    else:
        forge(model, other, rng.randrange(1 << 32))
        (folder / _FORGED).touch()
    if all((model / name).read_bytes() == (other / name).read_bytes() for name in (CONFIG, TENSORS)):
        (folder / _FORGED).touch()  # the one file in which the two differed was copied: a whole other model


def check(folder: Path, place: Place) -> int:
    command("info", folder / "model")
    try:
        detector = load_detector(folder / "model", weights=place.weights)
        rows = list(detector.score([str(file) for file in place.good]))
    except FeatdiffError:
        return 0
    if (folder / _FORGED).exists():
        return len(rows)

    for row, expected in zip(rows, place.rows, strict=True):
        require(alike(row, expected), f"a changed model loads and scores {row.ood_score!r}, not {expected.ood_score!r}")
    return len(rows)


TARGET = Target("models", make, check)
