"""featdiff update beside training anew on everything: AUROC, false alarms and time; the table of RESULTS.md.

    python tests/benchmarks/updating.py --data FOLDER [--cache FOLDER --seconds SECONDS] [--case same]
    python tests/benchmarks/updating.py --data FOLDER --case tiles [--split 1]

FOLDER holds cifar10.zip and the other sets of 32 px. A model is fitted on most of the training images, and the others
are added to it: of the same classes (every fourth image), or two classes that it has not seen. Time is that of the
processor and includes the features, of all images for a training anew, and of the new ones for an update. To measure
updates again, give the cache of an earlier run and the time that its training anew took.

The second line needs magnetic_tile.zip: a model with a local score is fitted on the good images of three quarters of
some tiles, and those of the other quarter are added. It is asked for defects, and for good images of other tiles.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from folders import tile_splits

from featdiff import Detector
from featdiff.data.references import ImageRef, list_images
from featdiff.detectors import fitting
from featdiff.detectors.updating import Changes, update
from featdiff.evaluation.metrics import auroc
from featdiff.features.store import FeatureStore, FeatureTable

FAR = ("gtsrb_32", "fashion_mnist_32", "tiny_imagenet_32", "dtd_32")
#: The classes that are added in the second case.
LATER = ("cat", "ship")
CASES: dict[str, Callable[[int, ImageRef], bool]] = {
    "same": lambda i, ref: i % 4 == 3,
    "classes": lambda i, ref: any(f"/{name}/" in ref.path for name in LATER),
}
#: How models with a local score are calibrated.
TILE_CASES: dict[str, Any] = {"tiles": 0.2, "tiles-by-folds": "auto"}
FPR = 0.05

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="of features, for all whose time is not taken")
    parser.add_argument("--seconds", type=float, help="of a training anew; default: measured, in an empty cache")
    parser.add_argument("--case", choices=[*CASES, *TILE_CASES], help="only this one; without, all but tiles")
    parser.add_argument("--split", type=int, default=0, help="of the tiles, which are divided at random")
    parser.add_argument("--steps", type=float, default=fitting._STEPS, help="share of the steps of a training anew")
    parser.add_argument("--rate", type=float, default=fitting._RATE, help="share of its learning rate")
    arguments = parser.parse_args()
    fitting._STEPS, fitting._RATE = arguments.steps, arguments.rate
    with tempfile.TemporaryDirectory() as folder:
        if arguments.case in TILE_CASES:
            run_tiles(arguments.data, Path(folder), arguments.case, arguments.split)
            return
        cases = [arguments.case] if arguments.case else list(CASES)
        run(arguments.data, arguments.cache or Path(folder) / "all", arguments.seconds, cases, Path(folder))


def run(data: Path, cache: Path, anew_seconds: float | None, cases: list[str], folder: Path) -> None:
    images = list_images(data / "cifar10.zip" / "train")
    if anew_seconds is None:
        place = folder / "anew" if cache.exists() else cache
        _, anew_seconds = timed(lambda: Detector(cache=place).fit(images))
    anew = Detector(cache=cache).fit(images)
    sets = Sets(data, anew)
    print("| | model | " + " | ".join(FAR) + " | mean | false alarms, test | time, s | of training anew |")
    print("|---|---|" + "---|" * (len(FAR) + 4))
    row("", "anew, on all", sets, anew, anew_seconds, anew_seconds)

    for case in cases:
        is_new = CASES[case]
        old = [ref for i, ref in enumerate(images) if not is_new(i, ref)]
        new = [ref for i, ref in enumerate(images) if is_new(i, ref)]
        place = folder / case
        copy_features(cache, old, place)
        before = Detector(cache=place).fit(old)
        row(case, "before", sets, before, 0, anew_seconds)
        before.save_pretrained(folder / "model")
        size = sum(file.stat().st_size for file in (folder / "model").iterdir())

        for source in ("features in the cache", "cache gone"):
            there = place if source == "features in the cache" else folder / f"{case} gone"
            (after, changes), seconds = timed(functools.partial(loaded_and_updated, folder / "model", new, there))
            row(case, f"updated, {source}", sets, after, seconds, anew_seconds)
            tell(changes, size)


def copy_features(cache: Path, images: list[ImageRef], target: Path) -> None:
    """A cache as it is after a fit on these images, without computing their features again or repeating trainings."""
    extraction, store = Detector(cache=cache).read(images)
    digests = list(dict.fromkeys(extraction.digests))
    copied = FeatureStore(target / "features" / store.folder.name, store.width)
    start = 0
    for part in store.table(digests).chunks():
        for digest, vector in zip(digests[start:], part.numpy(), strict=False):
            copied.add(digest, vector)
        start += len(part)
    copied.flush()
    for file in store.folder.glob("training-*.pt"):
        shutil.copy(file, copied.folder)
    shutil.copytree(cache / "engines", target / "engines")


def loaded_and_updated(model: Path, images: list[ImageRef], cache: Path) -> tuple[Detector, Changes]:
    return update(Detector.from_pretrained(model, cache=cache), images, accept=True)


def tell(changes: Changes, size: int) -> None:
    told = {name: f"{was:.1%} -> {now:.1%}" for name, (was, now) in changes.false_alarms.items()}
    print(
        f"    {changes.added:,} new, {changes.strange:.0%} flagged; {changes.held_out} held out, flagged: {told};"
        f" features of {changes.at_hand:,} of {changes.old_images:,} old images; model {size / 1e6:.2f} MB",
        flush=True,
    )


class Sets:
    """Features of the test images and of the OOD sets: all models here look through one backbone."""

    def __init__(self, data: Path, detector: Detector) -> None:
        self.test = detector.features(data / "cifar10.zip" / "test")[1]
        self.far = {name: detector.features(data / f"{name}.zip")[1] for name in FAR}

    def scores(self, detector: Detector) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        def of(table: FeatureTable) -> np.ndarray:
            return np.concatenate([detector.score_features(part) for part in table.chunks()])

        return of(self.test), {name: of(table) for name, table in self.far.items()}


def row(case: str, name: str, sets: Sets, detector: Detector, seconds: float, anew: float) -> None:
    normal, far = sets.scores(detector)
    values = [100 * auroc(normal, scores) for scores in far.values()]
    alarms = detector.calibration_.flags(normal, FPR)[1].mean()
    cells = " | ".join(f"{value:.2f}" for value in (*values, np.mean(values)))
    spent = f"{seconds:.1f} | {seconds / anew:.2f}" if seconds else "- | -"
    print(f"| {case} | {name} | {cells} | {alarms:.1%} | {spent} |", flush=True)


# ---- models with a local score ----


def run_tiles(data: Path, folder: Path, case: str, split: int) -> None:
    images, test, labels = list(tile_splits(data, split + 1))[split]
    names = list(dict.fromkeys(labels))
    chosen = {names[i] for i in np.random.default_rng(split).permutation(len(names))[: round(0.75 * len(names))]}
    old = [ref for ref, label in zip(images, labels, strict=True) if label in chosen]
    new = [ref for ref, label in zip(images, labels, strict=True) if label not in chosen]
    sets = (test, list_images(data / "magnetic_tile.zip" / "defect"))
    print(f"{len(old)} images, {len(new)} new ones, {len(test)} of other tiles, {len(sets[1])} with defects")
    print("| model | AUROC | global | local | false alarms | defects found | time, s | of training anew |")
    print("|---|---|---|---|---|---|---|---|")

    settings = {"calibration": TILE_CASES[case]}
    anew, seconds = timed(lambda: Detector(cache=folder / "anew", **settings).fit(images))
    tile_row("anew, on all", anew, sets, seconds, seconds)
    before = Detector(cache=folder / "before", **settings).fit(old)
    before.save_pretrained(folder / "model")
    shutil.copytree(folder / "before", folder / "cache")
    tile_row("before", before, sets, 0, seconds)

    def updated() -> tuple[Detector, Changes]:
        return update(Detector.from_pretrained(folder / "model", cache=folder / "cache"), new, old=old)

    (after, changes), spent = timed(updated)
    tile_row("updated", after, sets, spent, seconds)
    tell(changes, sum(file.stat().st_size for file in (folder / "model").iterdir()))


def tile_row(name: str, detector: Detector, sets: tuple[list[ImageRef], ...], seconds: float, anew: float) -> None:
    normal, strange = ([detector.measured(part) for part in detector.features(refs)[1].chunks()] for refs in sets)

    def scores(parts: list[Any], which: str) -> np.ndarray:
        return np.concatenate([(part[2][which] if which else part[0]).double().cpu().numpy() for part in parts])

    values = [100 * auroc(scores(normal, which), scores(strange, which)) for which in ("", *detector.parts)]
    flagged = [detector.calibration_.flags(scores(parts, ""), FPR)[1].mean() for parts in (normal, strange)]
    spent = f"{seconds:.1f} | {seconds / anew:.2f}" if seconds else "- | -"
    cells = " | ".join(f"{value:.2f}" for value in values)
    print(f"| {name} | {cells} | {flagged[0]:.1%} | {flagged[1]:.1%} | {spent} |", flush=True)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.process_time()
    result = work()
    return result, time.process_time() - began


if __name__ == "__main__":
    main()
