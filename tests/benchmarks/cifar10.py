"""The measured tables of the README: CIFAR-10 in, four sets out; three class splits; times, memory and invariance.

    python tests/benchmarks/cifar10.py --data FOLDER

FOLDER holds cifar10.zip (train/ and test/), gtsrb_32.zip, fashion_mnist_32.zip, tiny_imagenet_32.zip, dtd_32.zip,
tiny_imagenet.zip and dtd.zip. Nothing is cached between runs. Takes about 20 minutes on two cores.
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
from typing import Any

import numpy as np

SETS = ("gtsrb_32", "fashion_mnist_32", "tiny_imagenet_32", "dtd_32")
#: near OOD: six classes in, the other four out
SPLITS = (
    "airplane automobile bird deer frog truck",
    "cat dog horse deer bird frog",
    "airplane ship automobile truck dog horse",
)
SHARP_SETS = ("tiny_imagenet", "dtd")  # the same pictures at their own size: as-published
BATCH = 32

_BARE = """
import sys, time
from featdiff import FeatureExtractor
from featdiff.allocator import keep_freed_memory
from featdiff.backbones import load_backbone
from featdiff.images import iter_batches, iter_loaded
from featdiff.sources import list_images
import torch
keep_freed_memory()
extractor = FeatureExtractor(load_backbone())
start = time.perf_counter()
loaded = iter_loaded(list_images(sys.argv[1]), extractor.transform, ahead=64)
with torch.inference_mode():
    for batch in iter_batches(loaded, int(sys.argv[2])):
        pixels = batch.pixels.contiguous(memory_format=torch.channels_last)
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
    from featdiff.sources import list_images

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
    """Measure everything and print a Markdown table."""
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
        rows.append(("bare backbone pass", f"{8000 / bare_train:.0f} images/s"))
        flags = [json.loads(line)["is_ood"] for line in scores.splitlines()]
        rows.append((f"false alarms at `--fpr 0.05`, {len(flags):,} ID test images", f"{100 * np.mean(flags):.1f} %"))
        size = sum(file.stat().st_size for file in model.iterdir()) / 1e6
        rows.append(("model folder", f"{size:.1f} MB"))
        print(table(far(data, model, work / "cache")), flush=True)
        print(table(near(data, work, work / "cache")), flush=True)
        rows.append(("largest score change, batch 1, 7, 64, shuffled", f"{invariance(model, test, work):.1e} sd"))
        small = peak_megabytes(subset(data / "cifar10.zip", 4, work / "small.zip"), work / "m", work / "cache2")
        large = peak_megabytes(train, work / "m", work / "cache3")
        rows.append(("peak memory of training on 2,000 / 8,000 images", f"{small:,.0f} / {large:,.0f} MB"))
        rows.append(("`featdiff --help`", f"{startup():.2f} s"))
    for name, value in rows:
        print(f"| {name} | {value} |")


def evaluated(model: Path, cache: Path, *options: object) -> list[dict[str, Any]]:
    """The pairs of ``featdiff eval --rivals --json``."""
    out, _ = run("featdiff", "eval", "-m", model, "--rivals", "--json", *options, cache=cache)
    return list(json.loads(out)["pairs"])


def far(data: Path, model: Path, cache: Path) -> list[dict[str, Any]]:
    """Every set by both protocols that it is made for."""
    pairs = []
    for protocol, names in (("matched", SETS), ("as-published", SHARP_SETS)):
        sets = [part for name in names for part in ("--ood", f"{name}={data / name}.zip")]
        pairs += evaluated(model, cache, "--id", data / "cifar10.zip" / "test", *sets, "--protocol", protocol)
    return pairs


def near(data: Path, work: Path, cache: Path) -> list[dict[str, Any]]:
    """Trained on six classes, tested on those against the other four."""
    archive, pairs = data / "cifar10.zip", []
    with zipfile.ZipFile(archive) as source:
        classes = sorted({name.split("/")[1] for name in source.namelist() if name.startswith("test/")} - {""})
        for i, split in enumerate(map(str.split, SPLITS)):
            others = work / f"others{i}.zip"
            with zipfile.ZipFile(others, "w") as out:
                for name in sorted(source.namelist()):
                    if name.startswith("test/") and name.endswith(".jpg") and name.split("/")[1] not in split:
                        out.writestr(name, source.read(name))
            kept = [name for name in classes if name in split]
            run("featdiff", "train", *(archive / "train" / k for k in kept), "-o", work / f"near{i}", cache=cache)
            tests = [part for k in kept for part in ("--id", archive / "test" / k)]
            sets = ("--ood", f"split {i + 1}={others}", "--protocol", "matched")
            pairs += evaluated(work / f"near{i}", cache, *tests, *sets)
    return pairs


def table(pairs: list[dict[str, Any]]) -> str:
    """Markdown: one line per head, AUROC / FPR95 for each pair, and the means of ``matched`` sets."""
    matched = [pair for pair in pairs if pair["protocol"] == "matched"]
    lines = ["| score | " + " | ".join(f"{p['ood']} {p['protocol']}" for p in pairs) + " | mean of matched |"]
    lines.append("|---" * (len(pairs) + 2) + "|")
    for head in pairs[0]["heads"]:
        found = [pair["heads"][head] for pair in pairs]
        means = [100 * np.mean([pair["heads"][head][key] for pair in matched]) for key in ("auroc", "fpr95")]
        cells = [f"{100 * m['auroc']:.1f} / {100 * m['fpr95']:.1f}" for m in found]
        lines.append(f"| {head} | " + " | ".join(cells) + f" | {means[0]:.2f} / {means[1]:.2f} |")
    low_high = [[round(100 * value, 1) for value in pair["heads"]["featdiff"]["auroc_ci"]] for pair in pairs]
    return "\n".join([*lines, f"95 % intervals of featdiff's AUROC: {low_high}"])


if __name__ == "__main__":
    main()
