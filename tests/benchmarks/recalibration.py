"""False alarms at another place before and after featdiff recalibrate; the table of RESULTS.md.

    python tests/benchmarks/recalibration.py FOLDER [--model FOLDER]

FOLDER holds what the suite cifar10 reads; CIFAR-10's training images fit a model. Another place is made of its test
images by a change to all of them: 200 recalibrate the model, the others say how many are flagged, ten times over.
Traffic signs and textures with the same change say what is still found.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from featdiff import Detector
from featdiff.data.references import list_images
from featdiff.data.thumbnails import iter_thumbnails
from featdiff.detectors.recalibration import recalibrate

STRANGE = ("gtsrb_32", "dtd_32")
HELD_OUT = 200
ROUNDS = 10
IMAGES = 2000
SIDE = 32


def jpeg(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=30)
    return Image.open(stream).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda picture: picture,
    "brightness x 1.3": lambda picture: ImageEnhance.Brightness(picture).enhance(1.3),
    "brightness x 1.6": lambda picture: ImageEnhance.Brightness(picture).enhance(1.6),
    "brightness x 0.5": lambda picture: ImageEnhance.Brightness(picture).enhance(0.5),
    "blur of 1 pixel": lambda picture: picture.filter(ImageFilter.GaussianBlur(1)),
    "JPEG quality 30": jpeg,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, help="fitted on cifar10.zip/train; default: fitted now")
    arguments = parser.parse_args()
    data = arguments.data
    if arguments.model:
        detector = Detector.from_pretrained(arguments.model)
    else:
        detector = Detector().fit(data / "cifar10.zip" / "train")

    normal = pictures(data / "cifar10.zip" / "test", IMAGES)
    strange = [picture for name in STRANGE for picture in pictures(data / f"{name}.zip", IMAGES // 4)]
    print("| change | flagged before | after (least to most) | strange found before | after |\n|---|---|---|---|---|")
    for name, change in CHANGES.items():
        print_row(detector, name, [change(picture) for picture in normal], [change(picture) for picture in strange])


def pictures(source: Path, most: int) -> list[Image.Image]:
    refs = list_images(source)
    chosen = np.random.default_rng(0).permutation(len(refs))[:most]
    return [picture for picture in iter_thumbnails([refs[i] for i in sorted(chosen)], SIDE) if picture is not None]


def print_row(detector: Detector, name: str, normal: list[Image.Image], strange: list[Image.Image]) -> None:
    scores = [detector.score(images).ood_score for images in (normal, strange)]
    before = [shares(detector, part) for part in scores]
    after = []
    for seed in range(ROUNDS):
        order = np.random.default_rng(seed).permutation(len(normal))
        new = recalibrate(detector, [normal[i] for i in order[:HELD_OUT]]).detector
        after.append((shares(new, scores[0][order[HELD_OUT:]]), shares(new, scores[1])))
    alarms, found = np.array(after).T
    cells = f"{before[0]:.1%} | {alarms.mean():.1%} ({alarms.min():.1%} to {alarms.max():.1%}) | "
    print(f"| {name} | {cells}{before[1]:.0%} | {found.mean():.0%} |", flush=True)


def shares(detector: Detector, scores: np.ndarray) -> float:
    return float(detector.calibration_.flags(scores, detector.fpr)[1].mean())


if __name__ == "__main__":
    main()
