"""What energy, MSP and ViM add to the fused score, with a classifier for the in-domain classes and with one for others.

    python tests/benchmarks/logit_heads.py --data FOLDER

FOLDER holds what the suite cifar10 reads. The classifiers are the default backbone with a linear layer trained on the
in-domain training images, and with its own head for the 1,000 ImageNet classes. Features come from the cache.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from featdiff import Detector
from featdiff.data.splits import split
from featdiff.detectors.config import make_recipe
from featdiff.detectors.fitting import choose_bank
from featdiff.evaluation.metrics import auroc
from featdiff.features.backbones import load_backbone
from featdiff.features.extraction import extract
from featdiff.features.layout import LOGITS, FeatureLayout, Kind
from featdiff.features.store import Features, FeatureTable
from featdiff.scores.diffusion import Diffusion
from featdiff.scores.fused import Heads
from featdiff.scores.fusion import weighted_sum
from featdiff.scores.registry import Context, Options, make_scores

SUITE = Path(__file__).parents[2] / "configs" / "suites" / "cifar10.toml"
FAR = ("gtsrb_32", "fashion_mnist_32", "tiny_imagenet_32", "dtd_32")
JOINED = ((), ("energy",), ("msp",), ("vim",), ("energy", "msp"), ("energy", "msp", "vim"))
DIFFUSION = ("joint", "hidden_ratio", "hidden_max", "blocks", "timesteps", "seed", "start_times", "draws", "stride")


class Reader:
    """Features of the default backbone."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.detector = Detector()
        self.extractor = self.detector.extractor_ = self.detector._make_extractor(None)
        self.store = self.detector.feature_store()

    def read(self, name: str) -> tuple[Tensor, np.ndarray]:
        """Features (N, D) and the names of the folders the images lie in (N,)."""
        batches, total = self.detector.batches(self.data / name, self.store)
        extraction = extract(batches, self.extractor, self.store, total)
        folders = np.array([path.split("/")[-2] for path in extraction.paths])
        return self.store.table(extraction.digests)[:], folders

    def pre_logits(self, features: Tensor) -> Tensor:
        part = self.extractor.layout.pre_logits
        assert part is not None
        return features[:, part.columns]


def trained(vectors: Tensor, labels: np.ndarray) -> nn.Linear:
    """Softmax regression, 15 epochs of AdamW."""
    names = sorted(set(labels))
    target = torch.tensor([names.index(label) for label in labels])
    last = nn.Linear(vectors.shape[1], len(names))
    source = torch.Generator().manual_seed(0)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    optimizer = torch.optim.AdamW(last.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(15):
        for batch in torch.randperm(len(vectors), generator=source).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(last(vectors[batch]), target[batch]).backward()
            optimizer.step()
    return last


def in_memory(features: Tensor) -> Features:
    """A tensor (N, D) as a table, which scores are fitted on."""
    where = np.stack([np.zeros(len(features), dtype=np.int64), np.arange(len(features))], axis=1)
    return FeatureTable([features.numpy()], where, features.shape[1])


def fitted(reader: Reader, train: Tensor, last: nn.Linear) -> Heads:
    """Heads with every score of ``JOINED``, on features (N, D) that end with the logits of ``last``."""
    settings = reader.detector.settings
    parts = reader.extractor.layout.parts
    widths = {(part.layer, part.kind): part.width for part in parts} | {(LOGITS, Kind.LOGITS): last.out_features}
    layout = FeatureLayout.of(widths)

    table = in_memory(train)
    rows = split(len(train), settings.calibration, settings.validation, 0)
    size = min(settings.bank_size, len(rows.training))
    options = Options(size, settings.neighbors, settings.backend)
    members = [score for name in ("neighbors", *JOINED[-1]) for score in make_scores(name, layout, options)]
    diffusion = Diffusion(layout, **{name: getattr(settings, name) for name in DIFFUSION})
    heads = Heads(diffusion, members)

    bank = choose_bank(table, rows.training, size, "random", 0, diffusion.stages)
    context = Context(
        training=table.select(rows.training),
        validation=table.select(rows.validation),
        recipe=make_recipe(settings.recipe),
        classifier=last,
    )
    heads.fit(table.select(bank), context)
    return heads


@torch.no_grad()
def standardised(heads: Heads, features: Tensor) -> Tensor:
    """Features (B, D) -> z-scores of diffusion and of each member (B, 1 + members)."""
    return torch.cat(
        [(heads._joined(heads.measure(part))[0] - heads.mean) / heads.deviation for part in features.split(512)]
    )


def aurocs(reader: Reader, last: nn.Linear, train: Tensor, test: Tensor, oods: Mapping[str, Tensor]) -> list[float]:
    """Mean AUROC over the OOD sets of each way in ``JOINED``, in percent."""

    def with_logits(features: Tensor) -> Tensor:
        return torch.cat([features, last(reader.pre_logits(features))], dim=1).detach()

    heads = fitted(reader, with_logits(train), last)
    inside = standardised(heads, with_logits(test))
    outside = [standardised(heads, with_logits(features)) for features in oods.values()]
    names = ["layerwise", *(str(score.name) for score in heads.members)]

    means = []
    for joined in JOINED:
        left_out = set(JOINED[-1]) - set(joined)
        weights = heads.weights * torch.tensor([float(name not in left_out) for name in names])
        scores = [auroc(weighted_sum(inside, weights).numpy(), weighted_sum(z, weights).numpy()) for z in outside]
        means.append(100 * float(np.mean(scores)))
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    reader = Reader(parser.parse_args().data)
    train, train_labels = reader.read("cifar10.zip/train")
    test, test_labels = reader.read("cifar10.zip/test")
    imagenet = load_backbone(model_args={"num_classes": 1000}).model.get_classifier()
    tasks = {"far": (list(set(train_labels)), {name: reader.read(f"{name}.zip")[0] for name in FAR})}
    sources = tomllib.loads(SUITE.read_text())["sources"]
    for number in (1, 2, 3):
        classes = sources[f"in{number}_train"]["classes"]
        tasks[f"near {number}"] = (classes, {"other": test[~np.isin(test_labels, classes)]})
    print("task, head:", *(" + ".join(("fused", *joined)) for joined in JOINED), sep=" | ")
    for task, (classes, oods) in tasks.items():
        mine, here = np.isin(train_labels, classes), np.isin(test_labels, classes)
        own = trained(reader.pre_logits(train[mine]), train_labels[mine])
        for kind, last in (("trained on these classes", own), ("ImageNet", imagenet)):
            means = aurocs(reader, last, train[mine], test[here], oods)
            print(f"{task}, {kind}", *(f"{mean:.2f}" for mean in means), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
