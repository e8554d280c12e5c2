"""A suite -> one result: the default detector and its heads, other detectors and rivals, on the same features.

Features and trainings are kept in the cache: a run that was stopped goes on, and a second one is quick.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .detectors import Detector
from .detectors.heads import DIFFUSION
from .evaluation import evaluate_detector, fit_rivals
from .exceptions import UsageError
from .images import iter_batches, iter_loaded
from .rivals import Rivals
from .sources import ImageRef
from .store import Progress, featurise
from .suites import EVERYTHING_ELSE, Suite, Task, everything_else, find_images

#: Name of the default detector in a result; others are named ``<name>_<head>``.
DEFAULT = "featdiff"
_TIMED_IMAGES = 512


def run_suite(
    suite: Suite,
    data: Path,
    arguments: Mapping[str, Any] | None = None,
    download: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train and measure everything a suite names.

    Parameters
    ----------
    data : folder that the suite's sources count from
    arguments : of all detectors (backbone, layers, device ...) where the suite does not say otherwise
    download : whether torchvision may fetch data sets that are not there
    tell : callable, optional
        Gets a line for every task, and for every OOD set that is left out because it is not there.

    Returns
    -------
    dict
        ``{"suite", "backbone", "tasks": [{"name", "n_train", "methods": {name: {"images_per_second",
        "training_seconds", "megabytes"}}, "pairs": [...]}], "published": [...], "left_out": {name: reason}}``.
        Pairs are those of :func:`featdiff.evaluation.evaluate_detector`; ``images_per_second`` is decoding, backbone
        and the method together, ``training_seconds`` what comes after the features, which all share.

    Raises
    ------
    UsageError
        In-domain images or all OOD sets of a task are not there, or a detector's arguments make no sense.
    """
    result: dict[str, Any] = {"suite": suite.title, "backbone": "", "tasks": []}
    left_out: dict[str, str] = {}
    for task in suite.tasks:
        train, test = (find_images(suite.sources[name], data, download) for name in (task.train, task.test))
        tell(f"{task.name}: {len(train):,} images to train, {len(test):,} to test")
        ood = _ood_sets(suite, task, data, download, left_out, tell)
        detectors = _fit(suite, arguments or {}, train, progress, tell)
        result["backbone"] = detectors[DEFAULT].extractor_.backbone.tag
        result["tasks"].append(_measure(task, detectors, test, ood, progress))
    return result | {"published": [asdict(number) for number in suite.published], "left_out": left_out}


def _ood_sets(
    suite: Suite, task: Task, data: Path, download: bool, left_out: dict[str, str], tell: Callable[[str], None]
) -> dict[str, list[ImageRef]]:
    """What is there of a task's OOD sets."""
    sources = {name: suite.sources[name] for name in task.ood if name != EVERYTHING_ELSE}
    if EVERYTHING_ELSE in task.ood:
        sources |= everything_else(data)
    found = {}
    for name, source in sources.items():
        try:
            found[name] = find_images(source, data, download)
        except UsageError as error:
            left_out[name] = str(error)
            tell(f"  left out: {name}: {error}")
    if not found:
        raise UsageError(f"none of the OOD sets of {task.name!r} is below {data}")
    return found


def _fit(
    suite: Suite,
    arguments: Mapping[str, Any],
    train: list[ImageRef],
    progress: Progress | None,
    tell: Callable[[str], None],
) -> dict[str, Detector]:
    fitted: dict[str, Detector] = {}
    wanted: dict[str, Mapping[str, Any]] = {DEFAULT: {}, **suite.detectors}
    for name, own in wanted.items():
        try:
            detector = Detector(**{**arguments, **own})
        except TypeError as error:  # an argument that detectors do not have
            raise UsageError(f"the suite's detector {name!r} cannot be built: {error}") from None
        fitted[name] = detector.fit(train, progress)
        tell(f"  {name}: {len(detector.bank_digests_):,} images, trained in {detector.training_seconds_:.0f} s")
    return fitted


