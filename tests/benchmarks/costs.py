"""What featdiff costs, as in the README's table: times beside a bare backbone pass, false alarms, memory, invariance.

    python tests/benchmarks/costs.py --data FOLDER

FOLDER holds cifar10.zip (train/ and test/). Nothing is cached between runs, and nothing else should run beside it.
Takes about 15 minutes on two cores. (How well it detects: featdiff bench cifar10 --data FOLDER.)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

BATCH = 32

_BARE = """
import sys, time
from featdiff import FeatureExtractor
from featdiff.data.batches import iter_batches, iter_loaded
from featdiff.data.references import list_images
from featdiff.features.backbones import load_backbone
from featdiff.runtime.allocator import keep_freed_memory
import torch
keep_freed_memory()
extractor = FeatureExtractor(load_backbone())
start = time.perf_counter()
loaded = iter_loaded(list_images(sys.argv[1]), extractor.transform, ahead=64)
with torch.inference_mode():
    for batch in iter_batches(loaded, int(sys.argv[2])):
        for stack in batch.stacks:
            pixels = stack.pixels.contiguous(memory_format=torch.channels_last)
            extractor.model.forward_intermediates(pixels, intermediates_only=True)
print(time.perf_counter() - start)
"""


def run(*command: object, cache: Path) -> tuple[str, float]:
    """Standard output of a command and the seconds it took, start of Python included."""
    start = time.perf_counter()
    environment = {**os.environ, "FEATDIFF_CACHE": str(cache)}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{command}: {done.stderr}")
    return done.stdout, time.perf_counter() - start


def bare_pass(images: Path, cache: Path) -> tuple[float, float]:
    """Decode and forward only: (seconds of the loop, seconds of the whole process)."""
    out, total = run(sys.executable, "-c", _BARE, images, BATCH, cache=cache)
    return float(out), total


def peak_megabytes(images: Path, model: Path, cache: Path) -> float:
    """Peak resident memory of ``featdiff train`` on these images."""
    code = (
        "import resource, subprocess, sys;"
        "subprocess.run(['featdiff', 'train', *sys.argv[1:]], check=True, capture_output=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    out, _ = run(sys.executable, "-c", code, images, "-o", model, "--force", cache=cache)
    return float(out)


def subset(archive: Path, share: int, target: Path) -> Path:
    """Every ``share``-th training image of a zip, as a zip of its own."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as out:
        names = sorted(name for name in source.namelist() if name.startswith("train/") and name.endswith(".jpg"))
        for name in names[::share]:
            out.writestr(name, source.read(name))
    return target


def invariance(model: Path, images: Path, cache: Path) -> float:
    """Largest score difference between batch sizes 1, 7 and 64 in shuffled order, in ID standard deviations."""
    os.environ["FEATDIFF_CACHE"] = str(cache)
    from featdiff import Detector
    from featdiff.data.references import list_images

    names = [ref.path for ref in list_images(str(images))][:500]
    reference: dict[str, float] = {}
    worst = 0.0
    for size in (32, 1, 7, 64):
        order = names if size == 32 else list(np.random.default_rng(size).permutation(names))
        scores = Detector.from_pretrained(model, image_batch=size).score(order)
        found = dict(zip(scores.path, scores.ood_score, strict=True))
        reference = reference or found
        worst = max(worst, *(abs(found[name] - reference[name]) for name in names))
    return worst / float(np.std(list(reference.values())))


def startup() -> float:
    """Seconds of ``featdiff --help``, best of five."""
    return min(run("featdiff", "--help", cache=Path())[1] for _ in range(5))


def main() -> None:
    """Measure everything and print the lines of a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data: Path = parser.parse_args().data
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        train, test, model = data / "cifar10.zip" / "train", data / "cifar10.zip" / "test", work / "model"
        _, bare_train = bare_pass(train, work)
        _, train_seconds = run("featdiff", "train", train, "-o", model, cache=work / "cache")
        rows.append(
            ("`featdiff train`, 8,000 images, beyond a bare backbone pass", f"{train_seconds / bare_train - 1:.2f} x")
        )
        _, bare_test = bare_pass(test, work)
        scores, score_seconds = run("featdiff", "score", test, "-m", model, "--format", "jsonl", cache=work / "cache")
        rows.append(("`featdiff score`, 2,000 images, over a bare backbone pass", f"{score_seconds / bare_test:.2f} x"))
        alone = work / "alone.toml"
        alone.write_text('[detector]\nhead = "layerwise"\n')
        run("featdiff", "train", train, "-o", work / "alone", "--config", alone, cache=work / "cache")
        _, alone_seconds = run(
            "featdiff", "score", test, "-m", work / "alone", "--format", "jsonl", cache=work / "cache"
        )
        rows.append(('the same, diffusion alone (`head = "layerwise"`)', f"{alone_seconds / bare_test:.2f} x"))
        rows.append(("bare backbone pass", f"{8000 / bare_train:.0f} images/s"))
        flags = [json.loads(line)["is_ood"] for line in scores.splitlines()]
        rows.append((f"false alarms at `--fpr 0.05`, {len(flags):,} ID test images", f"{100 * np.mean(flags):.1f} %"))
        size = sum(file.stat().st_size for file in model.iterdir()) / 1e6
        rows.append(("model folder", f"{size:.1f} MB"))
        rows.append(("largest score change, batch 1, 7, 64, shuffled", f"{invariance(model, test, work):.1e} sd"))
        small = peak_megabytes(subset(data / "cifar10.zip", 4, work / "small.zip"), work / "m", work / "cache2")
        large = peak_megabytes(train, work / "m", work / "cache3")
        rows.append(("peak memory of training on 2,000 / 8,000 images", f"{small:,.0f} / {large:,.0f} MB"))
        rows.append(("`featdiff --help`", f"{startup():.2f} s"))
    for name, value in rows:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
