"""What LMD finds at which setting, and what an image costs there, beside the feature mode in the same run.

    python tests/benchmarks/lmd.py --data FOLDER --trunk-weights squeezenet1_1.safetensors

Trains on the suite ``lmd`` (cached: ``featdiff bench lmd`` shares it). AUROC / FPR95 on 150 images of each set. The
paper's setting, 1000 steps and 10 repetitions, is timed on a few images and not evaluated: it would take hours.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from featdiff import Detector, FeatureExtractor, PixelDetector
from featdiff.diffusion.masks import make_masks
from featdiff.diffusion.schedules import make_sampler
from featdiff.evaluation.costs import timed_pass
from featdiff.evaluation.metrics import auroc, fpr_at_tpr
from featdiff.evaluation.suite_images import find_images
from featdiff.evaluation.suites import load_suite
from featdiff.features.backbones import load_backbone
from featdiff.runtime.allocator import keep_freed_memory
from featdiff.scores.distances import FeatureCosine

SUITE = Path(__file__).parents[2] / "configs" / "suites" / "lmd.toml"
#: sampler, steps, repetitions
SETTINGS = (
    *(("ddim", 5, 1), ("ddim", 10, 1), ("ddim", 10, 2), ("ddim", 20, 1), ("ddim", 20, 4)),
    *(("dpm++", 5, 1), ("dpm++", 10, 1), ("dpm++", 20, 4)),
    *(("ddpm", 5, 1), ("ddpm", 10, 1), ("ddpm", 10, 2), ("ddpm", 20, 1), ("ddpm", 20, 4), ("ddpm", 100, 4)),
)
DEFAULT = ("ddpm", 20, 4)
PAPER = ("ddpm", 1000, 10)
OOD = ("gtsrb", "digits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--trunk-weights", type=Path)
    parser.add_argument("--images", type=int, default=150, help="of each set, for AUROC")
    parser.add_argument("--timed", type=int, default=2, help="images at the paper's setting")
    options = parser.parse_args()
    keep_freed_memory()

    sources = load_suite(SUITE).sources
    train, test, *ood = (find_images(sources[name], options.data) for name in ("train", "test", *OOD))
    feature, pixel = Detector().fit(train), PixelDetector(weights=options.trunk_weights).fit(train)
    sets = {name: rows_of(pixel, refs, options.images) for name, refs in zip(("id", *OOD), (test, *ood), strict=True)}
    fast = feature_seconds(feature, test)
    print(
        f"feature mode: {1 / fast:.1f} images/s; {len(train):,} images to train, "
        f"the U-Net took {pixel.training_seconds_:.0f} s"
    )
    pixel.heads_.distances["features"] = FeatureCosine(FeatureExtractor(load_backbone()))
    names = pixel.heads_.names
    columns = [f"{ood}: {name}" for name in names for ood in OOD]
    print(f"| sampler | steps | repetitions | {' | '.join(columns)} | s / image | x feature mode |")
    print("|---|" + "---:|" * (len(columns) + 4))
    for setting in SETTINGS:
        use(pixel, *setting)
        seconds, cells = measured(pixel, sets, names[:-1])
        # slow, and not needed for the rest
        features = measured(pixel, sets, names[-1:])[1] if setting == DEFAULT else [""] * len(OOD)
        line(setting, cells + features, seconds, fast)
    use(pixel, *PAPER)
    start = time.perf_counter()
    distances(pixel, sets["id"][: options.timed], names[:1])
    line(PAPER, [""] * len(columns), (time.perf_counter() - start) / options.timed, fast)


def measured(detector: PixelDetector, sets: dict[str, Tensor], names: list[str]) -> tuple[float, list[str]]:
    """Seconds for an image, and AUROC / FPR95 for each distance and OOD set."""
    start = time.perf_counter()
    found = {name: distances(detector, rows, names) for name, rows in sets.items()}
    seconds = (time.perf_counter() - start) / sum(map(len, sets.values()))
    cells = []
    for i in range(len(names)):
        for name in OOD:
            pair = found["id"][:, i].numpy(), found[name][:, i].numpy()
            cells.append(f"{100 * auroc(*pair):.1f} / {100 * fpr_at_tpr(*pair):.1f}")
    return seconds, cells


def line(setting: tuple[str, int, int], cells: list[str], seconds: float, fast: float) -> None:
    parts = [*map(str, setting), *cells, f"{seconds:.3g}", f"{seconds / fast:,.0f}"]
    print(f"| {' | '.join(parts)} |", flush=True)


def rows_of(detector: PixelDetector, refs: list, count: int) -> Tensor:
    """Rows of ``count`` images, evenly spread over a set."""
    chosen = [refs[i] for i in np.linspace(0, len(refs) - 1, min(count, len(refs))).astype(int)]
    stacks = [stack for batch in detector.batches(chosen)[0] for stack in batch.stacks]
    return torch.cat([detector.extractor_(stack.pixels) for stack in stacks])


def feature_seconds(detector: Detector, refs: list) -> float:
    """Seconds for an image: decoding, backbone and all heads."""
    timed = timed_pass(detector, refs)
    seconds, features = timed.seconds, timed.features
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        for part in features.split(detector.batches_at_once * detector.settings.image_batch):
            detector.score_features(part)
        best = min(best, time.perf_counter() - start)
    return seconds + best / len(features)


def use(detector: PixelDetector, sampler: str, steps: int, repetitions: int) -> None:
    heads = detector.heads_
    heads.sampler = make_sampler(sampler, heads.scheduler, steps)
    heads.masks = make_masks("checkerboard_alt", heads.pixels.size, repetitions)[:, None].to(heads.masks.device)


def distances(detector: PixelDetector, rows: Tensor, names: list[str]) -> Tensor:
    at_once = max(1, 32 // len(detector.heads_.masks))
    return torch.cat([detector.heads_(part, names) for part in rows.split(at_once)])


if __name__ == "__main__":
    main()
