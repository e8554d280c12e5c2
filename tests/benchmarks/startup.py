"""How long it takes to score one image from the command line, against what a user of timm would start anyway.

    python tests/benchmarks/startup.py
    python tests/benchmarks/startup.py --against OTHER_CHECKOUT

Each round runs all commands once, one after the other. Printed are medians over the rounds, and ratios within a round.
The image is a made-up photograph: time does not depend on what it shows. An exported model runs without PyTorch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

#: What all others are compared with.
BASE = "import torch, timm, and one pass"
PASS = """
import torch, timm
model = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
with torch.inference_mode():
    model(torch.rand(1, 3, 192, 256))
"""
TRAIN = """
import sys
from pathlib import Path
import numpy as np
from featdiff import Detector
from featdiff.export.export import export
folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
images = np.random.default_rng(0).integers(0, 255, (1000, 8, 8, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
recipe = {"epochs": 1, "min_steps": 1, "max_steps": 1}
detector = Detector(recipe=recipe, device="cpu", engine="torch").fit(list(images), groups="none")
detector.save_pretrained(folder / "model")
export(detector, folder / "exported", ["onnx"])
"""


@dataclass
class Command:
    """A command line, the environment that is its own, and seconds of each round."""

    line: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Run it once more."""
        environment = {**os.environ, **self.environment}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages are compiled
        start = time.perf_counter()
        process = subprocess.Popen(
            self.line,
            cwd=tempfile.gettempdir(),  # Python imports from the current folder first
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(said.decode())
        self.wall.append(time.perf_counter() - start)
        self.processor.append(usage.ru_utime + usage.ru_stime)


class FreshCache(Command):
    """The same with a new, empty cache each time, as on a machine that has not seen the model."""

    def run(self) -> None:
        """Run it once more."""
        with tempfile.TemporaryDirectory() as cache:
            self.environment["FEATDIFF_CACHE"] = cache
            super().run()


def train(folder: Path, environment: dict[str, str]) -> None:
    """A model of the default backbone and settings, hardly trained, by the code that the environment names."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAIN, str(folder)],
        cwd=tempfile.gettempdir(),
        env={**os.environ, "FEATDIFF_CACHE": str(folder / "training"), **environment},
    )
    if done.returncode:
        raise SystemExit(done.returncode)


def commands(folder: Path, against: Path | None) -> dict[str, Command]:
    """What is compared, by a name for the table."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((1024, 768), Image.Resampling.BICUBIC).save(folder / "one.jpg")

    def score(model: Path) -> list[str]:
        line = [sys.executable, "-m", "featdiff_cli", "score", str(folder / "one.jpg"), "-m", str(model)]
        return [*line, "--device", "cpu"]

    train(folder, {})
    cache = {"FEATDIFF_CACHE": str(folder / "cache")}
    found = {
        BASE: Command([sys.executable, "-c", PASS]),
        "featdiff score one.jpg": Command(score(folder / "model"), cache),
        "the same with an empty cache": FreshCache(score(folder / "model")),
        "the same of an exported model": Command(score(folder / "exported"), cache),
    }
    if against:
        other = {"FEATDIFF_CACHE": str(folder / "other"), "PYTHONPATH": str(against)}
        train(folder / "older", other)
        found[f"featdiff score one.jpg, {against.name}"] = Command(score(folder / "older" / "model"), other)
    return found


def main() -> None:
    """Run all commands in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout, with featdiff_cli beside featdiff")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        found = commands(Path(folder), options.against)
        for _ in range(options.rounds + 1):
            for command in found.values():
                command.run()

    print("| command | wall, s | x | processor, s | x |\n|---|---|---|---|---|")
    for name, command in found.items():
        cells = [name]
        for kind in ("wall", "processor"):
            seconds = np.array(getattr(command, kind)[1:])  # the first round warms the disk up
            base = np.array(getattr(found[BASE], kind)[1:])
            cells += [f"{np.median(seconds):.1f}", f"{np.median(seconds / base):.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
