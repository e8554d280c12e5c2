"""Classifiers to be trained: new, saved and loaded through timm itself, cut in two, and seen in further views."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from model_mutations import reseal
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from featdiff.data.batches import iter_batches, iter_loaded
from featdiff.data.references import FileRef
from featdiff.exceptions import ModelError, UsageError, WeightsError
from featdiff.features.backbones import load_backbone
from featdiff.features.extraction import extract
from featdiff.features.extractor import FeatureExtractor
from featdiff.features.networks import fingerprint
from featdiff.features.store import FeatureStore
from featdiff.files.model_folder import save
from featdiff.hardening.frozen import default_cut, split_at
from featdiff.hardening.students import Classifier, load_classifier, new_classifier, save_classifier
from featdiff.hardening.views import View

CLASSES = ("temple", "flower", "Größe")
FAMILIES = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet")


def tiny(name: str = "test_resnet", **options: Any) -> Classifier:
    return new_classifier(name, CLASSES, pretrained=False, **options)


def images(classifier: Classifier, count: int = 2) -> Tensor:
    return torch.rand(count, *classifier.data_config["input_size"], generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits_of(model: Any, pixels: Tensor) -> Tensor:
    found: Tensor = model.eval()(pixels)
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a saved classifier."""
    save_classifier(tiny(), tmp_path / "student", {"epochs": 3})
    return tmp_path / "student"


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    reseal(folder)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    reseal(folder)


# ---------------------------------------- a new classifier


@pytest.mark.parametrize("name", FAMILIES)
def test_new_head_sees_the_pre_logits_of_the_backbone(name: str) -> None:
    classifier = tiny(name)
    model: Any = classifier.model
    pixels = images(classifier)
    with torch.inference_mode():
        pooled = load_backbone(name, pretrained=False).model(pixels)
        assert torch.equal(model.forward_head(model.forward_features(pixels), pre_logits=True), pooled)
        head = model.get_classifier()
        assert torch.allclose(model(pixels), head(pooled), atol=1e-6)
    assert head.out_features == len(CLASSES)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_are_those_of_the_backbone(seeded_backbone: Path) -> None:
    classifier = new_classifier("test_resnet", CLASSES, weights=seeded_backbone)
    given, found = load_file(seeded_backbone), classifier.model.state_dict()
    assert classifier.name == "test_resnet.r160_in1k"
    assert all(torch.equal(found[name], given[name]) for name in given if not name.startswith("fc."))
    assert found["fc.weight"].shape == (3, 96)


def test_head_follows_the_seed_and_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (tiny(seed=seed).model.get_parameter("fc.weight") for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("classes", [(), ("one",), ("a", "b", "a")])
def test_classes_that_make_no_sense_are_refused(classes: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="two classes or more, each named once"):
        new_classifier("test_resnet", classes, pretrained=False)


def test_network_whose_head_timm_cannot_change_is_refused() -> None:
    with pytest.raises(UsageError, match=r"repvit_m0_9\.\w+ cannot be given a classifier of its own"):
        tiny("repvit_m0_9")  # a reset leaves out the second head that the architecture has


# ---------------------------------------- saved and loaded


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_loads_a_saved_classifier_to_the_same_logits(name: str, tmp_path: Path) -> None:
    classifier = tiny(name)
    save_classifier(classifier, tmp_path, {})
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    pixels = images(classifier)
    expected = logits_of(classifier.model, pixels)
    assert torch.equal(logits_of(model, pixels), expected)
    assert torch.equal(logits_of(load_classifier(tmp_path).model, pixels), expected)


def test_arguments_preprocessing_classes_and_facts_are_kept(tmp_path: Path) -> None:
    classifier = tiny("test_efficientnet", model_args={"pad_type": "same"})
    classifier.data_config.update(crop_pct=0.5, mean=(0.1, 0.2, 0.3))
    save_classifier(classifier, tmp_path / "a", {"epochs": 3})
    loaded = load_classifier(tmp_path / "a")
    save_classifier(loaded, tmp_path / "b", {})  # once more, from what was loaded
    pixels = images(classifier)
    for folder, facts in (("a", {"epochs": 3}), ("b", {})):
        model = timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True)
        assert repr(model) == repr(classifier.model) != repr(tiny("test_efficientnet").model)
        assert torch.equal(logits_of(model, pixels), logits_of(classifier.model, pixels))
        assert timm.data.resolve_model_data_config(model)["crop_pct"] == 0.5
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config["label_names"], config["featdiff"]) == (list(CLASSES), facts)
        assert str(tmp_path) not in json.dumps(config)
    assert (loaded.name, loaded.classes) == ("test_efficientnet.r160_in1k", CLASSES)
    assert tuple(loaded.data_config["mean"]) == (0.1, 0.2, 0.3)
    assert loaded.model_args["pad_type"] == "same"


