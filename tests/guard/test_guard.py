"""A guarded classifier: the same logits, and a verdict from the same pass."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from classifiers import (
    CLASSIFIERS,
    OWN_LAYERS,
    RECIPE,
    Mean,
    OwnCode,
    hooks_of,
    loader,
    own_code,
    resnet,
    same,
    seeded,
    some_images,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from featdiff import Detector, Guard
from featdiff.exceptions import ModelError, NotFittedError, UsageError

# ---------------------------------------- logits and verdict


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_logits_to_the_last_bit_and_a_verdict(kind: str, images: Tensor) -> None:
    make, layers = CLASSIFIERS[kind]
    classifier = make()
    guard = Guard(classifier, layers=layers, recipe=RECIPE, fpr=0.1).fit(loader(some_images(120, seed=1)))
    logits, verdict = guard(images)
    bare = classifier(images)
    if kind == "huggingface":
        assert torch.equal(guard(pixel_values=images)[1].ood_score, verdict.ood_score)
    assert torch.equal(logits, bare if isinstance(bare, Tensor) else bare.logits)
    assert verdict.ood_score.shape == verdict.p_value.shape == verdict.is_ood.shape == (6,)
    assert list(verdict.layers) == guard.detector.layers
    assert verdict.is_ood.dtype == torch.bool
    assert verdict.predicted.tolist() == logits.argmax(1).tolist()
    assert all(tensor.device == logits.device for tensor in verdict.layers.values())
    # noise is stranger than smooth pictures
    assert verdict.ood_score[4:].min() > verdict.ood_score[:4].max()
    assert verdict.is_ood[4:].all()


def test_verdict_is_that_of_the_detector_on_the_same_images(guard: Guard, images: Tensor) -> None:
    _, verdict = guard(images)
    scores = guard.detector.score(iter([images]))
    np.testing.assert_allclose(verdict.ood_score.numpy(), scores.ood_score, rtol=1e-5, atol=1e-5)
    expected, is_ood = guard.detector.calibration_.flags(verdict.ood_score.numpy(), guard.fpr)
    np.testing.assert_allclose(verdict.p_value.numpy(), expected, rtol=1e-6)
    assert verdict.is_ood.tolist() == is_ood.tolist()
    for name, values in scores.layers.items():
        np.testing.assert_allclose(verdict.layers[name].numpy(), values, rtol=1e-4, atol=1e-4)


def test_verdict_does_not_depend_on_the_batch(guard: Guard, images: Tensor) -> None:
    _, together = guard(images)
    alone = torch.cat([guard(image[None])[1].ood_score for image in images])
    torch.testing.assert_close(together.ood_score, alone, rtol=1e-4, atol=1e-4)


def test_false_alarm_rate_can_be_set_anew(guard: Guard) -> None:
    loose = copy.deepcopy(guard)
    ordinary = some_images(100, seed=5)
    _, strict = guard(ordinary)
    loose.fpr = 0.9
    _, verdict = loose(ordinary)
    assert strict.is_ood.tolist() == (strict.p_value <= 0.1).tolist()
    assert verdict.is_ood.sum() > 70 > strict.is_ood.sum()
    with pytest.raises(UsageError, match="needs at least 999 held-out images"):
        loose.fpr = 0.001


def test_abstaining_guard_predicts_minus_one(guard: Guard, saved: Path, images: Tensor) -> None:
    logits, verdict = Guard.from_pretrained(saved, guard.classifier, abstain=True)(images)
    expected = torch.where(verdict.is_ood, -1, logits.argmax(1))
    assert verdict.is_ood.any()
    assert not verdict.is_ood.all()
    assert verdict.predicted.tolist() == expected.tolist()


def test_detector_of_the_bare_backbone(
    tiny_arguments: dict[str, Any], sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    """A detector trained on files guards a classifier on the same backbone, with another head."""
    some = sorted(sample_folders["test"].iterdir())
    detector = Detector(**{**tiny_arguments, "layers": "layer2,layer4,pre_logits", "fpr": 0.1}).fit(some)
    classifier = timm.create_model("test_resnet", pretrained=False, num_classes=3).eval()
    classifier.load_state_dict(detector.extractor_.model.state_dict(), strict=False)
    guard = Guard(classifier, detector)
    pixels = some_images(5, seed=2, side=160)
    _, verdict = guard(pixels)
    expected = detector.score(iter([pixels]))
    np.testing.assert_allclose(verdict.ood_score.numpy(), expected.ood_score, rtol=1e-4, atol=1e-4)
    assert list(verdict.layers) == ["layer2", "layer4"]
    detector.save_pretrained(tmp_path / "model")
    weights = tiny_arguments["weights"]
    same(Guard.from_pretrained(tmp_path / "model", classifier, weights=weights)(pixels)[1], verdict)
    assert guard.detector.score(some[:5]).p_value.shape == (5,)  # files, by the detector's transform
    with torch.no_grad():
        classifier.layer1[0].conv1.weight[0] += 0.1
    with pytest.raises(ModelError, match=r"not the network.*layer1\.0\.conv1\.weight has other weights"):
        Guard(classifier, detector)
    with pytest.raises(ModelError, match="has no such weights"):
        Guard(own_code(), detector)
    with pytest.raises(UsageError, match="layers is decided by the detector"):
        Guard(classifier, detector, layers="auto")
    with pytest.raises(UsageError, match="make a Guard without one"):
        guard.fit(loader(pixels))


@pytest.mark.parametrize("output", ["tensor", "dict"])
def test_other_channels_and_arguments(output: str) -> None:
    """Grey pictures, batches as Hugging Face makes them, and further arguments of the classifier."""
    classifier = seeded(lambda: OwnCode(channels=1, output=output))
    grey = some_images(120, seed=1, side=28, channels=1)
    batches = [{"pixel_values": part, "labels": torch.zeros(len(part))} for part in grey.split(40)]
    guard = Guard(classifier, layers=OWN_LAYERS, recipe=RECIPE, fpr=0.1).fit(batches)
    for same_images in (grey, [(part, torch.zeros(len(part))) for part in grey.split(50)]):
        again = Guard(classifier, layers=OWN_LAYERS, recipe=RECIPE, fpr=0.1).fit(same_images)
        np.testing.assert_allclose(
            again.detector.calibration_.scores, guard.detector.calibration_.scores, rtol=1e-3, atol=1e-4
        )
    logits, verdict = guard(grey[:3], scale=2.0)
    assert torch.equal(logits, 2 * guard(grey[:3])[0])
    assert verdict.ood_score.shape == (3,)


# ---------------------------------------- nothing is left behind


def test_a_pass_leaves_the_classifier_as_it_was(saved: Path, images: Tensor) -> None:
    classifier = resnet()
    seen: list[Tensor] = []
    classifier.layer2.register_forward_hook(lambda module, args, output: seen.append(output))
    classifier.layer3.requires_grad_(False)
    guard = Guard.from_pretrained(saved, classifier)
    seen.clear()
    before, random = hooks_of(classifier), torch.get_rng_state()
    state = {name: value.clone() for name, value in classifier.state_dict().items()}
    logits, _ = guard(images)
    assert len(seen) == 1
    assert hooks_of(classifier) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in classifier.modules())
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert all(torch.equal(value, state[name]) for name, value in classifier.state_dict().items())
    assert [p.requires_grad for p in classifier.layer3.parameters()] == [False] * 2 * 6
    logits.sum().backward()
    guarded = classifier.fc.weight.grad.clone()
    classifier.zero_grad()
    classifier(images).sum().backward()
    assert torch.equal(guarded, classifier.fc.weight.grad)


def test_fitting_leaves_modes_and_chance_alone() -> None:
    classifier = own_code()
    classifier.second.train()
    random = torch.get_rng_state()
    Guard(classifier, layers=OWN_LAYERS, recipe=RECIPE, fpr=0.1).fit(
        DataLoader(TensorDataset(some_images(60, seed=1)), batch_size=32, shuffle=True)
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in classifier.modules()] == [False, False, True, False]
    assert sum(hooks_of(classifier)) == 0


def test_train_mode_is_kept_and_warned_of(saved: Path, images: Tensor) -> None:
    classifier, twin = resnet(), resnet()
    guard = Guard.from_pretrained(saved, classifier)
    classifier.train()
    twin.train()
    with pytest.warns(UserWarning, match="train mode"):
        logits, verdict = guard(images)
    assert torch.equal(logits, twin(images))
    assert all(module.training for module in classifier.modules())
    assert verdict.ood_score.shape == (6,)


def test_a_guard_has_the_parameters_of_its_classifier_alone(guard: Guard) -> None:
    names = {name.removeprefix("classifier.") for name, _ in guard.named_parameters()}
    assert names == {name for name, _ in guard.classifier.named_parameters()}
    assert set(guard.state_dict()) == {f"classifier.{name}" for name in guard.classifier.state_dict()}


def test_verdict_can_weigh_a_loss(guard: Guard, images: Tensor) -> None:
    logits, verdict = guard(images)
    (logits.sum(1) * verdict.ood_score).sum().backward()
    assert guard.classifier.fc.weight.grad is not None
    guard.classifier.zero_grad()


# ---------------------------------------- copies


def test_repr_is_one_line(guard: Guard, saved: Path) -> None:
    assert repr(guard) == "Guard(ResNet, fitted on 200 images, 40 for calibration, fpr=0.1)"
    assert repr(Guard(own_code(), layers=OWN_LAYERS)) == "Guard(OwnCode, not fitted, fpr=0.05)"
    abstaining = Guard.from_pretrained(saved, nn.DataParallel(guard.classifier), fpr=0.3, abstain=True)
    assert repr(abstaining).startswith("Guard(ResNet, fitted on 200 images, 40 for calibration, fpr=0.3, abstain=True)")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda guard: pickle.loads(pickle.dumps(guard))])
def test_copies(again: Callable[[Guard], Guard], guard: Guard, images: Tensor) -> None:
    twin = again(guard)
    assert twin.classifier is not guard.classifier
    assert torch.equal(twin(images)[1].ood_score, guard(images)[1].ood_score)


def test_saved_guard_knows_its_classifier(guard: Guard, saved: Path, images: Tensor, tmp_path: Path) -> None:
    loaded = Guard.from_pretrained(saved, resnet())
    assert torch.equal(loaded(images)[1].ood_score, guard(images)[1].ood_score)
    assert loaded.fpr == 0.1
    loaded.fpr = 0.3
    loaded.save_pretrained(tmp_path / "again")
    assert Guard.from_pretrained(tmp_path / "again", resnet()).fpr == 0.3
    other_head = resnet()
    nn.init.constant_(other_head.fc.bias, 1.0)
    for stranger in (other_head, own_code()):
        with pytest.raises(ModelError, match="other weights"):
            Guard.from_pretrained(saved, stranger)


# ---------------------------------------- what cannot be guarded


def failing(classifier: nn.Module, images: Tensor, **arguments: Any) -> str:
    guard = Guard(own_code(), layers=OWN_LAYERS, recipe=RECIPE, fpr=0.1, **arguments)
    guard.fit(loader(some_images(60, seed=1)))
    guard.classifier.__dict__["output"] = classifier.output  # it changes its mind once fitted
    with pytest.raises(UsageError) as error:
        guard(images)
    return str(error.value)


@pytest.mark.parametrize(
    ("output", "words"),
    [("text", "the classifier gives str"), ("fewer", r"shape (5, 3) for 6 images"), ("map", "shape (6, 3, 1)")],
)
def test_classifier_that_gives_something_else(output: str, words: str, images: Tensor) -> None:
    assert words in failing(OwnCode(output=output), images)


def test_layer_names_are_checked_at_once() -> None:
    with pytest.raises(UsageError, match=r"unknown layer 'layer9'; did you mean"):
        Guard(resnet(), layers=["layer1", "layer9"])
    with pytest.raises(UsageError, match=r"unknown layer 'third'; known: first, second, last"):
        Guard(own_code(), layers=["first", "third"])


def test_layer_that_is_gone_for_a_while(saved: Path, images: Tensor) -> None:
    """One failed pass leaves nothing behind."""
    guard = Guard.from_pretrained(saved, resnet())
    expected = guard(images)[1]
    layer, guard.classifier.layer3 = guard.classifier.layer3, nn.Identity()
    before = hooks_of(guard.classifier)
    del guard.classifier.layer3
    with pytest.raises(UsageError, match="no layer 'layer3' any more"):
        guard(images)
    assert sum(hooks_of(guard.classifier)) == sum(before) == 0
    guard.classifier.layer3 = layer
    same(guard(images)[1], expected)


def test_a_single_logit_has_no_probability_to_compare() -> None:
    classifier = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(2), Mean(), nn.Linear(8, 1)))
    with pytest.raises(UsageError, match="single logit"):
        Guard(classifier, layers=["0", "1"], extra_heads=("msp",), fpr=0.2).fit(loader(some_images(30, seed=1)))


def test_layer_that_is_never_reached() -> None:
    classifier = own_code()
    classifier.unused = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="layer 'unused' was not reached"):
        Guard(classifier, layers=["first", "unused"]).fit(loader(some_images(30, seed=1)))


def test_not_a_module_and_not_fitted(images: Tensor) -> None:
    with pytest.raises(UsageError, match="nn.Module.*not function"):
        Guard(own_code)  # type: ignore[arg-type]
    with pytest.raises(NotFittedError, match=r"fit\(loader\)"):
        Guard(resnet())(images)
    with pytest.raises(UsageError, match="between 0 and 1"):
        Guard(resnet(), fpr=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[:0], r"at least one image, not shape \(0, 3, 64, 64\)"),
        (lambda x: [x], "not list"),
        (lambda x: x.half(), "images are float16, the classifier's weights float32"),
        (lambda x: x.index_fill(0, torch.tensor([1, 4]), torch.nan), "NaN or infinite pixels in the batch, rows 1, 4"),
    ],
)
def test_bad_batches(change: Callable[[Tensor], Any], words: str, guard: Guard, images: Tensor) -> None:
    with pytest.raises(UsageError, match=words):
        guard(change(images))
    assert sum(hooks_of(guard.classifier)) == 0
    assert guard(images)[1] is not None


@pytest.mark.filterwarnings("ignore:the classifier runs in float16")
def test_overflow_names_layer_and_row(images: Tensor) -> None:
    classifier = own_code()
    guard = Guard(classifier, layers=OWN_LAYERS, recipe=RECIPE, fpr=0.1).fit(loader(some_images(60, seed=1)))
    nn.init.ones_(classifier.first.weight)
    classifier.half()
    pixels = images.half()
    pixels[2] = 60_000
    with pytest.raises(UsageError, match=r"layer 'first' gives NaN or infinite values for rows 2 .*bfloat16"):
        guard(pixels)


def test_errors_of_the_classifier_are_its_own(guard: Guard) -> None:
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="channels"):
        guard(torch.rand(2, 5, 64, 64))


def test_layers_can_be_looked_at_before_the_work() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unused, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]

    Guard(Odd(), layers=["body"]).check_layers()
    with pytest.raises(UsageError, match="layer 'unused' was not reached"):
        Guard(Odd(), layers=["unused"]).check_layers()
