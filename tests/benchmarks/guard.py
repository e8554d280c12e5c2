"""What a guard costs on top of its classifier: the ratios of the README's table.

    python tests/benchmarks/guard.py --data FOLDER [--model FOLDER] [--device cuda --batch 256]

The data folder holds cifar10.zip with a folder ``train``; the classifier is the default backbone with its own head. A
model of the default backbone stands in for fitting one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from featdiff import Guard
from featdiff.data.batches import iter_batches, iter_loaded
from featdiff.data.references import list_images
from featdiff.features.backbones import load_backbone
from featdiff.features.weights import DEFAULT_BACKBONE

ROUNDS = 15


def batches(files: Path, transform: Callable[..., Tensor], count: int, size: int) -> Iterator[Tensor]:
    refs = list_images(files)
    step = max(1, len(refs) // count)
    for batch in iter_batches(iter_loaded(refs[::step][:count], transform), size):
        for stack in batch.stacks:
            yield stack.pixels


def seconds(ways: dict[str, Callable[[Tensor], object]], images: Tensor) -> dict[str, float]:
    """Median time of a pass, measured in turns so that a busy machine slows all alike."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    # the time of this process alone, where one thread works: other processes do not count
    clock = time.process_time if torch.get_num_threads() == 1 and not images.is_cuda else time.perf_counter
    for turn in range(ROUNDS + 3):
        for name, way in ways.items():
            start = clock()
            way(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if turn >= 3:
                taken[name].append(clock() - start)
    return {name: sorted(times)[len(times) // 2] for name, times in taken.items()}


def report(name: str, bare: nn.Module, guard: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        equal = torch.equal(bare(images), guard(images)[0])
        found = seconds({"bare": bare, "guard": guard}, images)
    ratio = found["guard"] / found["bare"]
    milliseconds = ", ".join(f"{way} {1000 * value:.1f} ms" for way, value in found.items())
    print(f"{name}: {ratio:.3f} x ({milliseconds}); logits {'bit-identical' if equal else 'DIFFER'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a fitted model, such as featdiff train leaves")
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    backbone = load_backbone(DEFAULT_BACKBONE, model_args={"num_classes": 1000})
    classifier = backbone.model.to(arguments.device)
    files = arguments.data / "cifar10.zip" / "train"
    if arguments.model:
        guard = Guard.from_pretrained(arguments.model, classifier)
    else:
        guard = Guard(classifier).fit(batches(files, backbone.transform, arguments.images, 64))
    print(f"fitted on {guard.detector.n_images_:,} images; {torch.get_num_threads()} threads, {arguments.device}")
    images = next(batches(files, backbone.transform, arguments.batch, arguments.batch)).to(arguments.device)
    report(f"guard, batch {arguments.batch}", classifier, guard, images)
    with torch.inference_mode():
        compiled = torch.compile(classifier), torch.compile(guard)
        report(f"compiled, batch {arguments.batch}", *compiled, images)
        usual, fast = guard(images)[1], compiled[1](images)[1]
    print(f"largest score difference, compiled: {(usual.ood_score - fast.ood_score).abs().max():.1e}")
    with torch.inference_mode(), torch.autocast(arguments.device, torch.bfloat16):
        half = guard(images)[1]
    print(f"largest score difference, bfloat16 autocast: {(usual.ood_score - half.ood_score).abs().max():.2g}")


if __name__ == "__main__":
    main()
