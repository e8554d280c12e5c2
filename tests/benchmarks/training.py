"""What training costs beyond the backbone's pass, and how well the result tells sets apart.

    python tests/benchmarks/training.py cost --data FOLDER [--code OLD NEW]
    python tests/benchmarks/training.py quality --data FOLDER [--code OLD NEW]

``cost``: processor time of ``featdiff train`` on cifar10.zip/train whose features are in the cache, start of Python
included, in times of a bare eager pass (decode and forward, on every 16th image) over all of them; one thread each, in
turns. ``quality``: AUROC in percent of the fused score and of its diffusion head, for several in-domain sets and seeds.

``--code`` names copies of this repository to compare; features are shared where they make the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
SHARE = 16

_BARE = """
import sys, time
import torch
from featdiff import FeatureExtractor
from featdiff.data.batches import iter_batches, iter_loaded
from featdiff.data.references import list_images
from featdiff.features.backbones import load_backbone
from featdiff.runtime.allocator import keep_freed_memory
keep_freed_memory()
extractor = FeatureExtractor(load_backbone())
start = time.process_time()
loaded = iter_loaded(list_images(sys.argv[1])[::int(sys.argv[2])], extractor.transform)
with torch.inference_mode():
    for batch in iter_batches(loaded, 32):
        for stack in batch.stacks:
            pixels = stack.pixels.contiguous(memory_format=torch.channels_last)
            extractor.model.forward_intermediates(pixels, intermediates_only=True)
print(time.process_time() - start)
"""

_FEATURES = """
import sys
from featdiff import Detector
print(Detector(device="cpu", engine="torch").read(sys.argv[1])[0].total)
"""

_TRAIN = """
import sys, time
from featdiff import Detector
detector = Detector(device="cpu", engine="torch")
detector.fit(sys.argv[1])
detector.save_pretrained(sys.argv[2])
print(time.process_time())
"""

_QUALITY = """
import json, sys
import numpy as np
from featdiff import Detector
from featdiff.evaluation.metrics import evaluate
train, test, seed, *ood = sys.argv[1:]
detector = Detector(device="cpu", seed=int(seed)).fit(train)
heads = ["layerwise"]
rows = lambda images: detector.features(images)[1][:]
scores = lambda rows: {"fused": detector.score_features(rows), "layerwise": detector.all_heads(rows)["layerwise"]}
inside = scores(rows(test))
found = {}
for images in ood:
    outside = scores(rows(images))
    found[images] = {name: 100 * evaluate(inside[name], outside[name]).auroc for name in inside}
print(json.dumps(found))
"""

#: In-domain sets: images to train on, to test on, and sets that are not.
SETS = {
    "CIFAR-10": (
        "cifar10.zip/train",
        "cifar10.zip/test",
        ("gtsrb_32.zip", "fashion_mnist_32.zip", "tiny_imagenet_32.zip", "dtd_32.zip"),
    ),
    "flowers": ("flowers.zip/train", "flowers.zip/test", ("dtd.zip", "tiny_imagenet.zip")),
}


def run(code: Path, program: str, *arguments: object, cache: Path) -> str:
    """Last line of what a program prints, on one thread."""
    environment = {
        **os.environ,
        "FEATDIFF_CACHE": str(cache),
        "PYTHONPATH": str(code),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=code)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.splitlines()[-1]


def forget_trainings(cache: Path) -> None:
    """Leave the features alone in a cache."""
    for file in cache.rglob("training-*.pt"):
        file.unlink()


def cost(data: Path, code: list[Path], cache: Path, rounds: int) -> None:
    """Print a table row for each copy: its training beyond the pass, in times of the pass."""
    images = data / "cifar10.zip" / "train"
    passes: list[float] = []
    trainings: dict[Path, list[float]] = {path: [] for path in code}
    with tempfile.TemporaryDirectory() as folder:
        for path in code:
            run(path, _FEATURES, images, cache=cache)
        for _ in range(rounds):
            for path in code:
                passes.append(SHARE * float(run(code[-1], _BARE, images, SHARE, cache=cache)))
                forget_trainings(cache)
                trainings[path].append(float(run(path, _TRAIN, images, Path(folder, "model"), cache=cache)))

    bare = statistics.median(passes)
    print(
        f"bare pass over 8,000 images: {bare:.0f} s of processor time\n\n| code | s | beyond the pass |\n|---|---|---|"
    )
    for path, seconds in trainings.items():
        typical = statistics.median(seconds)
        print(f"| {path.name} | {typical:.0f} | {typical / bare:.2f} x |")


def quality(data: Path, code: list[Path], cache: Path, seeds: int) -> None:
    """Print a table row for each in-domain set, set that is not, and copy: mean AUROC over the seeds."""
    print("| in-domain | not | code | fused | diffusion |\n|---|---|---|---|---|")
    for name, (train, test, outside) in SETS.items():
        for path in code:
            found = []
            for seed in range(seeds):
                images = [data / train, data / test, seed, *(data / ood for ood in outside)]
                found.append(json.loads(run(path, _QUALITY, *images, cache=cache)))
            for ood in outside:
                fused, diffusion = (
                    statistics.mean(each[str(data / ood)][head] for each in found) for head in ("fused", "layerwise")
                )
                print(f"| {name} | {ood} | {path.name} | {fused:.2f} | {diffusion:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "quality"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--code", type=Path, nargs="+", default=[HERE], help="copies of this repository [this one]")
    parser.add_argument("--cache", type=Path, help="keep features there [nowhere]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of cost, seeds of quality [3]")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or Path(folder)
        measure = cost if arguments.what == "cost" else quality
        measure(arguments.data.resolve(), [path.resolve() for path in arguments.code], cache, arguments.rounds)


if __name__ == "__main__":
    main()
