"""What checksums cost: their share of the time to read a cached table of features, and to load a saved model.

    python tests/benchmarks/checksums.py

Features and images are made up: time does not depend on what they show. Files are in memory, as after their writing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from featdiff import Detector
from featdiff.features.store import FeatureStore
from featdiff.files.model_folder import CONFIG, TENSORS, read_verified
from featdiff.files.strict_json import parse_json

ROUNDS = 7
ROWS = 60_000
IMAGES = 1_000


def median(work: Callable[[], object]) -> float:
    """Seconds of processor time that some work takes: other work on the machine changes them little."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return float(np.median(seconds))


def of_a_table(folder: Path, width: int) -> None:
    """A second run finds all its features in the cache, and reads each once."""
    rng = np.random.default_rng(0)
    digests = [int(i).to_bytes(16, "big") for i in range(ROWS)]
    store = FeatureStore(folder, width)
    for digest, vector in zip(digests, rng.normal(size=(ROWS, width)).astype(np.float32), strict=True):
        store.add(digest, vector)
    store.flush()
    shards = len(list(folder.glob("*.digests")))
    size = sum(file.stat().st_size for file in folder.iterdir())

    def read(verified: bool) -> None:
        opened = FeatureStore(folder, width)
        if not verified:
            opened._unverified.clear()
        for chunk in opened.table(digests).chunks(1024):
            chunk.sum()

    opening = median(lambda: FeatureStore(folder, width))
    whole = median(lambda: read(True))
    trusting = median(lambda: read(False))
    print(f"{ROWS:,} rows of {width}: {size / 1e6:.0f} MB in {shards} shards")
    print(f"  opened in {opening:.3f} s; read in {whole:.3f} s, unverified in {trusting:.3f} s", flush=True)


def of_a_model(folder: Path) -> None:
    """The default backbone and settings."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (IMAGES, 8, 8, 3), dtype=np.uint8)
    images = small.repeat(4, axis=1).repeat(4, axis=2)
    detector = Detector(recipe={"epochs": 1, "min_steps": 1, "max_steps": 1}, cache=folder / "cache", size=64)
    detector.fit(list(images), groups="none")
    model = folder / "model"
    detector.save_pretrained(model)

    config = parse_json((model / CONFIG).read_bytes())
    size = (model / TENSORS).stat().st_size
    loading = median(lambda: Detector.from_pretrained(model))
    verifying = median(lambda: read_verified(model, config))
    print(f"default model of {len(detector.bank_digests_):,} images in its bank, {size / 1e6:.1f} MB: {loading:.3f} s")
    print(f"  verified in {verifying:.3f} s ({verifying / loading:.1%})", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        of_a_table(Path(folder) / "table", width=688)
        of_a_model(Path(folder))


if __name__ == "__main__":
    main()
