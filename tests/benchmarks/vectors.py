"""How long FeatureDiffusion takes to fit 8,000 x 320, and how many rows a second it scores.

    python tests/benchmarks/vectors.py

Vectors are made up: time does not depend on what they say. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from featdiff import FeatureDiffusion

ROUNDS = 9


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
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


if __name__ == "__main__":
    main()
