"""Speed and recall of neighbour search in a large bank.

    python tests/benchmarks/neighbors.py [--rows 1000000] [--backend faiss-ivf]

The bank is made up: 1,000 clusters on a curved sheet of 32 dimensions in 320, with noise, normalised to length 1, for
features of one backbone fill far fewer dimensions than they have. Recall is measured against exact search in torch.
Needs the extra ``faiss`` and about 5 GB of memory.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from featdiff.scores.neighbors import make_index

WIDTH, LATENT, K = 320, 32, 50


def vectors(rows: int, seed: int) -> Tensor:
    """(rows, WIDTH) from one distribution, whatever the seed."""
    fixed, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    centres = torch.randn(1000, LATENT, generator=fixed)
    first, second = torch.randn(LATENT, WIDTH, generator=fixed), torch.randn(WIDTH, WIDTH, generator=fixed)
    chosen = centres[torch.randint(1000, (rows,), generator=own)]
    latent = chosen + 0.5 * torch.randn(rows, LATENT, generator=own)
    out = torch.relu(latent @ first / LATENT**0.5) @ second / WIDTH**0.5
    return F.normalize(out + 0.05 * torch.randn(out.shape, generator=own), dim=1)


def main() -> None:
    """Print build time, queries per second and recall of the true neighbours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    bank, queries = vectors(options.rows, seed=1), vectors(2000, seed=2)
    start = time.perf_counter()
    index = make_index(bank, options.backend)
    built = time.perf_counter() - start
    start = time.perf_counter()
    nearest = index.search(queries, K)[1]
    rate = len(queries) / (time.perf_counter() - start)
    exact = make_index(bank, "torch").search(queries[:200], K)[1]
    hits = [len(set(a) & set(b)) / K for a, b in zip(exact.tolist(), nearest[:200].tolist(), strict=True)]
    print(f"{type(index).__name__} {options.backend}, {options.rows:,} x {WIDTH}: built in {built:.0f} s")
    print(f"{rate:,.0f} queries/s, recall@{K} {sum(hits) / len(hits):.3f}")


if __name__ == "__main__":
    main()
