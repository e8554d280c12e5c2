"""How many flags of a batch are false by --fdr, and how many strange images are found; the table of RESULTS.md.

    python tests/benchmarks/fdr.py [--batches 500]
    python tests/benchmarks/fdr.py --data FOLDER [--model FOLDER]

The first line draws scores. The second takes real ones: FOLDER holds what the suite cifar10 reads; CIFAR-10's training
images fit a model. Each batch has a calibration set of its own, drawn from the held-out and the test images, and its
normal images are others of them; its strange ones come from the far sets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from featdiff import Detector
from featdiff.verdicts.calibration import Calibration
from featdiff.verdicts.fdr import fdr_threshold

LEVELS = (0.05, 0.1, 0.2)
SHARES = (0.0, 0.1, 0.5)
FAR = ("gtsrb_32", "fashion_mnist_32", "tiny_imagenet_32", "dtd_32")
HELD_OUT = 1600
IMAGES = 500
#: Strange images of each set that are scored.
STRANGE = 500

#: (random generator, how many normal, how many strange images) -> scores of held-out, of normal and of strange images.
Draw = Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray, np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path, help="fitted on cifar10.zip/train; default: fitted now")
    arguments = parser.parse_args()
    if not arguments.data:
        print_table(drawn, arguments.batches)
        return

    detector = Detector.from_pretrained(arguments.model) if arguments.model else fitted(arguments.data)
    test = detector.score(arguments.data / "cifar10.zip" / "test").ood_score
    normal = np.concatenate([detector.calibration_.scores, test])
    for name in FAR:
        strange = detector.score(arguments.data / f"{name}.zip").ood_score
        strange = np.random.default_rng(0).permutation(strange[np.isfinite(strange)])[:STRANGE]
        print(f"\n{name}")
        print_table(of_real(normal, strange), arguments.batches)


def fitted(data: Path) -> Detector:
    return Detector().fit(data / "cifar10.zip" / "train")


def drawn(rng: np.random.Generator, normal: int, strange: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return rng.standard_normal(HELD_OUT), rng.standard_normal(normal), rng.standard_normal(strange) + 3


def of_real(normal: np.ndarray, strange: np.ndarray) -> Draw:
    def draw(rng: np.random.Generator, count: int, others: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mixed = rng.permutation(normal)
        return mixed[:HELD_OUT], mixed[HELD_OUT : HELD_OUT + count], rng.choice(strange, others)

    return draw


def print_table(draw: Draw, batches: int) -> None:
    print("| strange | fdr | false flags, mean and its error | found | batches with a flag |\n|---|---|---|---|---|")
    for share in SHARES:
        for level in LEVELS:
            false, found, any_flag = [], [], 0
            for seed in range(batches):
                strange = int(share * IMAGES)
                held_out, *parts = draw(np.random.default_rng(seed), IMAGES - strange, strange)
                p_values = Calibration(held_out).p_values(np.concatenate(parts))
                flags = p_values <= fdr_threshold(p_values, level)
                wrong = flags[: IMAGES - strange].sum()
                false.append(wrong / max(1, flags.sum()))
                found.append((flags.sum() - wrong) / max(1, strange))
                any_flag += bool(flags.any())
            error = np.std(false) / np.sqrt(batches)
            cells = f"{np.mean(false):.3f} ± {error:.3f} | {np.mean(found):.0%} | {any_flag / batches:.0%}"
            print(f"| {share:.0%} | {level:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