def test_student_of_a_saved_classifier_has_its_weights_and_arguments(tmp_path: Path) -> None:
    first = tiny("test_efficientnet", model_args={"pad_type": "same"})
    save_classifier(first, tmp_path, {})
    second = new_classifier(f"local-dir:{tmp_path}", ("a", "b"))
    assert second.model_args["pad_type"] == "same"
    assert second.name == first.name
    found, given = second.model.state_dict(), first.model.state_dict()
    assert all(torch.equal(found[name], given[name]) for name in given if not name.startswith("classifier."))
    assert found["classifier.weight"].shape == (2, 256)


def test_pooled_features_of_a_folder_are_those_of_its_classifier(saved: Path) -> None:
    classifier = load_classifier(saved)
    model: Any = classifier.model
    extractor = FeatureExtractor(load_backbone(f"local-dir:{saved}"))
    pixels = images(classifier)
    with torch.inference_mode():
        features = model.forward_features(pixels)
        pooled = model.forward_head(features, pre_logits=True)
    rows = extractor(pixels)
    layout = extractor.layout
    assert layout.pre_logits is not None and layout.last_stage.layer == "layer4"
    assert torch.allclose(rows[:, layout.pre_logits.columns], pooled, atol=1e-6)
    assert torch.allclose(rows[:, layout.last_stage.columns], features.mean((2, 3)), atol=1e-6)
    assert extractor.backbone.fingerprint == fingerprint(_headless(model))


def _headless(model: Any) -> Any:
    model.reset_classifier(0)
    return model


def test_timm_folder_without_class_names_is_loaded(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", pretrained=False, num_classes=4)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=False)
    loaded = load_classifier(tmp_path)
    assert loaded.classes == ("0", "1", "2", "3")
    pixels = images(loaded)
    assert torch.equal(logits_of(loaded.model, pixels), logits_of(model, pixels))


def test_class_names_may_be_given_by_number(saved: Path) -> None:
    change_config(saved, label_names={"0": "a", "2": "c"})
    assert load_classifier(saved).classes == ("a", "1", "c")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": None}, "names no architecture that timm knows"),
        ({"architecture": "no_such_net"}, "names no architecture that timm knows"),
        ({"num_classes": 0}, "says 0 classes"),
        ({"num_classes": "three"}, "says three classes"),
        ({"label_names": ["a", "b"]}, "has 3 classes and other label_names"),
        ({"model_args": {"no_such": 1}}, "cannot be built"),
    ],
)
def test_damaged_or_foreign_config_is_refused(saved: Path, changes: dict[str, Any], words: str) -> None:
    change_config(saved, **changes)
    with pytest.raises(ModelError, match=words) as error:
        load_classifier(saved)
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


def other_weights(folder: Path) -> None:
    save_classifier(tiny(), folder.with_name("other"), {"epochs": 3})
    change_tensors(folder.with_name("other"), lambda tensors: tensors["fc.bias"].add_(1))
    shutil.copy(folder.with_name("other") / "model.safetensors", folder)


def pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


CHANGES: dict[str, Callable[[Path], object]] = {
    "config": lambda folder: replace_text(folder, '"epochs": 3', '"epochs": 4'),
    "no digest": lambda folder: replace_text(folder, '"digest"', '"id"'),
    "weights": other_weights,
    "pickle": pickled_weights,
}


