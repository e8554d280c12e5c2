"""How long FeatureDiffusion takes to fit 8,000 x 320, and how many rows a second it scores; what more rows gain.

    python tests/benchmarks/vectors.py [--data FOLDER --rows N ...]

Vectors of the first part are made up: time does not depend on what they say. Nothing else should run beside it. With
``--data`` they are drawn like those of CIFAR-10's images, a Gaussian for each class: six classes are in, four are out.
FOLDER holds cifar10.zip.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featdiff import Detector, FeatureDiffusion
from featdiff.data.references import list_images
from featdiff.evaluation.metrics import auroc

ROUNDS = 9
IN = ("airplane", "automobile", "cat", "deer", "frog", "truck")
OUT = ("bird", "dog", "horse", "ship")
FRESH = 20_000
BANK = 5_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[8_000, 50_000, 200_000, 1_000_000])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.data:
        what_more_rows_gain(arguments.data, arguments.rows, arguments.seeds)
    else:
        how_fast()


def how_fast() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(64, 320))
    train, fresh = (rng.normal(size=(rows, 64)) @ mixing for rows in (8_000, 50_000))
    start = time.perf_counter()
    detector = FeatureDiffusion().fit(train)
    print(f"fit 8,000 x 320: {time.perf_counter() - start:.1f} s", flush=True)
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        flagged = (detector.predict(fresh) == -1).mean()
        rates.append(len(fresh) / (time.perf_counter() - start))
    print(f"score: {np.median(rates):,.0f} rows/s (median of {ROUNDS}; best {max(rates):,.0f})")
    print(f"false alarms at fpr 0.05: {flagged:.1%}")


def what_more_rows_gain(data: Path, counts: Sequence[int], seeds: int) -> None:
    """AUROC of fresh rows of the six classes against those of the four, by the number of rows of a fit."""
    gaussians = class_gaussians(data)
    print("| rows | neighbors | AUROC of each seed | mean | fit, s |\n|---|---|---|---|---|")
    for neighbors in (0, 5):
        for count in counts:
            found, seconds = [], []
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                known, fresh, strange = (
                    drawn([gaussians[name] for name in names], rows, rng)
                    for names, rows in ((IN, count), (IN, FRESH), (OUT, FRESH))
                )
                start = time.perf_counter()
                detector = FeatureDiffusion(neighbors=neighbors, bank_size=BANK, random_state=seed).fit(
                    known, groups="none"
                )
                seconds.append(time.perf_counter() - start)
                found.append(100 * auroc(-detector.score_samples(fresh), -detector.score_samples(strange)))
            each = ", ".join(f"{value:.2f}" for value in found)
            print(f"| {count:,} | {neighbors} | {each} | {np.mean(found):.2f} | {np.median(seconds):.0f} |", flush=True)


def class_gaussians(data: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean (320,) and covariance (320, 320) of the last stage, for each class of CIFAR-10's training images."""
    images = list_images(data / "cifar10.zip" / "train")
    detector = Detector(recipe={"epochs": 1, "min_steps": 1}, calibration=0.2).fit(images[:500])
    paths, features = detector.features(images)
    rows = features[:][:, detector.extractor_.layout.last_stage.columns].double().numpy()
    classes = np.array([path.split("/")[-2] for path in paths])
    return {name: (rows[classes == name].mean(0), np.cov(rows[classes == name].T)) for name in (*IN, *OUT)}


def drawn(gaussians: Sequence[tuple[np.ndarray, np.ndarray]], count: int, rng: np.random.Generator) -> np.ndarray:
    """Rows (count, 320), as many of each Gaussian, in random order."""
    each = -(-count // len(gaussians))
    rows = np.concatenate([draw(mean, covariance, each, rng) for mean, covariance in gaussians])
    return rng.permutation(rows)[:count]


def draw(mean: np.ndarray, covariance: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))).astype(np.float32)
    return rng.standard_normal((count, len(mean)), np.float32) @ root.T + mean.astype(np.float32)


if __name__ == "__main__":
    main()
