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
from featdiff.detectors.fitting import fit_heads
from featdiff.evaluation.metrics import auroc
from featdiff.features.backbones import load_backbone
from featdiff.features.extraction import extract
from featdiff.scores.fused import FusedHeads

SUITE = Path(__file__).parents[2] / "configs" / "suites" / "cifar10.toml"
FAR = ("gtsrb_32", "fashion_mnist_32", "tiny_imagenet_32", "dtd_32")
JOINED = ((), ("energy",), ("msp",), ("vim",), ("energy", "msp"), ("energy", "msp", "vim"))
HEADS = ("joint", "hidden_ratio", "hidden_max", "blocks", "timesteps", "seed", "start_times", "draws", "stride")


class Features:
    """Rows of the default backbone, and of what classifiers see."""

    def __init__(self, data: Path) -> None:
        self.data, self.detector = data, Detector()
        self.extractor = self.detector.extractor_ = self.detector._extractor()
        self.store = self.detector.feature_store()

    def rows(self, name: str) -> tuple[Tensor, np.ndarray]:
        """Rows (N, D) and the names of the folders the images lie in (N,)."""
        found = extract(self.detector.batches(self.data / name, self.store)[0], self.extractor, self.store)
        table = self.store.table(found.digests)
        return torch.cat(list(table.chunks())), np.array([path.split("/")[-2] for path in found.paths])

    def pre_logits(self, rows: Tensor) -> Tensor:
        return rows[:, self.extractor.columns["pre_logits"]]


def trained(vectors: Tensor, labels: np.ndarray) -> nn.Linear:
    """Softmax regression, 15 epochs of AdamW."""
    names = sorted(set(labels))
    target = torch.tensor([names.index(label) for label in labels])
    last, source = nn.Linear(vectors.shape[1], len(names)), torch.Generator().manual_seed(0)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    optimizer = torch.optim.AdamW(last.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(15):
        for batch in torch.randperm(len(vectors), generator=source).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(last(vectors[batch]), target[batch]).backward()
            optimizer.step()
    return last


@torch.no_grad()
def aurocs(features: Features, last: nn.Linear, train: Tensor, test: Tensor, oods: Mapping[str, Tensor]) -> list[float]:
    """Mean AUROC over the OOD sets of each way in ``JOINED``, in percent."""
    arguments, classes = features.detector.arguments, last.out_features
    width, names = features.extractor.width, JOINED[-1]
    columns = {**features.extractor.columns, "logits": slice(width, width + classes)}
    settings = {name: arguments[name] for name in (*HEADS, "neighbors", "fusion", "backend")}

    def with_logits(rows: Tensor) -> Tensor:
        return torch.cat([rows, last(features.pre_logits(rows))], 1)

    table, parts = with_logits(train), split(len(train), arguments["calibration"], arguments["validation"], 0)
    heads = FusedHeads(
        columns, bank_rows=min(arguments["bank_size"], len(parts.training)), logit_heads=names, **settings
    )
    assert heads.logits is not None
    heads.logits.fit_vim(table[parts.training], last.weight, last.bias)
    with torch.enable_grad():
        fit_heads(heads, table, parts, features.detector.recipe, 0, arguments["bank_size"], "random")

    def z(rows: Tensor) -> Tensor:
        return torch.cat([heads._z(heads._raw(part, ("layerwise",))[0]) for part in with_logits(rows).split(512)])

    known, strange = z(test), {name: z(rows) for name, rows in oods.items()}
    found = []
    for joined in JOINED:
        weights = heads.fusion.weights * torch.tensor([name not in names or name in joined for name in heads.names])
        scores = [auroc((known @ weights).numpy(), (rows @ weights).numpy()) for rows in strange.values()]
        found.append(100 * float(np.mean(scores)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    features = Features(parser.parse_args().data)
    train, train_labels = features.rows("cifar10.zip/train")
    test, test_labels = features.rows("cifar10.zip/test")
    imagenet = load_backbone(model_args={"num_classes": 1000}).model.get_classifier()
    tasks = {"far": (list(set(train_labels)), {name: features.rows(f"{name}.zip")[0] for name in FAR})}
    sources = tomllib.loads(SUITE.read_text())["sources"]
    for number in (1, 2, 3):
        classes = sources[f"in{number}_train"]["classes"]
        tasks[f"near {number}"] = (classes, {"other": test[~np.isin(test_labels, classes)]})
    print("task, head:", *(" + ".join(("fused", *joined)) for joined in JOINED), sep=" | ")
    for task, (classes, oods) in tasks.items():
        mine, here = np.isin(train_labels, classes), np.isin(test_labels, classes)
        own = trained(features.pre_logits(train[mine]), train_labels[mine])
        for kind, last in (("trained on these classes", own), ("ImageNet", imagenet)):
            found = aurocs(features, last, train[mine], test[here], oods)
            print(f"{task}, {kind}", *(f"{mean:.2f}" for mean in found), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
