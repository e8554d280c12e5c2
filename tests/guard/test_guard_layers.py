"""Guards that choose the layers of their classifier themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from classifiers import RECIPE, huggingface, loader, own_code, same, seeded, some_images
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18, squeezenet1_1
from torchvision.transforms import v2
from transformers import SwinConfig, SwinForImageClassification

from featdiff import Guard
from featdiff.exceptions import UsageError
from featdiff.features.networks import logits_of


def swin() -> nn.Module:
    sizes = {"image_size": 64, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [2, 2, 2], "window_size": 4}
    return seeded(lambda: SwinForImageClassification(SwinConfig(num_labels=4, **sizes)))


class Attentive(nn.Module):
    """A block that returns its attention too, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        mixed, weights = self.attention(hidden, hidden, hidden)
        return hidden + mixed, weights


class Pairs(nn.Module):
    """A small transformer of blocks that return tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, 16)
        self.blocks = nn.ModuleList(Attentive() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x.mean(1))


CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "torchvision resnet": (
        lambda: seeded(lambda: resnet18(num_classes=4)),
        ["relu", "layer1", "layer2", "layer3", "layer4", "pre_logits"],
    ),
    "torchvision squeezenet": (
        lambda: seeded(lambda: squeezenet1_1(num_classes=4)),
        ["features.1", "features.4", "features.7", "features.12"],
    ),
    "huggingface vit": (huggingface, ["vit.layers.0", "vit.layers.1", "vit.layers.2", "pre_logits"]),
    "huggingface swin": (
        swin,
        ["swin.encoder.layers.0.blocks.1", "swin.encoder.layers.1.blocks.1", "swin.encoder.layers.2", "pre_logits"],
    ),
    "tuples": (lambda: seeded(Pairs), ["blocks.0", "blocks.1", "blocks.2", "pre_logits"]),
    "own": (own_code, ["first", "second", "pre_logits"]),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_guard_without_layers_fits_scores_and_loads(kind: str, tmp_path: Path) -> None:
    make, expected = CLASSIFIERS[kind]
    classifier = make()
    guard = Guard(classifier, recipe=RECIPE, fpr=0.1, hidden_max=64, calibration=0.2)
    guard.fit(loader(some_images(60, seed=1)))
    stages = [layer for layer in expected if layer != "pre_logits"]  # those that have a score of their own
    assert list(guard.detector.extractor_.layers) == expected
    assert guard.detector.layers == stages

    images = some_images(8, seed=2)
    with torch.inference_mode():
        logits, verdict = guard(images)
        assert torch.equal(logits, logits_of(classifier(images)))
    assert verdict is not None
    assert torch.isfinite(verdict.ood_score).all()
    assert list(verdict.layers) == stages

    with torch.inference_mode():
        _, strange = guard(torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(3)))
    assert strange is not None
    assert strange.ood_score.mean() > verdict.ood_score.mean() + 1  # noise, where smooth pictures were learned

    guard.save_pretrained(tmp_path / "guard")
    with torch.inference_mode():
        _, again = Guard.from_pretrained(tmp_path / "guard", make())(images)
    same(again, verdict)


def test_a_classifier_without_stages_is_refused_before_images_are_read() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 8), nn.ReLU(), nn.Linear(8, 4))
    guard = Guard(model, input_size=(3, 64, 64), recipe=RECIPE)
    with pytest.raises(UsageError, match=r"finds no stages in Sequential.*1 \(8\)"):
        guard.check_layers()
    with pytest.raises(UsageError, match=r"finds no stages in Sequential.*1 \(8\)"):
        guard.fit(loader(some_images(40, seed=1)))


def test_a_guard_takes_datasets_of_pictures_with_a_transform(tmp_path: Path) -> None:
    to_picture = v2.ToPILImage()
    for i, image in enumerate(some_images(60, seed=1)):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        to_picture(image).save(folder / f"{i}.png")

    prepare = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    folder_of_images = ImageFolder(str(tmp_path))
    images = some_images(8, seed=2)
    verdicts = []
    pictures = [Image.open(path) for path, _ in folder_of_images.samples]
    for source in (folder_of_images, str(tmp_path), (picture for picture in pictures)):
        guard = Guard(own_code(), transform=prepare, recipe=RECIPE, fpr=0.1).fit(source)
        verdicts.append(guard(images)[1])
    same(verdicts[0], verdicts[1])
    same(verdicts[0], verdicts[2])
