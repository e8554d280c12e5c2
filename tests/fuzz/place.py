"""What the checks share: a small fitted detector, its saved model, and images whose scores are known."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from weights_files import write_seeded_backbone

from featdiff import Detector, FeatureDiffusion, Scores
from featdiff.data import samples
from featdiff.verdicts.results import Row

#: In every folder of images that is scored, so many are good.
GOOD = 4
#: Scores that differ by less are the same, in standard deviations.
ROUNDING = 1e-5


class Wrong(Exception):
    """A check that failed; the message says which."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise Wrong(message)


@dataclass
class Place:
    """A fitted detector, the folders of saved models, and good images and their rows.

    ``model`` is that of ``detector``, whose backbone has its weights in ``weights``; ``vectors`` is a model of rows of
    16 numbers.
    """

    folder: Path
    detector: Detector
    model: Path
    vectors: Path
    weights: Path
    good: list[Path]
    rows: list[Row]

    def copy_good(self, folder: Path) -> list[str]:
        """Put the good images into a folder; their names."""
        for file in self.good:
            shutil.copy(file, folder / file.name)
        return [file.name for file in self.good]


def make_place(folder: Path) -> Place:
    """Fit small detectors on the sample set and on random rows; takes some seconds."""
    weights = write_seeded_backbone(folder / "test_resnet.safetensors")
    images = samples.write(folder / "samples")
    recipe: dict[str, Any] = {"epochs": 2, "min_steps": 20, "batch_size": 64}

    detector = Detector(
        backbone="test_resnet",
        weights=weights,
        layers="layer1,layer4",
        recipe=recipe,
        calibration=0.2,
        cache=folder / "cache",
    )
    detector.fit(images["train"])
    detector.save_pretrained(folder / "model")

    vectors = FeatureDiffusion(hidden_max=16, recipe=recipe)
    vectors.fit(np.random.default_rng(0).normal(size=(600, 16)))
    vectors.save_pretrained(folder / "vectors")

    good = sorted(images["test"].iterdir())[:GOOD]
    rows = list(detector.score([str(file) for file in good]))
    return Place(folder, detector, folder / "model", folder / "vectors", weights, good, rows)


def check_rows(scores: Scores) -> None:
    """What holds for every result, whatever the images were."""
    for row in scores:
        fine = row.status == "ok"
        numbers = [row.ood_score, row.p_value, *row.layers.values()]
        require(row.status in ("ok", "unreadable", "error"), f"{row.path!r}: status {row.status!r}")
        told = row.reason and not (fine and re.fullmatch(r"page 1 of [\d,]+( or more)? was read", row.reason))
        require(bool(told) != fine, f"{row.path!r}: status {row.status}, reason {row.reason!r}")
        require("MemoryError" not in row.reason, f"{row.path!r}: {row.reason}")
        require("\n" not in row.reason, f"{row.path!r}: a reason of several lines")
        require(bool(np.isfinite(numbers).all()) == fine, f"{row.path!r}: status {row.status}, numbers {numbers}")
        require(fine or not row.is_ood, f"{row.path!r}: flagged without a score")


def alike(row: Row, expected: Row) -> bool:
    """Whether two rows say the same of an image, but for rounding: processors add in an order that sizes decide."""
    numbers = [[each.ood_score, *each.layers.values()] for each in (row, expected)]
    said = [(each.p_value, each.is_ood, list(each.layers)) for each in (row, expected)]
    return said[0] == said[1] and bool(np.allclose(*numbers, rtol=0, atol=ROUNDING))


def check_good(scores: Scores, ends: dict[str, Row]) -> None:
    """Paths that end like these have these rows."""
    for end, expected in ends.items():
        found = [row for row in scores if row.path.endswith(end)]
        require(len(found) == 1, f"{len(found)} rows for the good image {end}")
        row = found[0]
        require(row.status == "ok", f"the good image {end} is {row.status}: {row.reason}")
        require(alike(row, expected), f"the good image {end} scores {row.ood_score!r}, alone {expected.ood_score!r}")


def command(*arguments: object, **options: Any) -> Result:
    """Run ``featdiff`` in this process; an exception that is not featdiff's own is raised."""
    (script,) = entry_points(group="console_scripts", name="featdiff")
    done = CliRunner().invoke(script.load(), [str(argument) for argument in arguments], prog_name="featdiff", **options)
    bug = [line for line in done.stderr.splitlines() if "a bug: please report" in line]
    if bug:
        raise Wrong(bug[0])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    require(done.exit_code in (0, 1, 2, 3), f"exit code {done.exit_code}")
    return done


def parse_jsonl(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line]