def replace_text(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


@pytest.mark.parametrize("kind", CHANGES)
def test_classifier_that_changed_after_it_was_saved_is_refused(kind: str, saved: Path) -> None:
    CHANGES[kind](saved)
    with pytest.raises(ModelError, match="damaged or was changed|cannot be read: model.safetensors") as error:
        load_classifier(saved)
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("fc.weight"), r"1 tensors missing \(first fc.weight\)"),
        (lambda t: t["fc.weight"].fill_(float("nan")), r"NaN or infinite \(first fc.weight\)"),
        (lambda t: t.update({"fc.bias": torch.zeros(5)}), r"of another shape \(first fc.bias\)"),
        (lambda t: t.update(more=torch.zeros(5)), r"not known \(first more\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved: Path, change: Callable[[Any], object], words: str) -> None:
    change_tensors(saved, change)
    with pytest.raises(WeightsError, match=words) as error:
        load_classifier(saved)
    assert "\n" not in str(error.value)


def test_missing_parts_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_classifier(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot be read: model.safetensors: No such file"):
        load_classifier(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ModelError, match="damaged: config.json"):
        load_classifier(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ModelError, match="it has no config.json"):
        load_classifier(saved)


def test_only_an_earlier_classifier_is_replaced(saved: Path, tmp_path: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    save_classifier(new_classifier("test_resnet", ("a", "b"), pretrained=False), saved, {})
    assert load_classifier(saved).classes == ("a", "b")
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    other = tmp_path / "other"
    timm.models.save_for_hf(tiny().model, other, safe_serialization=True)  # a timm folder, but none of featdiff's
    save(tmp_path / "detector", {}, {"bank": torch.zeros(2)})
    for folder in (other, tmp_path / "detector"):
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        with pytest.raises(UsageError, match="is not a classifier that featdiff wrote"):
            save_classifier(tiny(), folder, {})
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# ---------------------------------------- cut in two


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("test_resnet", "layer3", (192, 10, 10)),
        ("test_efficientnet", "blocks.3", (48, 10, 10)),
        ("test_convnext", "stages.2", (48, 10, 10)),
        ("test_mambaout", "stages.2", (10, 10, 48)),
    ],
)
def test_trained_part_makes_the_logits_of_what_the_frozen_layers_give(
    name: str, layer: str, shape: tuple[int, ...]
) -> None:
    classifier = tiny(name)
    assert default_cut(classifier) == layer
    pixels = images(classifier)
    whole = logits_of(classifier.model, pixels)
    frozen, trained = split_at(classifier, layer)
    rows = frozen(pixels)
    assert (frozen.shape, frozen.width) == (shape, int(np.prod(shape)))
    assert (rows.shape, rows.dtype) == ((2, frozen.width), torch.float16)
    found = logits_of(trained, frozen.maps(rows))
    assert (found - whole).abs().max() < 0.01 * (whole[0] - whole[1]).abs().max()  # rows are rounded to 11 bits
    assert torch.equal(logits_of(classifier.model, pixels), whole)


def test_cut_before_the_stages_runs_nothing_behind_it() -> None:
    classifier = tiny()
    frozen, trained = split_at(classifier, "conv1.1")
    reached: list[str] = []
    for name, module in classifier.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: reached.append(name))
    frozen(images(classifier))
    assert reached[-1] == "conv1.1"
    assert not any(name.startswith(("conv1.2", "bn1", "layer", "fc")) for name in reached)


def test_every_parameter_is_frozen_or_trained() -> None:
    classifier = tiny()
    _, trained = split_at(classifier, "layer3")
    behind = ("layer4.", "fc.")
    for name, parameter in classifier.model.named_parameters():
        assert parameter.requires_grad == name.startswith(behind), name
    own = dict(classifier.model.named_parameters())
    assert {name for name, _ in trained.named_parameters()} == {name for name in own if name.startswith(behind)}
    assert all(parameter is own[name] for name, parameter in trained.named_parameters())
    _, trained = split_at(classifier, "layer4")  # another cut frees and freezes anew
    assert {name for name, p in classifier.model.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}


def test_training_the_trained_part_trains_the_classifier_and_keeps_the_key(tmp_path: Path) -> None:
    classifier = tiny()
    frozen, trained = split_at(classifier, "layer3")
    pixels = images(classifier, 8)
    key, before = frozen.key(), logits_of(classifier.model, pixels)
    state = {name: value.clone() for name, value in classifier.model.state_dict().items()}
    rows = frozen(pixels)
    trained.train()
    torch.nn.functional.cross_entropy(trained(frozen.maps(rows)), torch.arange(8) % 3).backward()
    with torch.no_grad():
        for parameter in trained.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    assert all(
        p.grad is None for name, p in classifier.model.named_parameters() if not name.startswith(("layer4", "fc"))
    )
    changed = {name for name, value in classifier.model.state_dict().items() if not torch.equal(value, state[name])}
    assert {"fc.weight", "layer4.0.bn2.weight", "layer4.0.bn1.running_mean"} <= changed
    assert all(name.startswith(("layer4.", "fc.")) for name in changed)
    after = logits_of(classifier.model, pixels)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(logits_of(trained, frozen.maps(rows)), after, atol=1e-2)
    assert torch.equal(frozen(pixels), rows)
    assert frozen.key() == key
    save_classifier(classifier, tmp_path, {})
    assert torch.equal(logits_of(load_classifier(tmp_path).model, pixels), after)


def test_key_tells_weights_layer_preprocessing_and_view_apart(seeded_backbone: Path) -> None:
    def keys(classifier: Classifier) -> list[str]:
        parts = [split_at(classifier, layer)[0] for layer in ("layer2", "layer3")]
        return [frozen.key(view) for frozen in parts for view in ("", "view 1")]

    other = tiny()
    other.data_config["crop_pct"] = 0.5
    weighted = new_classifier("test_resnet", CLASSES, weights=seeded_backbone)
    weighted.model.get_parameter("conv1.0.weight").data += 1
    found = [*keys(tiny()), *keys(other), *keys(weighted)]
    assert len(set(found)) == 12
    assert keys(tiny(seed=5)) == found[:4]  # the head is not among the frozen layers


