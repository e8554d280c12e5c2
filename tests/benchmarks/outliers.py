"""How long 10,000 synthetic outliers of CIFAR-10 take, by each method, the model's features being in the cache.

    python tests/benchmarks/outliers.py --data FOLDER

FOLDER holds cifar10.zip (train/ with a folder for each class). Numbers and distances are measured, too, as by the
command; started from half of the images, of which the other half has trained the model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from featdiff import Detector
from featdiff.data.labels import list_labelled
from featdiff.outliers.synthesis import METHODS, synthesise
from featdiff.runtime.allocator import keep_freed_memory

COUNT = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    refs, _, _ = list_labelled(parser.parse_args().data / "cifar10.zip/train")
    keep_freed_memory()
    order = np.random.default_rng(0).permutation(len(refs))
    seen, others = ([refs[i] for i in sorted(part)] for part in np.array_split(order, 2))
    detector = Detector().fit(seen)
    detector.features(others)
    print("method, images, numbers a row", "seconds", "distance: in-domain, boundary, outliers", "flagged", sep=" | ")
    for images, name in ((refs, "all"), (others, "others")):
        for method in METHODS:
            begin = time.perf_counter()
            found = synthesise(detector, images, COUNT, method)
            seconds = time.perf_counter() - begin
            numbers = [", ".join(f"{part[kind]:.3f}" for kind in part) for part in (found.distances, found.flagged)]
            print(
                f"{method}, {name} {len(images):,}, {detector.extractor_.width:,}",
                f"{seconds:.1f}",
                *numbers,
                sep=" | ",
            )


if __name__ == "__main__":
    main()
