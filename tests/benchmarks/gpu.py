"""What featdiff costs on a GPU beside the bare backbone pass; prints a table with the card's name.

    python tests/benchmarks/gpu.py --data FOLDER
    python tests/benchmarks/gpu.py --data FOLDER --device cpu --backbones test_resnet --batch 8 --images 32 --quick

FOLDER holds flowers.zip as configs/README.md describes it. Each ratio is of two ways that take turns in one run;
medians. Weights are embedded or random, which costs the same. The second command tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featdiff import Detector, Guard, PixelDetector
from featdiff.data.batches import iter_batches, iter_loaded
from featdiff.data.references import list_images
from featdiff.features.backbones import Backbone, load_backbone
from featdiff.features.weights import DEFAULT_BACKBONE

BACKBONES = ("resnet50", DEFAULT_BACKBONE)
ROUNDS = 5
#: Batches of a pass from memory.
BATCHES = 8
#: Of trial runs: training that ends in a moment, and a U-Net that cannot do anything.
QUICK: dict[str, Any] = {"recipe": {"epochs": 1, "min_steps": 5}, "calibration": 0.4, "fpr": 0.2}
QUICK_PIXEL: dict[str, Any] = {
    "size": 16, "width": 8, "multipliers": (1, 2), "attention": (), "timesteps": 10, "steps": 2, "repetitions": 1,
    "distances": ("mse",), "recipe": {"min_steps": 2},
}  # fmt: skip
#: Images that the reference mode scores: each takes a thousand times as long.
INPAINTED = 16


class Bench:
    """One backbone on one device."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.batch: int = options.batch
        self.refs = list_images(options.data / "flowers.zip" / "train")[: options.images]
        self.quick: dict[str, Any] = QUICK if options.quick else {}
        self.arguments = {"backbone": name, "pretrained": name == DEFAULT_BACKBONE}
        self.runtime = {"device": options.device, "image_batch": options.batch, "engine": "torch"}

    def backbone(self) -> Backbone:
        return load_backbone(self.arguments["backbone"], pretrained=self.arguments["pretrained"])

    def detector(self, cache: str) -> Detector:
        return Detector(**self.arguments, **self.runtime, **self.quick, cache=cache)

    def pixels(self, transform: Callable[..., Tensor]) -> Iterator[Tensor]:
        for batch in iter_batches(iter_loaded(self.refs, transform, ahead=2 * self.batch), self.batch):
            for stack in batch.stacks:
                yield stack.pixels

    def autocast(self) -> AbstractContextManager[object]:
        """What detectors run a backbone by name under."""
        return torch.autocast("cuda", torch.float16) if self.device.type == "cuda" else nullcontext()

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """What is compared, its ratio, and what was wanted."""
        backbone = self.backbone()
        network = backbone.model.eval().to(self.device)
        with tempfile.TemporaryDirectory() as cache:
            start = self.now()
            detector = self.detector(cache).fit(self.refs)
            whole = self.now() - start

        @torch.inference_mode()
        def bare(batches: Iterator[Tensor] | list[Tensor]) -> None:
            for pixels in batches:
                with self.autocast():
                    network.forward_intermediates(pixels.to(self.device, non_blocking=True), intermediates_only=True)

        picture = next(self.pixels(backbone.transform))[:1].expand(self.batch, -1, -1, -1).contiguous()
        memory = [picture] * BATCHES
        passes: dict[str, float] = {}
        scores: dict[str, np.ndarray] = {}
        for engine in ("torch", "compile"):
            detector.extractor_.choose_engine(engine, memory[0])
            passes = self.medians(
                {
                    "bare, memory": lambda: bare(memory),
                    "score, memory": lambda: detector.score(iter(memory)),
                    "bare, files": lambda: bare(self.pixels(backbone.transform)),
                    "score, files": lambda: detector.score(self.refs),
                }
            )
            yield from self.speeds(passes, detector.extractor_.engine)
            scores[engine] = detector.score(self.refs).ood_score

        change = np.nanmax(np.abs(scores["compile"] - scores["torch"]))
        yield "largest change of a score by `compile`, in standard deviations", f"{change:.1e}", "rounding"

        beyond = whole / passes["bare, files"] - 1
        yield f"`train`, {len(self.refs):,} images, beyond one bare pass", f"{beyond:.2f} x", "at most 0.25 x"
        yield from self.guard(picture)

    def speeds(self, passes: Mapping[str, float], engine: str) -> Iterator[tuple[str, str, str]]:
        """Scoring beside the bare eager pass; ``passes``: seconds of each."""
        for source, count in (("memory", self.batch * BATCHES), ("files", len(self.refs))):
            ratio = passes[f"bare, {source}"] / passes[f"score, {source}"]
            what = f"`score` from {source}, {engine}, in speeds of the bare pass"
            yield f"{what} ({count / passes[f'score, {source}']:,.0f} images/s)", f"{ratio:.2f} x", "at least 0.95 x"

    def guard(self, pixels: Tensor) -> Iterator[tuple[str, str, str]]:
        """A guard beside its classifier, from memory."""
        classifier = self.backbone_with_head()
        guard = Guard(classifier, **self.quick).fit(iter([*self.pixels(self.backbone().transform)]))
        for count in (1, self.batch):
            images = pixels[:count].to(self.device)
            with torch.inference_mode():
                found = self.medians({"bare": lambda x=images: classifier(x), "guard": lambda x=images: guard(x)})
            yield (
                f"guard, batch {count}, over its classifier",
                f"{found['guard'] / found['bare']:.2f} x",
                "at most 1.05 x",
            )

    def backbone_with_head(self) -> torch.nn.Module:
        arguments = self.arguments | {"model_args": {"num_classes": 1000}}
        name = arguments.pop("backbone")
        return load_backbone(name, **arguments).model.eval().to(self.device)

    def reference_mode(self) -> tuple[str, str, str]:
        """Seconds an image of LMD in those of the feature mode."""
        options: dict[str, Any] = {"fpr": 0.2, "device": str(self.device)}
        options |= QUICK_PIXEL if self.quick else {"distances": ("mse",), "recipe": {"min_steps": 100}}
        with tempfile.TemporaryDirectory() as cache:
            feature = self.detector(cache).fit(self.refs)
            pixel = PixelDetector(**options, cache=cache).fit(self.refs)
            few = self.refs[:INPAINTED]
            found = self.medians(
                {"feature": lambda: feature.score(self.refs), "pixel": lambda: pixel.score(few)}, rounds=1
            )
        ratio = found["pixel"] / len(few) * len(self.refs) / found["feature"]
        return "the reference mode (LMD), in times of the feature mode", f"{ratio:,.1f} x", "at least 1,000 x"

    # ---- clock ----

    def now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def medians(self, ways: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
        """Seconds of each, taken in turns; the first turn warms up."""
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, way in ways.items():
                start = self.now()
                way()
                taken[name].append(self.now() - start)
        return {name: float(np.median(times[1:])) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backbones", default=",".join(BACKBONES))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="train for a moment: numbers mean nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    card = torch.cuda.get_device_name() if options.device.startswith("cuda") else "a CPU"
    print(f"{card}, torch {torch.__version__}, batches of {options.batch}\n")
    print("| backbone | what | measured | wanted |\n|---|---|---|---|", flush=True)
    for name in options.backbones.split(","):
        bench = Bench(name, options)
        for row in bench.rows():
            print(f"| {name} | {' | '.join(row)} |", flush=True)
    print(f"| {name} | {' | '.join(bench.reference_mode())} |")


if __name__ == "__main__":
    main()
