"""What engines gain over eager PyTorch, and what they change; the tables of RESULTS.md.

    python tests/benchmarks/engines.py --data FOLDER

FOLDER holds flowers.zip as configs/README.md describes it. First the pass alone: processor time on one thread, in
turns, medians; in bfloat16, too, if the processor has it. Then what a detector's scores of held-out files are by its
engine and by PyTorch, and in bfloat16. (How fast whole files are scored: speed.py.)
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from featdiff import Detector
from featdiff.data.references import list_images
from featdiff.features.backbones import load_backbone
from featdiff.features.conversions import has_bfloat16
from featdiff.features.engines import ONNXRUNTIME, OPENVINO, TORCH, installed
from featdiff.features.extractor import FeatureExtractor
from featdiff.runtime.allocator import keep_freed_memory

BATCHES = (1, 32)
ROUNDS = 9


def medians(runs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: float(np.median(values[1:])) for name, values in times.items()}  # the first warms up


def passes() -> None:
    """The pass alone."""
    torch.set_num_threads(1)
    pixels = {count: torch.rand(count, 3, 224, 224) for count in BATCHES}
    wanted = [(name, "fp32") for name in (TORCH, ONNXRUNTIME, OPENVINO) if name == TORCH or installed(name)]
    if has_bfloat16(OPENVINO):
        wanted += [(TORCH, "bf16"), (OPENVINO, "bf16")]

    extractors, seconds = {}, {}
    for name, precision in wanted:
        extractor = FeatureExtractor(load_backbone(), precision=precision)
        start = time.perf_counter()
        extractor.choose_engine(name, pixels[32])
        key = f"{extractor.engine}, {precision}"
        extractors[key], seconds[key] = extractor, time.perf_counter() - start
    plain = next(iter(extractors.values()))

    print("| engine | " + " | ".join(f"ms an image, batch {count}" for count in BATCHES) + " | build, s | difference |")
    columns = []
    for count in BATCHES:
        runs = {name: (lambda e=extractor, n=count: e(pixels[n])) for name, extractor in extractors.items()}
        columns.append(medians(runs, ROUNDS, time.process_time))
    expected = plain(pixels[32])
    for name, extractor in extractors.items():
        times = " | ".join(f"{1000 * column[name] / n:.1f}" for column, n in zip(columns, BATCHES, strict=True))
        difference = float((extractor(pixels[32]) - expected).abs().max() / expected.std())
        print(f"| {name} | {times} | {seconds[name]:.1f} | {difference:.1e} |")


def scores(data: Path) -> None:
    """What the engine of a detector changes about its scores."""
    train = list_images(data / "flowers.zip" / "train")
    test = list_images(data / "flowers.zip" / "test")
    detector = Detector().fit(train)
    given = detector.score(test)
    print(f"\n{detector.engine_note_}")

    detector.extractor_ = detector.extractor_.in_torch()
    expected = detector.score(test)
    change = np.abs(given.ood_score - expected.ood_score).max()
    verdicts = int((given.is_ood != expected.is_ood).sum())
    print(f"largest change of a score {change:.1e} standard deviations, {verdicts} of {len(given)} verdicts changed")

    if has_bfloat16(OPENVINO):
        half = Detector(precision="bf16").fit(train)
        found = half.score(test)
        change = np.abs(found.ood_score - expected.ood_score)
        flagged = [f"{100 * scores.is_ood.mean():.1f} %" for scores in (expected, found)]
        print(f"\nfitted in bfloat16: {half.engine_note_}")
        print(f"scores change by {np.median(change):.2f} standard deviations (median), {change.max():.2f} at most")
        print(f"flagged at fpr {half.fpr}: {flagged[0]} in float32, {flagged[1]} in bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_freed_memory()  # as the command line does
    threads = torch.get_num_threads()
    passes()
    torch.set_num_threads(threads)
    scores(arguments.data)


if __name__ == "__main__":
    main()