def _measure(
    task: Task,
    detectors: Mapping[str, Detector],
    test: list[ImageRef],
    ood: Mapping[str, list[ImageRef]],
    progress: Progress | None,
) -> dict[str, Any]:
    default = detectors[DEFAULT]
    rivals = fit_rivals(default)
    pairs = evaluate_detector(default, test, ood, task.protocols, progress, rivals=rivals)["pairs"]
    seconds, features = _timed_pass(default, test)
    methods = _costs(_default_methods(default) | _rival_methods(rivals), features, default.image_batch, seconds)
    for name, detector in detectors.items():
        if name == DEFAULT:
            continue
        for pair, more in zip(pairs, evaluate_detector(detector, test, ood, task.protocols)["pairs"], strict=True):
            heads = {detector.head: more["heads"].pop(DEFAULT)} | more["heads"]
            pair["heads"] |= {f"{name}_{head}": heads[head] for head in DIFFUSION if head in heads}
        own: dict[str, _Method] = {f"{name}_{head}": method for head, method in _diffusion_methods(detector).items()}
        methods |= _costs(own, features, default.image_batch, seconds)
    return {"name": task.name, "n_train": default.n_images_, "methods": methods, "pairs": pairs}


#: (what scores a batch of features, seconds of training, bytes it keeps)
_Method = tuple[Callable[[Tensor], object], float, int]


def _default_methods(detector: Detector) -> dict[str, _Method]:
    """The default score, and each of its heads as if it stood alone."""
    heads, banks = detector.heads_, detector.heads_.banks
    found: dict[str, _Method] = {DEFAULT: (detector.score_features, detector.training_seconds_, _bytes(heads))}
    found |= _diffusion_methods(detector)
    if banks is not None:
        for i, space in enumerate(banks.spaces):
            kept = sum(tensor.nbytes for name, tensor in banks.state_dict().items() if name.endswith(f"_{i}"))
            found[f"knn_{space}"] = (lambda x, space=space: banks.distances(x, space), 0.0, kept)  # type: ignore[misc]
    return found


def _diffusion_methods(detector: Detector) -> dict[str, _Method]:
    diffusion, trained = detector.heads_.diffusion, detector.training_seconds_
    early = _bytes(diffusion.early)  # only likelihood regret needs it
    found: dict[str, _Method] = {}
    for head in DIFFUSION:
        kept = _bytes(diffusion) - (0 if head == "lr" else early)
        found[head] = (lambda x, head=head: diffusion(detector.heads_.pooled(x), (head,)), trained, kept)  # type: ignore[misc]
    return found


def _rival_methods(rivals: Rivals) -> dict[str, _Method]:
    return {name: (rival, rival.seconds, 4 * rival.numbers) for name, rival in rivals.methods.items()}


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def _costs(
    methods: Mapping[str, _Method], features: Tensor, batch: int, seconds: float
) -> dict[str, dict[str, float | None]]:
    return {
        name: {
            "images_per_second": 1 / (seconds + _seconds(score, features, batch)),
            "training_seconds": trained,
            "megabytes": kept / 1e6,
        }
        for name, (score, trained, kept) in methods.items()
    }


def _timed_pass(detector: Detector, images: list[ImageRef]) -> tuple[float, Tensor]:
    """Seconds for an image through decoding and backbone, and the features of the images that were timed."""
    extractor = detector.extractor_
    some = images[:: -(-len(images) // _TIMED_IMAGES)]
    loaded = iter_loaded(
        some, extractor.transform, detector.workers, detector.max_pixels, ahead=2 * detector.image_batch
    )
    vectors: list[Tensor] = []
    start = time.perf_counter()
    for batch in iter_batches(loaded, detector.image_batch):
        found, _ = featurise(batch, extractor)
        vectors += [torch.from_numpy(found[i]) for i in sorted(found)]
    return (time.perf_counter() - start) / len(some), torch.stack(vectors)


def _seconds(score: Callable[[Tensor], object], features: Tensor, batch: int) -> float:
    """Seconds for an image, in batches; the better of two runs, for the first one warms up."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        for rows in features.split(batch):
            score(rows)
        best = min(best, time.perf_counter() - start)
    return best / len(features)
