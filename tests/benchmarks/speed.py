"""How fast featdiff scores files, beside what else one would run; the table of RESULTS.md.

    python tests/benchmarks/speed.py --data FOLDER [--images 1000 --rounds 3]

FOLDER holds flowers.zip as configs/README.md describes it. Wall time on all cores, decoding included, in turns:
(a) a bare eager pass that gives all layers, (b) the same in the fastest engine, (c) what one would write by hand, a
loop over timm and nearest neighbours of scikit-learn, (d) PaDiM and PatchCore of anomalib on the same backbone, if
anomalib is installed, and featdiff itself by PyTorch and by its engine. The images of a training come first, so that
nothing is measured on what it was fitted with.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from engines import medians
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from featdiff import Detector, FeatureExtractor
from featdiff.data.batches import iter_batches, iter_loaded
from featdiff.data.references import ImageRef, list_images
from featdiff.features.backbones import load_backbone
from featdiff.features.engines import AUTO, TORCH
from featdiff.features.weights import DEFAULT_BACKBONE
from featdiff.runtime.allocator import keep_freed_memory

BATCH = 32
NEIGHBORS = 5
#: Of the default backbone, as PaDiM and PatchCore take them of a ResNet; and the channels that PaDiM keeps.
LAYERS = ["blocks.2", "blocks.4"]
KEPT = 100
#: Images from which PaDiM and PatchCore learn: they need not be good here, but PatchCore must hold their places.
FITTED = 30


def pixels_of(refs: list[ImageRef], transform: Callable[..., Tensor]) -> Iterator[Tensor]:
    for batch in iter_batches(iter_loaded(refs, transform, ahead=2 * BATCH), BATCH):
        for stack in batch.stacks:
            yield stack.pixels


def bare(extractor: FeatureExtractor, refs: list[ImageRef]) -> None:
    """(a) Decode, and run the network as a user would who wants its layers."""
    with torch.inference_mode():
        for pixels in pixels_of(refs, extractor.transform):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            extractor.model.forward_intermediates(pixels, intermediates_only=True)


def features(extractor: FeatureExtractor, refs: list[ImageRef]) -> None:
    """(b) Decode, and run what an engine makes of the network."""
    for pixels in pixels_of(refs, extractor.transform):
        extractor(pixels)


def names_of(refs: list[ImageRef]) -> list[str]:
    """Names in the archive."""
    return [ref.path.split("flowers.zip/")[1] for ref in refs]


class Pictures(Dataset[Tensor]):
    """Members of an archive, as one would write it."""

    def __init__(self, archive: Path, names: list[str], transform: Callable[[Image.Image], Tensor]) -> None:
        self.archive = zipfile.ZipFile(archive)
        self.names = names
        self.transform = transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> Tensor:
        with Image.open(io.BytesIO(self.archive.read(self.names[row]))) as picture:
            return self.transform(picture.convert("RGB"))


class ByHand:
    """(c) A timm loop, and scikit-learn."""

    def __init__(self, data: Path, train: list[str]) -> None:
        self.archive = data / "flowers.zip"
        self.model = load_backbone().model.eval()
        config = timm.data.resolve_data_config({}, model=self.model)
        self.transform = timm.data.create_transform(**config)
        self.neighbors = NearestNeighbors(n_neighbors=NEIGHBORS).fit(self.rows(train))

    @torch.inference_mode()
    def rows(self, names: list[str]) -> np.ndarray:
        pictures = DataLoader(Pictures(self.archive, names, self.transform), BATCH)
        rows = [self.model.forward_head(self.model.forward_features(x), pre_logits=True) for x in pictures]
        return nn.functional.normalize(torch.cat(rows)).numpy()

    def score(self, names: list[str]) -> np.ndarray:
        distances, _ = self.neighbors.kneighbors(self.rows(names))
        return distances[:, -1]


def anomalib_models() -> dict[str, nn.Module]:
    """(d) PaDiM and PatchCore with the weights of the default backbone, not fitted."""
    from anomalib.models.image.padim.torch_model import PadimModel
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    options = {"backbone": DEFAULT_BACKBONE, "layers": LAYERS, "pre_trained": False}
    models: dict[str, nn.Module] = {
        "PaDiM": PadimModel(**options, n_features=KEPT),
        "PatchCore": PatchcoreModel(**options),
    }
    weights = load_backbone().model.state_dict()
    for model in models.values():
        network = model.feature_extractor.feature_extractor
        missing = network.load_state_dict(weights, strict=False).missing_keys
        assert not missing, missing
    return models


def fit_anomalib(model: nn.Module, batches: list[Tensor]) -> None:
    model.train()
    with torch.no_grad():
        for pixels in batches:
            model(pixels)
        if hasattr(model, "subsample_embedding"):
            model.subsample_embedding(0.1)
        else:
            model.fit()
    model.eval()


@torch.inference_mode()
def run_anomalib(model: nn.Module, refs: list[ImageRef], transform: Callable[..., Tensor]) -> None:
    for pixels in pixels_of(refs, transform):
        model(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_freed_memory()  # as the command line does

    train = list_images(options.data / "flowers.zip" / "train")
    test = list_images(options.data / "flowers.zip" / "test")
    refs = [*test, *train][: options.images]
    plain = Detector(engine=TORCH).fit(train)
    detector = Detector(engine=AUTO).fit(train)
    by_hand = ByHand(options.data, names_of(train))
    print(f"{detector.engine_note_}; {torch.get_num_threads()} threads", flush=True)

    name = detector.extractor_.engine
    runs: dict[str, Callable[[], object]] = {
        "(a) bare eager pass, all layers": lambda: bare(plain.extractor_, refs),
        f"(b) the same, {name}": lambda: features(detector.extractor_, refs),
        "(c) timm loop, scikit-learn kNN": lambda: by_hand.score(names_of(refs)),
        "featdiff, torch": lambda: plain.score(refs),
        f"featdiff, {name}": lambda: detector.score(refs),
    }
    if importlib.util.find_spec("anomalib"):
        square = load_backbone(view="squash").transform  # these models take one size
        batches = list(pixels_of(train[:FITTED], square))
        for title, model in anomalib_models().items():
            fit_anomalib(model, batches)
            runs[f"(d) {title}, anomalib"] = lambda m=model: run_anomalib(m, refs, square)

    seconds = medians(runs, options.rounds, time.perf_counter)
    eager, fast, *_ = seconds.values()
    print(f"\n| {len(refs):,} files | images/s | over (a) | over (b) |\n|---|---|---|---|")
    for title, taken in seconds.items():
        print(f"| {title} | {len(refs) / taken:.0f} | {taken / eager:.2f} x | {taken / fast:.2f} x |")


if __name__ == "__main__":
    main()
