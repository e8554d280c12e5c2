"""Small defects on magnetic tiles: featdiff's local score beside PaDiM and PatchCore; the tables of RESULTS.md.

    python tests/benchmarks/defects.py --data FOLDER

FOLDER holds magnetic_tile.zip (normal/, defect/KIND/, masks/KIND/). Nothing is fitted on a defect. The two others are
written here after their papers, on maps of the same backbone and pixels.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folders import tile_splits
from scipy import ndimage  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from featdiff import Detector, FeatureExtractor
from featdiff.data.decoding import decode
from featdiff.data.references import ImageRef, list_images
from featdiff.evaluation.metrics import auroc
from featdiff.features.backbones import load_backbone
from featdiff.features.geometry import onto_picture, seen_box
from featdiff.runtime.allocator import keep_freed_memory
from featdiff.scores.coreset import coreset
from featdiff.scores.neighbors import make_index

KINDS = ("blowhole", "crack", "break", "fray", "uneven")
#: Stages at an eighth of the picture's resolution and around it.
STAGES = ("blocks.1", "blocks.2", "blocks.4")
#: Overlap with regions counts up to this false-positive rate.
MOST_FPR = 0.3
BATCH, ROUNDS = 32, 15  # of what is timed
SMOOTHING = 0.5  # in cells of 8 pixels: both papers smooth heat maps by 4 pixels


class PaDiM:
    """A Gaussian for each place (Defard et al. 2021), on one grid for all pictures, for these differ in shape."""

    grid, channels, regularisation = (28, 28), 100, 0.01

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def see(self, maps: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """Take in maps (B, C, h, w) of normal images, the finest first; ``fit`` then learns from all of them."""
        self.seen.append(self._places(maps))

    def fit(self) -> None:
        places = torch.cat(self.seen, dim=1)
        self.mean = places.mean(1, keepdim=True)
        centred = places - self.mean
        covariance = centred.mT @ centred / (places.shape[1] - 1)
        self.precision = torch.linalg.inv(covariance + self.regularisation * torch.eye(places.shape[2]))
        self.seen.clear()

    def judge(self, maps: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B,) and heat (B, h, w) of images."""
        centred = self._places(maps) - self.mean
        squares = ((centred @ self.precision) * centred).sum(2).clamp_min(0)
        heat = smoothed(squares.sqrt().T.unflatten(1, self.grid))
        return heat.max((1, 2)), heat

    def _places(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps -> some channels of each place (places, B, channels), drawn once."""
        joined = torch.cat([resized(values, self.grid) for values in maps], dim=1)
        kept = np.random.default_rng(0).permutation(joined.shape[1])[: self.channels]
        return joined[:, np.sort(kept)].flatten(2).permute(2, 0, 1)


class PatchCore:
    """The distance to the nearest of some normal patches (Roth et al. 2022).

    A patch is the mean of 3 x 3 places of two stages. Of 100,000 patches, the same number from each image, a tenth is
    kept: greedily, by their distances in a random projection. An image is as strange as its strangest patch; the
    paper's weight by the neighbours of the nearest one is left out.
    """

    patches, kept, dimensions = 100_000, 10_000, 32

    def __init__(self, images: int) -> None:
        self.of_each = self.patches // images
        self.seen: list[Tensor] = []

    def see(self, maps: Sequence[Tensor], numbers: Sequence[int]) -> None:
        for number, patches in zip(numbers, self._patches(maps).flatten(1, 2), strict=True):
            chosen = np.random.default_rng(number).permutation(len(patches))[: self.of_each]
            self.seen.append(patches[chosen])

    def fit(self) -> None:
        patches = torch.cat(self.seen)
        directions = torch.randn(patches.shape[1], self.dimensions, generator=torch.Generator().manual_seed(0))
        chosen = coreset(patches @ directions, self.kept, "greedy")
        self.index = make_index(patches[chosen], "faiss")
        self.seen.clear()

    def judge(self, maps: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        patches = self._patches(maps)
        distances, _ = self.index.search(patches.flatten(0, 2), k=1)
        heat = distances[:, 0].float().reshape(patches.shape[:3])
        return heat.amax((1, 2)).numpy(), smoothed(heat)

    def _patches(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps -> patches (B, h, w, C) of the last two, on the grid of the finer one."""
        near = [F.avg_pool2d(values, 3, 1, 1, count_include_pad=False) for values in maps[-2:]]
        return torch.cat([resized(values, near[0].shape[2:]) for values in near], dim=1).movedim(1, -1)


Baselines = dict[str, PaDiM | PatchCore]


def resized(values: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(values, tuple(size), mode="bilinear", align_corners=False, antialias=True)


def smoothed(heat: Tensor) -> np.ndarray:
    return ndimage.gaussian_filter(heat.numpy(), (0, SMOOTHING, SMOOTHING))


#: Of n images, by method: scores (n,) and heat maps.
Findings = tuple[dict[str, np.ndarray], dict[str, dict[int, np.ndarray]]]


def stacks(detector: Detector, refs: Sequence[ImageRef]) -> Iterator[tuple[list[int], Tensor]]:
    """The numbers of images that have one shape, and their pixels."""
    done = 0
    for batch in detector.batches(list(refs))[0]:
        for stack in batch.stacks:
            yield [done + i for i in stack.positions], stack.pixels
        done += len(batch.loaded)


@torch.inference_mode()
def fit_baselines(detector: Detector, stages: FeatureExtractor, refs: Sequence[ImageRef]) -> Baselines:
    baselines: Baselines = {"PaDiM": PaDiM(), "PatchCore": PatchCore(len(refs))}
    for numbers, pixels in stacks(detector, refs):
        maps = stages.maps_of(pixels)
        for method in baselines.values():
            method.see(maps, numbers)
    for method in baselines.values():
        method.fit()
    return baselines


@torch.inference_mode()
def look(detector: Detector, stages: FeatureExtractor, baselines: Baselines, refs: Sequence[ImageRef]) -> Findings:
    scores: dict[str, np.ndarray] = defaultdict(lambda: np.empty(len(refs)))
    heat: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for numbers, pixels in stacks(detector, refs):
        rows, heat_of_stack = detector.extractor_.with_heat(pixels)
        assert heat_of_stack is not None
        heads = detector.all_heads(rows)
        found = {name: (heads[name], heat_of_stack.cpu().numpy()) for name in ("featdiff", "global", "local")}
        maps = stages.maps_of(pixels)
        found |= {name: method.judge(maps) for name, method in baselines.items()}
        for name, (values, hot) in found.items():
            scores[name][numbers] = values
            heat[name] |= zip(numbers, hot, strict=True)
    return scores, heat


def masks_of(folder: Path, defects: Sequence[ImageRef], normal: Sequence[ImageRef]) -> list[np.ndarray]:
    """Where each picture has a defect: the normal ones first, which have none."""
    given = {Path(ref.path).stem: ref for ref in list_images(folder / "magnetic_tile.zip" / "masks")}
    found = [np.zeros(decode(ref.read()).size[::-1], dtype=bool) for ref in normal]
    return found + [np.asarray(decode(given[Path(ref.path).stem].read()))[..., 0] > 127 for ref in defects]


def each_kind(kinds: np.ndarray) -> list[np.ndarray]:
    """Which belong to any kind, and which to each."""
    return [kinds != "", *(kinds == kind for kind in KINDS)]


def of_pixels(heats: Sequence[np.ndarray], masks: Sequence[np.ndarray], kinds: np.ndarray, config: Any) -> np.ndarray:
    """AUROC of pixels and overlap with regions (AUPRO; Bergmann et al. 2021), of all and of each kind, in percent.

    No thresholds are needed to integrate the overlap: each pixel counts for the false-positive rates that find it.
    """
    outside, inside, weights = [], [], []
    for heat, mask in zip(heats, masks, strict=True):
        height, width = mask.shape
        values = onto_picture(heat, seen_box(config, width, height), width, height)
        regions, _ = ndimage.label(mask, np.ones((3, 3)))
        outside.append(values[~mask])
        inside.append(values[mask])
        weights.append(1 / np.bincount(regions.ravel())[regions[mask]])
    owners = np.repeat(kinds, [len(values) for values in inside])

    normal = np.concatenate(outside)
    normal.sort()
    values = np.concatenate(inside)
    below = (np.searchsorted(normal, values, "left") + np.searchsorted(normal, values, "right")) / 2
    fpr = 1 - below / len(normal)
    found = np.stack([1 - fpr, (1 - fpr / MOST_FPR).clip(0)], axis=1)
    each = np.stack([np.ones_like(fpr), np.concatenate(weights)], axis=1)
    return 100 * np.array([np.average(found[part], 0, each[part]) for part in each_kind(owners)])


@dataclass
class Measured:
    """What was found on each split, in percent."""

    images: dict[str, list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    pixels: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    alarms: list[float] = field(default_factory=list)
    flagged: list[float] = field(default_factory=list)

    def add(self, detector: Detector, found: Findings, kinds: np.ndarray, masks: Sequence[np.ndarray]) -> None:
        """Images of these kinds, ``""`` for normal ones."""
        normal = kinds == ""
        scores, heat = found
        for name, values in scores.items():
            self.images[name].append([100 * auroc(values[normal], values[part]) for part in each_kind(kinds)])
        for name in ("featdiff", "PaDiM", "PatchCore"):
            heats = [heat[name][i] for i in range(len(masks))]
            self.pixels[name].append(of_pixels(heats, masks, kinds, detector.extractor_.backbone.data_config))
        _, flags = detector.calibration_.flags(scores["featdiff"], detector.fpr)
        self.alarms.append(100 * flags[normal].mean())
        self.flagged.append(100 * flags[~normal].mean())

    def show(self) -> None:
        print(f"| image AUROC | all (each split) | {' | '.join(KINDS)} |")
        for name, rows in self.images.items():
            of_all, *of_kinds = [f"{value:.1f}" for value in np.mean(rows, axis=0)]
            print(f"| {name} | {of_all} ({listed(row[0] for row in rows)}) | {' | '.join(of_kinds)} |")
        print("\n| false alarms at 5 % (each split) | defects flagged |")
        print(f"| {np.mean(self.alarms):.1f} ({listed(self.alarms)}) | {np.mean(self.flagged):.1f} |")
        print(f"\n| pixel AUROC / AUPRO | all | {' | '.join(KINDS)} |")
        for name, pairs in self.pixels.items():
            print(f"| {name} | {' | '.join(f'{a:.1f} / {b:.1f}' for a, b in np.mean(pairs, axis=0))} |")


def listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def compare(folder: Path, count: int, cache: Path | None) -> Detector:
    """Print the tables of detection; the detector of the last split."""
    defects = list_images(folder / "magnetic_tile.zip" / "defect")
    kinds = [Path(ref.path).parent.name for ref in defects]
    stages = FeatureExtractor(load_backbone())
    stages.keep_maps(STAGES)
    measured = Measured()
    for training, others, labels in tile_splits(folder, count):
        detector = Detector(cache=cache).fit(training, groups=labels)
        baselines = fit_baselines(detector, stages, training)
        found = look(detector, stages, baselines, [*others, *defects])
        measured.add(detector, found, np.array([""] * len(others) + kinds), masks_of(folder, defects, others))
        print(f"{len(measured.alarms)} of {count} splits; {detector.local_note_}", file=sys.stderr)
    measured.show()
    return detector


@torch.inference_mode()
def costs(detector: Detector, folder: Path) -> None:
    """Processor time of the local score beside that of the backbone pass, in turns, on one thread."""
    torch.set_num_threads(1)
    first = list_images(folder / "magnetic_tile.zip" / "normal")[:1]
    pixels = next(stacks(detector, first))[1].repeat(BATCH, 1, 1, 1)
    maps = detector.extractor_.maps_of(pixels)
    assert detector.local_ is not None
    local = detector.local_.joint.local
    backbone = detector.without_local().extractor_

    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        local(maps)
        between = time.process_time()
        backbone(pixels)
        times.append((between - start, time.process_time() - between))
    own, whole = 1000 * np.median(times, axis=0) / BATCH
    print("\n| local score, ms an image | backbone pass, ms an image | ratio | local part, MB |")
    print(f"| {own:.2f} | {whole:.2f} | {own / whole:.2f} | {detector.local_.nbytes / 1e6:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_freed_memory()  # as the command line does
    costs(compare(arguments.data, arguments.splits, arguments.cache), arguments.data)


if __name__ == "__main__":
    main()