def test_frozen_layers_run_in_eval_mode_and_give_every_module_its_own_mode_back() -> None:
    classifier = tiny()
    frozen, trained = split_at(classifier, "layer3")
    pixels = images(classifier)
    rows = frozen(pixels)
    classifier.model.train()
    trained.train()
    assert torch.equal(frozen(pixels), rows)
    assert all(module.training for module in classifier.model.modules())


@pytest.mark.parametrize("layer", ["blocks.2", "patch_embed"])
def test_vit_cannot_be_cut(layer: str) -> None:
    classifier = tiny("test_vit")
    with pytest.raises(UsageError, match=f"test_vit.* cannot be cut at '{layer}'.* train_from=''"):
        split_at(classifier, layer)
    assert all(parameter.requires_grad for parameter in classifier.model.parameters())


def test_network_that_cannot_be_cut_anywhere_is_named() -> None:
    with pytest.raises(UsageError, match=r"no stage of test_vit\S* can be cut off: .* train_from=''"):
        default_cut(tiny("test_vit"))


@pytest.mark.parametrize(
    ("layer", "words"),
    [("layer9", "no layer 'layer9'; did you mean layer"), ("", "no layer ''; its stages are act1, layer1")],
)
def test_unknown_layer_is_refused(layer: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        split_at(tiny(), layer)


def test_cut_within_a_residual_branch_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be cut at 'layer2.0.conv2'"):
        split_at(tiny(), "layer2.0.conv2")  # the trained part would lack what goes around it


def test_default_backbone_is_cut_before_its_last_stage() -> None:
    classifier = new_classifier("tf_efficientnet_lite0", CLASSES)
    assert classifier.name == "tf_efficientnet_lite0.in1k"
    assert default_cut(classifier) == "blocks.4"


def test_store_keeps_rows_of_views(few_images: Path, tmp_path: Path) -> None:
    classifier = tiny()
    frozen, _ = split_at(classifier, "layer3")
    refs = [FileRef(file.name, str(file)) for file in sorted(few_images.iterdir())]
    found = {}
    for number in (0, 1):
        view = View(number, frozen.transform)
        store = FeatureStore(tmp_path / frozen.key(view.name), frozen.width, np.float16)
        extraction = extract(iter_batches(iter_loaded(refs, view), 4), frozen, store)
        assert extraction.computed == len(refs)
        found[number] = store.table(extraction.digests)[np.arange(len(refs))]
    pixels = torch.stack([frozen.transform(Image.open(file).convert("RGB")) for file in sorted(few_images.iterdir())])
    assert torch.allclose(found[0], frozen(pixels), atol=1e-2)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


# ---------------------------------------- views


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def test_first_views_are_the_picture_and_its_mirror_image(picture: Image.Image) -> None:
    plain = pixels_of(picture)
    assert torch.equal(View(0, pixels_of)(picture), plain)
    assert torch.equal(View(1, pixels_of)(picture), plain.flip(2))
    assert not torch.equal(plain, plain.flip(2))
    assert [View(number, pixels_of).name for number in (0, 1, 7)] == ["", "view 1", "view 7"]


def test_further_views_follow_from_number_and_picture_alone(picture: Image.Image) -> None:
    state = np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()  # noqa: NPY002
    views = [View(number, pixels_of)(picture) for number in range(2, 8)]
    again = [View(number, pixels_of)(picture.copy()) for number in reversed(range(2, 8))]
    assert all(torch.equal(a, b) for a, b in zip(views, reversed(again), strict=True))
    assert len({view.numpy().tobytes() for view in views}) == 6
    assert (np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()) == state  # noqa: NPY002


def test_further_views_cut_out_what_they_say() -> None:
    """A ramp says how much of each side is seen, and whether it is mirrored."""
    columns, rows = np.meshgrid(np.arange(200), np.arange(200))
    ramp = np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)
    wide, high, mirrored = [], [], []
    for number in range(2, 102):
        found = View(number, pixels_of)(Image.fromarray(ramp)).float()
        across, down = found[0].mean(0), found[1].mean(1)
        wide.append(abs((across[-20] - across[20]) / 160).item())
        high.append(((down[-20] - down[20]) / 160).item())
        mirrored.append((across[-1] < across[0]).item())
    area, stretch = np.multiply(wide, high), np.divide(wide, high)
    assert 0.57 < area.min() < 0.65
    assert 0.95 < area.max() < 1.03
    assert 0.73 < stretch.min() < 0.9
    assert 1.1 < stretch.max() < 1.37
    assert 30 < sum(mirrored) < 70


def test_smallest_picture_has_views() -> None:
    image = Image.new("RGB", (1, 1), (1, 2, 3))
    assert View(2, pixels_of)(image).flatten().tolist() == [1, 2, 3]


def test_views_have_no_negative_numbers() -> None:
    with pytest.raises(UsageError, match="numbered from 0, not -1"):
        View(-1, pixels_of)
