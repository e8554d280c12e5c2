"""People's own folders: views, groups, few images, audits and bad training images; the tables of RESULTS.md.

    python tests/benchmarks/folders.py views --data FOLDER
    python tests/benchmarks/folders.py groups --data FOLDER
    python tests/benchmarks/folders.py few --data FOLDER
    python tests/benchmarks/folders.py audit --data FOLDER
    python tests/benchmarks/folders.py contaminated --data FOLDER
    python tests/benchmarks/folders.py variety --data FOLDER

FOLDER holds flowers.zip, dtd.zip, magnetic_tile.zip and others as configs/README.md describes them.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import featdiff
from featdiff import Detector
from featdiff.data.decoding import decode
from featdiff.data.groups import label_images
from featdiff.data.references import ImageRef, list_images
from featdiff.detectors.local_fit import FEWEST
from featdiff.detectors.local_part import ALIKE, variety
from featdiff.evaluation.metrics import auroc, fpr_at_tpr
from featdiff.features.store import Rows

#: width / height that pictures are cut to.
SHAPES = (1 / 3, 1 / 2, 2 / 3, 3 / 4, 4 / 3, 3 / 2, 2, 3)
#: How a new tile begins in the numbers of the files.
TILES = "gap:120"
ODD = 15


def cut(refs: Sequence[ImageRef], seed: int) -> list[Image.Image]:
    """Pictures cut to shapes chosen at random, at a random place."""
    rng = random.Random(seed)
    pictures = []
    for ref in refs:
        picture = decode(ref.read())
        width, height = picture.size
        aspect = rng.choice(SHAPES)
        new_width = min(width, max(1, round(height * aspect)))
        new_height = min(height, max(1, round(width / aspect)))
        left = rng.randint(0, width - new_width)
        top = rng.randint(0, height - new_height)
        pictures.append(picture.crop((left, top, left + new_width, top + new_height)))
    return pictures


def percent(in_domain: np.ndarray, ood: np.ndarray) -> str:
    """AUROC / FPR95."""
    return f"{100 * auroc(in_domain, ood):.1f} / {100 * fpr_at_tpr(in_domain, ood):.1f}"


def tile_splits(folder: Path, count: int) -> Iterator[tuple[list[ImageRef], list[ImageRef], list[tuple[object, ...]]]]:
    """Images of 70 % of the tiles, those of the others, and the tiles of the former."""
    good = list_images(folder / "magnetic_tile.zip" / "normal")
    labels = label_images(TILES, [ref.path for ref in good])
    names = list(dict.fromkeys(labels))
    for seed in range(count):
        order = np.random.default_rng(seed).permutation(len(names))
        chosen = {names[i] for i in order[: round(0.7 * len(names))]}
        training = [ref for ref, label in zip(good, labels, strict=True) if label in chosen]
        others = [ref for ref, label in zip(good, labels, strict=True) if label not in chosen]
        yield training, others, [label for label in labels if label in chosen]  # type: ignore[misc]


def views(folder: Path) -> None:
    """Flowers as they are and cut to other shapes, and tiles, by view."""
    train = list_images(folder / "flowers.zip" / "train")
    test = list_images(folder / "flowers.zip" / "test")
    textures = list_images(folder / "dtd.zip")
    cut_test = cut(test, seed=0)
    cut_textures = cut(textures, seed=1)
    defects = list_images(folder / "magnetic_tile.zip" / "defect")
    tiles, other_tiles, labels = next(tile_splits(folder, 1))

    print("| view | tiles, one split | flowers | flowers, cut | flagged of them at 5 % |")
    for view in ("crop", "squash", "whole"):
        detector = Detector(view=view).fit(train)
        whole = percent(detector.score(test).ood_score, detector.score(textures).ood_score)
        scores = detector.score(cut_test)
        shapes = percent(scores.ood_score, detector.score(cut_textures).ood_score)

        detector = Detector(view=view).fit(tiles, groups=labels)
        tile = percent(detector.score(other_tiles).ood_score, detector.score(defects).ood_score)
        print(f"| {view} | {tile} | {whole} | {shapes} | {100 * scores.is_ood.mean():.1f} |", flush=True)


def groups(folder: Path, splits: int) -> None:
    """False alarms on tiles that were held out, by how images are grouped."""
    defects = list_images(folder / "magnetic_tile.zip" / "defect")
    print("| groups | AUROC / FPR95 | false alarms at 5 %: mean (each split) | defects flagged | groups found |")
    for how in ("none", "auto", TILES):
        measured: list[tuple[np.ndarray, np.ndarray]] = []
        alarms = []
        flagged = []
        counts = []
        for training, others, _ in tile_splits(folder, splits):
            detector = Detector(calibration=0.2 if how == "none" else "auto").fit(training, groups=how)
            normal = detector.score(others)
            odd = detector.score(defects)
            measured.append((normal.ood_score, odd.ood_score))
            alarms.append(100 * normal.is_ood.mean())
            flagged.append(100 * odd.is_ood.mean())
            counts.append(detector.calibration_.groups)

        area = 100 * np.mean([auroc(*pair) for pair in measured])
        rate = 100 * np.mean([fpr_at_tpr(*pair) for pair in measured])
        each = ", ".join(f"{alarm:.1f}" for alarm in alarms)
        found = f"{min(counts)} to {max(counts)}"
        row = f"| {how} | {area:.1f} / {rate:.1f} | {np.mean(alarms):.1f} ({each}) | {np.mean(flagged):.1f} | {found} |"
        print(row, flush=True)


def few(folder: Path, splits: int) -> None:
    """False alarms and detection on flowers by the number of training images, split once and by five folds."""
    train = list_images(folder / "flowers.zip" / "train")
    test = list_images(folder / "flowers.zip" / "test")
    textures = list_images(folder / "dtd.zip")
    print("| images | calibration | false alarms at 5 % | textures flagged | training, s |")
    for count in (60, 120, 250):
        for calibration in (0.2, "auto"):
            alarms = []
            flagged = []
            seconds = 0.0
            for seed in range(splits):
                chosen = np.random.default_rng(seed).permutation(len(train))[:count]
                detector = Detector(calibration=calibration, seed=seed)
                try:
                    detector.fit([train[i] for i in chosen])
                except featdiff.FeatdiffError as error:
                    print(f"| {count} | {calibration} | {error} |", flush=True)
                    break
                alarms.append(100 * detector.score(test).is_ood.mean())
                flagged.append(100 * detector.score(textures).is_ood.mean())
                seconds = detector.training_seconds_
            if alarms:
                spread = f"{np.mean(alarms):.1f} ± {np.std(alarms):.1f}"
                row = f"| {count} | {calibration} | {spread} | {np.mean(flagged):.1f} | {seconds:.0f} |"
                print(row, flush=True)


def audits(folder: Path, repeats: int) -> None:
    """15 odd images hidden among ordinary ones of the same folder."""
    ordinary = {
        "250 flowers": (list_images(folder / "flowers.zip" / "train"), 250),
        "500 CIFAR-10": (list_images(folder / "cifar10.zip" / "test"), 500),
    }
    print("| among | odd | AUROC | of the 15 strangest, so many are odd | seconds after the features |")
    for name, (refs, count) in ordinary.items():
        for odd in ("dtd", "tiny_imagenet", "fashion_mnist_32", "gtsrb_32"):
            strange = list_images(folder / f"{odd}.zip")
            areas = []
            found = []
            seconds = 0.0
            for seed in range(repeats):
                rng = np.random.default_rng(seed)
                chosen = [refs[i] for i in rng.permutation(len(refs))[:count]]
                hidden = [strange[i] for i in rng.permutation(len(strange))[:ODD]]
                Detector().read(chosen + hidden)
                start = time.perf_counter()
                scores = featdiff.audit(chosen + hidden).ood_score
                seconds = time.perf_counter() - start
                areas.append(100 * auroc(scores[:count], scores[count:]))
                found.append(int((np.argsort(-scores)[:ODD] >= count).sum()))
            each = ", ".join(map(str, found))
            print(f"| {name} | {odd} | {np.mean(areas):.1f} | {each} | {seconds:.1f} |", flush=True)


def contaminated(folder: Path, repeats: int) -> None:
    """Flowers, of which some are pictures of another set: what becomes of detection and of false alarms."""
    train = list_images(folder / "flowers.zip" / "train")
    test = list_images(folder / "flowers.zip" / "test")
    strange = {name: list_images(folder / f"{name}.zip") for name in ("dtd", "gtsrb_32", "tiny_imagenet")}
    count = 1000
    print("| bad images | share | false alarms at 5 % | same kind: AUROC, flagged | others: AUROC, flagged |")
    for bad in ("dtd", "gtsrb_32"):
        for share in (0.0, 0.01, 0.05, 0.1):
            alarms = []
            same: list[tuple[float, float]] = []
            others: list[tuple[float, float]] = []
            for seed in range(repeats):
                rng = np.random.default_rng(seed)
                order = rng.permutation(len(strange[bad]))
                extra = round(share * count)
                flowers = [train[i] for i in rng.permutation(len(train))[: count - extra]]
                detector = Detector(seed=seed).fit(flowers + [strange[bad][i] for i in order[:extra]])

                normal = detector.score(test)
                alarms.append(100 * normal.is_ood.mean())
                for name, refs in strange.items():
                    unseen = [refs[i] for i in order[200:]] if name == bad else refs
                    scores = detector.score(unseen)
                    pair = (100 * auroc(normal.ood_score, scores.ood_score), 100 * scores.is_ood.mean())
                    (same if name == bad else others).append(pair)

            row = f"| {bad} | {100 * share:.0f} % | {np.mean(alarms):.1f} |"
            for pairs in (same, others):
                area, flagged = np.mean(pairs, axis=0)
                row += f" {area:.1f}, {flagged:.1f} |"
            print(row, flush=True)


def varieties(folder: Path) -> None:
    """What decides whether there is a local score, for whole sets and for single classes."""
    sets = {"magnetic tiles": folder / "magnetic_tile.zip" / "normal"}
    for name, source in (
        ("CIFAR-10", folder / "cifar10.zip" / "train"),
        ("flowers", folder / "flowers.zip" / "train"),
        ("Tiny ImageNet", folder / "tiny_imagenet.zip"),
        ("traffic signs", folder / "gtsrb_32.zip"),
        ("Fashion-MNIST", folder / "fashion_mnist_32.zip"),
        ("textures", folder / "dtd.zip"),
    ):
        sets[name] = source

    detector = Detector()
    print("| set | variety | least of its classes | local score |")
    for name, source in sets.items():
        refs = list_images(source)
        extraction, store = detector.read(refs[:: max(1, len(refs) // 1000)])
        features = store.table(extraction.digests)
        whole = variety(features, detector.extractor_)

        classes = np.array([path.split("/")[-2] for path in extraction.paths])
        alone = []
        for label in np.unique(classes):
            rows = np.flatnonzero(classes == label)
            if len(rows) >= FEWEST:
                alone.append(variety(Rows(features[rows]), detector.extractor_))
        least = f"{min(alone):.2f}" if alone else "-"
        print(f"| {name} | {whole:.2f} | {least} | {'on' if whole < ALIKE else 'off'} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["views", "groups", "few", "audit", "contaminated", "variety"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.what == "views":
        views(arguments.data)
    elif arguments.what == "groups":
        groups(arguments.data, arguments.repeats)
    elif arguments.what == "few":
        few(arguments.data, arguments.repeats)
    elif arguments.what == "variety":
        varieties(arguments.data)
    elif arguments.what == "contaminated":
        contaminated(arguments.data, arguments.repeats)
    else:
        audits(arguments.data, arguments.repeats)


if __name__ == "__main__":
    main()
