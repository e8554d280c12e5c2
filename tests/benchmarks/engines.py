"""What engines gain over eager PyTorch, and what they change; the tables of RESULTS.md.

    python tests/benchmarks/engines.py --data FOLDER

FOLDER holds flowers.zip as configs/README.md describes it. First the pass alone: processor time on one thread, in
turns, medians. Then scoring of files, decoding included: wall time on all cores, in turns, by a detector's engine and
by PyTorch, beside a bare eager pass over the same files.
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
from featdiff.data.batches import iter_batches, iter_loaded
from featdiff.data.references import ImageRef, list_images
from featdiff.features.backbones import load_backbone
from featdiff.features.engines import ONNXRUNTIME, OPENVINO, TORCH, installed
from featdiff.features.extractor import FeatureExtractor
from featdiff.runtime.allocator import keep_freed_memory

BATCHES = (1, 32)
ROUNDS = 9
FILES = 1000
WHOLE_ROUNDS = 2


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
    plain = FeatureExtractor(load_backbone())
    pixels = {count: torch.rand(count, 3, 224, 224) for count in BATCHES}
    extractors = {TORCH: plain}
    seconds = {TORCH: 0.0}
    for name in (ONNXRUNTIME, OPENVINO):
        if installed(name):
            extractors[name] = FeatureExtractor(load_backbone())
            start = time.perf_counter()
            extractors[name].choose_engine(name, pixels[32])
            seconds[name] = time.perf_counter() - start

    print("| engine | " + " | ".join(f"ms an image, batch {count}" for count in BATCHES) + " | build, s | difference |")
    columns = []
    for count in BATCHES:
        runs = {name: (lambda e=extractor, n=count: e(pixels[n])) for name, extractor in extractors.items()}
        columns.append(medians(runs, ROUNDS, time.process_time))
    expected = plain(pixels[32])
    for name, extractor in extractors.items():
        times = " | ".join(f"{1000 * column[name] / n:.1f}" for column, n in zip(columns, BATCHES, strict=True))
        difference = float((extractor(pixels[32]) - expected).abs().max() / expected.std())
        print(f"| {extractor.engine} | {times} | {seconds[name]:.1f} | {difference:.1e} |")


def bare(extractor: FeatureExtractor, refs: list[ImageRef]) -> None:
    """Decode, and run the network as a user would who wants its layers."""
    loaded = iter_loaded(refs, extractor.transform, ahead=64)
    with torch.inference_mode():
        for batch in iter_batches(loaded, 32):
            for stack in batch.stacks:
                pixels = stack.pixels.contiguous(memory_format=torch.channels_last)
                extractor.model.forward_intermediates(pixels, intermediates_only=True)


def whole(data: Path, threads: int) -> None:
    """Scoring of files."""
    torch.set_num_threads(threads)
    train = list_images(data / "flowers.zip" / "train")
    refs = [*list_images(data / "flowers.zip" / "test"), *train][:FILES]
    plain = Detector(engine=TORCH).fit(train)
    detector = Detector().fit(train)
    runs = {
        "bare eager pass": lambda: bare(plain.extractor_, refs),
        "score, torch": lambda: plain.score(refs),
        f"score, {detector.extractor_.engine}": lambda: detector.score(refs),
    }
    seconds = medians(runs, WHOLE_ROUNDS, time.perf_counter)
    print(f"\n{detector.engine_note_}\n\n| {FILES:,} files | images/s | over the bare eager pass |")
    for name, taken in seconds.items():
        print(f"| {name} | {FILES / taken:.0f} | {taken / seconds['bare eager pass']:.2f} x |")

    given = detector.score(refs)
    own = detector.extractor_
    detector.extractor_ = own.in_torch()
    expected = Detector.score(detector, refs[:255])  # too few for auto to look for an engine again
    change = np.abs(given.ood_score[:255] - expected.ood_score).max()
    verdicts = int((given.is_ood[:255] != expected.is_ood).sum())
    print(f"\nlargest change of a score {change:.1e} standard deviations, {verdicts} of 255 verdicts changed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_freed_memory()  # as the command line does
    threads = torch.get_num_threads()
    passes()
    whole(arguments.data, threads)


if __name__ == "__main__":
    main()
