"""What the fused score is made of, and what a second encoder adds: weights, heads and pairs, over seeds.

    python tests/benchmarks/fusion.py weights --data FOLDER --seeds 5
    python tests/benchmarks/fusion.py encoders --data FOLDER --seeds 2 --encoder NAME=BACKBONE:FILE ...

FOLDER holds what the suite cifar10 reads. Features and trainings come from the cache. Columns are means over sets: far,
near 1 to 3, near 4 and 5; AUROC / FPR95 in percent, with the difference from the first row and its 95 % interval
(resamples of images and seeds, the same for both). Encoders are joined by the sum of their scores (``+``) and by the
smallest of their p-values (``min-p``), and compared with the better one of the two.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featdiff import Detector
from featdiff.evaluation.metrics import evaluate
from featdiff.evaluation.protocols import evaluate_detector
from featdiff.evaluation.seeds import PairScores, Run, merge_runs
from featdiff.evaluation.suite_images import NotThere, find_images
from featdiff.evaluation.suites import Suite, Task, load_suite
from featdiff.scores.fusion import log_z

SUITE = Path(__file__).parents[2] / "configs" / "suites" / "cifar10.toml"
COLUMNS = {"far": ["far"], "near 1-3": ["near 1", "near 2", "near 3"], "near 4, 5": ["near 4", "near 5"]}
WEIGHTS = (0.25, 0.0, 0.1, 0.17, 0.35, 0.5, 1.0)

#: A fitted detector, scores of its heads by name for some images (N,) -> scores of each method (N,).
Methods = Callable[[Detector, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["weights", "encoders"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--encoder", action="append", default=[], metavar="NAME=BACKBONE:FILE")
    arguments = parser.parse_args()
    suite = load_suite(SUITE)

    if arguments.what == "weights":
        runs = {task.name: seeds_of(suite, task, arguments, weighted, {}) for task in tasks(suite)}
        show(runs, f"{WEIGHTS[0]}")
        return

    encoders: dict[str, dict[str, Any]] = {"lite0": {}}
    for text in arguments.encoder:
        name, _, place = text.partition("=")
        backbone, _, file = place.partition(":")
        encoders[name] = {"backbone": backbone, "weights": file}
    apart = {
        (name, task.name): seeds_of(suite, task, arguments, alone, settings)
        for name, settings in encoders.items()
        for task in tasks(suite)
    }
    for one, two in itertools.combinations(encoders, 2):
        runs = {task.name: [*map(joined, apart[one, task.name], apart[two, task.name])] for task in tasks(suite)}
        for better in ("first", "second"):
            print(f"first {one}, second {two}, compared with the {better}", flush=True)
            show(runs, better)


def tasks(suite: Suite) -> Iterator[Task]:
    return (task for task in suite.tasks if any(task.name in names for names in COLUMNS.values()))


def seeds_of(
    suite: Suite, task: Task, arguments: argparse.Namespace, methods: Methods, settings: Mapping[str, Any]
) -> list[Run]:
    """A run with each seed."""
    cache = {"cache": arguments.cache} if arguments.cache else {}
    seeds = range(arguments.seeds)
    return [run(suite, task, arguments.data, methods, seed=seed, **settings, **cache) for seed in seeds]


def run(suite: Suite, task: Task, data: Path, methods: Methods, **settings: Any) -> Run:
    """Fit a detector for a task, and measure what is made of its heads' scores."""
    detector = Detector(**settings).fit(find_images(suite.sources[task.train], data, False))
    ood = {}
    for name in task.ood:
        try:
            ood[name] = find_images(suite.sources[name], data, False)
        except NotThere:
            continue
    sets: list[Any] = []
    test = find_images(suite.sources[task.test], data, False)
    pairs = evaluate_detector(detector, test, ood, ["matched"], sets=sets)["pairs"]

    scores = []
    for both in sets:
        normal, strange = (methods(detector, each.scores) for each in both)
        scores.append({name: (normal[name], strange[name]) for name in normal})
    print(f"  {detector.name}, {task.name}, seed {detector.settings.seed}", flush=True)
    return measured(Run(detector.n_images_, len(detector.bank_digests_), {}, pairs, []), scores)


def measured(given: Run, scores: list[dict[str, PairScores]]) -> Run:
    """A run with these scores for each pair."""
    pairs = []
    for pair, methods in zip(given.pairs, scores, strict=True):
        heads = {name: evaluate(*both).to_dict() for name, both in methods.items()}
        pairs.append(pair | {"heads": heads})
    return Run(given.n_train, given.n_bank, {}, pairs, scores)


def weighted(detector: Detector, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Neighbours and so much of the diffusion score, in standard deviations of held-out images."""
    heads = detector.heads_
    diffusion = (scores["layerwise"] - float(heads.mean[0])) / float(heads.deviation[0])
    distance = torch.from_numpy(scores["neighbors"].astype(np.float32))
    neighbors = log_z(distance, heads.mean[1], heads.deviation[1]).numpy()
    found = {f"{weight}": neighbors + weight * diffusion for weight in WEIGHTS}
    return found | {"diffusion": diffusion}


def alone(detector: Detector, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The score, and minus the logarithm of its p-value; beyond the smallest one, the score decides."""
    score = scores["featdiff"]
    p_values, _ = detector.calibration_.flags(score, detector.fpr)
    return {"score": score, "surprise": 1e-3 * score - np.log(p_values)}


def joined(one: Run, two: Run) -> Run:
    """Two encoders' scores of the same images, and what is made of both."""
    scores = []
    for first, second in zip(one.scores, two.scores, strict=True):
        sides = {"first": first["score"], "second": second["score"]}
        sides["sum"] = tuple(a + b for a, b in zip(first["score"], second["score"], strict=True))  # type: ignore[assignment]
        pairs = zip(first["surprise"], second["surprise"], strict=True)
        sides["min-p"] = tuple(np.maximum(a, b) for a, b in pairs)  # type: ignore[assignment]
        scores.append(sides)
    return measured(one, scores)


def show(runs: Mapping[str, list[Run]], own: str) -> None:
    """A table: a row a method, with its differences from ``own``."""
    columns = {name: across(runs, names, own) for name, names in COLUMNS.items()}
    print("| |" + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for method in next(iter(columns.values())):
        cells = []
        for heads in columns.values():
            m = heads[method]
            low, high = m["auroc_difference_ci"]
            cell = f"{100 * m['auroc']:.2f} / {100 * m['fpr95']:.1f}"
            if method != own:
                cell += f" ({100 * m['auroc_difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}])"
            cells.append(cell)
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


def across(runs: Mapping[str, list[Run]], names: list[str], own: str) -> dict[str, dict[str, Any]]:
    """Means over all sets of some tasks."""
    together = []
    for each in zip(*(runs[name] for name in names), strict=True):
        pairs = [pair for part in each for pair in part.pairs]
        scores = [pair for part in each for pair in part.scores]
        together.append(Run(each[0].n_train, each[0].n_bank, {}, pairs, scores))
    heads: dict[str, dict[str, Any]] = merge_runs("all", together, own)["means"][0]["heads"]
    return heads


if __name__ == "__main__":
    main()
