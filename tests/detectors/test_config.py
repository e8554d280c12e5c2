"""Settings: what a constructor takes, a config file holds and ``config.json`` keeps, checked when they are made."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pydoc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from featdiff import Detector, PixelDetector
from featdiff.detectors.config import SETTINGS, FeatureSettings, PixelSettings, Settings
from featdiff.detectors.run_config import RUNTIME, Runtime
from featdiff.diffusion.training import Recipe
from featdiff.exceptions import UsageError
from featdiff.runtime.devices import resolve_device

DETECTORS: dict[type[Settings], type[Detector] | type[PixelDetector]] = {
    FeatureSettings: Detector,
    PixelSettings: PixelDetector,
}
BOTH = pytest.mark.parametrize("kind", DETECTORS)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


# ---- the same names and defaults everywhere ----


@BOTH
def test_constructor_takes_the_settings_with_their_defaults(kind: type[Settings]) -> None:
    parameters = dict(inspect.signature(DETECTORS[kind]).parameters)
    assert set(parameters) == {item.name for item in dataclasses.fields(kind)} == set(kind.names())
    detector = DETECTORS[kind]()
    for item in dataclasses.fields(kind):
        assert parameters[item.name].default == item.default, item.name
        if item.name == "recipe":  # whose default is filled in
            continue
        value = item.default
        if item.name == "calibration" and kind is PixelSettings:  # folds would train for hours
            value = 0.2
        assert getattr(detector.settings, item.name) == value, item.name


@BOTH
def test_runtime_is_a_part_of_the_settings(kind: type[Settings]) -> None:
    names = {item.name for item in dataclasses.fields(Runtime)}
    assert names == set(RUNTIME) == {"device", "engine", "image_batch", "workers", "max_pixels", "max_bytes", "cache"}
    assert names < set(kind.names())
    assert isinstance(kind(), Runtime)


def test_recipes_are_filled_in() -> None:
    assert FeatureSettings().recipe == Recipe()
    assert FeatureSettings(recipe={"epochs": 3}).recipe == Recipe(epochs=3)
    assert PixelSettings().recipe.min_steps == 2000
    assert PixelSettings(recipe={}).recipe == Recipe()


def test_modes_have_settings() -> None:
    assert {Detector.mode: FeatureSettings, PixelDetector.mode: PixelSettings} == SETTINGS


@BOTH
def test_signature_and_help_show_every_parameter(kind: type[Settings]) -> None:
    detector = DETECTORS[kind]
    text = pydoc.plain(pydoc.render_doc(detector))
    assert "self" not in inspect.signature(detector).parameters
    assert list(inspect.signature(detector.__init__).parameters)[0] == "self"
    for name in kind.names():
        assert f"{name}:" in text, name
    assert "*args" not in text.partition("Parameters")[0]


def test_backbone_is_the_one_positional_argument() -> None:
    assert Detector("test_resnet").settings.backbone == "test_resnet"
    assert FeatureSettings("test_resnet") == FeatureSettings(backbone="test_resnet")
    network = classifier()
    assert Detector(network).settings.backbone is network
    for make in (Detector, FeatureSettings):
        with pytest.raises(TypeError):
            make("test_resnet", "weights.safetensors")
    for other in (PixelDetector, PixelSettings):
        with pytest.raises(TypeError):
            other("test_resnet")


# ---- they do not change ----


@pytest.mark.parametrize("kind", [Runtime, *DETECTORS])
def test_settings_are_frozen(kind: type[Runtime]) -> None:
    settings = kind()
    for item in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, item.name, getattr(settings, item.name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.xyzzy = 1  # type: ignore[attr-defined]


def test_with_gives_others_and_checks_again() -> None:
    settings = FeatureSettings(seed=3)
    changed = settings.with_(fpr=0.2, blocks=1)
    assert (changed.fpr, changed.blocks, changed.seed) == (0.2, 1, 3)
    assert (settings.fpr, settings.blocks) == (0.05, 3)
    assert settings.with_() == settings
    with pytest.raises(UsageError, match="blocks must be a whole number above 0, not 0"):
        settings.with_(blocks=0)
    with pytest.raises(UsageError, match="whole numbers in 0 .. 9"):
        settings.with_(timesteps=10)  # start_times do not fit any more


def test_rate_of_a_detector_is_set_through_its_settings() -> None:
    detector = Detector(fpr=0.1)
    before = detector.settings
    detector.fpr = 0.2
    assert (detector.fpr, detector.settings.fpr, before.fpr) == (0.2, 0.2, 0.1)
    with pytest.raises(UsageError, match="between 0 and 1"):
        detector.fpr = 2
    assert detector.fpr == 0.2


# ---- what is refused ----

SHARED: list[tuple[dict[str, Any], str]] = [
    ({"recipe": 5}, "recipe must be a table"),
    ({"recipe": {"epoch": 1}}, "unknown recipe setting 'epoch'; did you mean epochs"),
    ({"calibration": 0.5}, "calibration is a share of the images between 0 and 0.5, not 0.5"),
    ({"validation": 0}, "validation is a share of the images"),
    ({"fpr": 1}, "fpr, the false-alarm rate, must lie between 0 and 1, not 1"),
    ({"fpr": None}, "fpr, the false-alarm rate"),
    ({"seed": -1}, "seed must be a whole number of 0 or more, not -1"),
    ({"seed": True}, "seed must be"),
    ({"seed": 2**63}, "seed must be"),
    ({"image_batch": 0}, "image_batch must be a whole number above 0, not 0"),
    ({"max_pixels": 1.5}, "max_pixels must be a whole number"),
    ({"max_bytes": 0}, "max_bytes must be a whole number"),
    ({"workers": 0}, "workers must be a whole number"),
    ({"cache": 5}, "cache must be a path, not 5"),
]
FEATURE: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, name) for name in ("hidden_max", "blocks", "timesteps", "draws", "bank_size", "stride")),
    ({"hidden_ratio": 0}, "hidden_ratio must be a number above 0"),
    ({"hidden_ratio": float("inf")}, "hidden_ratio must be a number above 0"),
    ({"backbone": 50}, "backbone must be a name or a module, not 50"),
    ({"joint": 1}, "joint must be true or false, not 1"),
    ({"pretrained": "no"}, "pretrained must be true or false"),
    ({"weights": 5}, "weights must be a path, not 5"),
    ({"start_times": []}, "start_times must be whole numbers in 0 .. 99"),
    ({"start_times": [100]}, "start_times must be whole numbers in 0 .. 99"),
    ({"neighbors": -1}, "neighbors must be a whole number, 0 or more"),
    ({"neighbors": 5, "bank_size": 4}, "a bank of 4 vectors has no 5 neighbours"),
    ({"coreset": "clusters"}, "unknown coreset 'clusters'; did you mean cluster"),
    ({"backend": "fais"}, "unknown backend 'fais'; did you mean faiss"),
    ({"head": "layrwise"}, "unknown head 'layrwise'; did you mean layerwise"),
    ({"head": "energy"}, "energy need logits: give a classifier"),
    ({"head": "neighbors", "neighbors": 0}, "unknown head 'neighbors'"),
    ({"extra_heads": ["neighbors"], "neighbors": 0}, "unknown score 'neighbors'"),
    ({"extra_heads": "energy"}, "extra_heads must be a list of different names, not 'energy'"),
    ({"extra_heads": ["pca", "pca"]}, "extra_heads must be a list of different names"),
    ({"extra_heads": [["pca"]]}, "extra_heads must be a list of different names"),
    ({"extra_heads": ["enrgy"]}, "unknown score 'enrgy'; did you mean energy"),
    ({"extra_heads": ["knn"]}, "unknown score 'knn'"),  # a baseline, which no fused score can join
    ({"extra_heads": ["vim", "energy"]}, "vim, energy need logits: give a classifier"),
    ({"extra_heads": ["pca"], "head": "mse"}, "extra_heads are joined by head='fused' only"),
    ({"input_size": 32}, "input_size must be three whole numbers (channels, height, width), not 32"),
    ({"input_size": (3, 32)}, "input_size must be three whole numbers"),
    ({"input_size": (3, 0, 32)}, "input_size must be three whole numbers"),
]
PIXEL: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, name) for name in ("width", "blocks", "timesteps", "mask_blocks", "mask_patch")),
    *(({name: 0}, name) for name in ("repetitions", "steps", "resamplings", "size", "channels")),
    *(({name: 5}, f"{name} must be text") for name in ("mask", "sampler", "aggregate", "trunk", "backbone")),
    ({"pretrained": True}, "pretrained must be text"),
    ({"weights": 5}, "weights must be a path"),
    ({"flip": "yes"}, "flip must be true or false"),
    ({"mixed_precision": "bf8"}, "unknown mixed_precision 'bf8'; did you mean bf16"),
    ({"multipliers": []}, "multipliers must name at least one level"),
    ({"multipliers": (1, 0)}, "multipliers must be whole numbers above 0"),
    ({"attention": 8}, "attention must be whole numbers above 0, not 8"),
    ({"dropout": 1}, "dropout is a share between 0 and 1"),
    ({"mask_ratio": "half"}, "mask_ratio must be a number"),
    ({"distances": []}, "distances must name at least one distance"),
    ({"distances": "mse"}, "distances must be a list of different names"),
    ({"distances": ["mse", "mse"]}, "distances must be a list of different names"),
    ({"distances": [5]}, "distances must be a list of different names"),
    ({"distances": ["lpip"]}, "unknown distance 'lpip'; did you mean lpips"),
]


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        *((Runtime, *case) for case in SHARED[-4:]),
        *((FeatureSettings, *case) for case in SHARED + FEATURE),
        *((PixelSettings, *case) for case in SHARED + PIXEL),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else getattr(value, "__name__", ""),
)
def test_what_makes_no_sense_is_refused_in_one_line(kind: type[Runtime], values: dict[str, Any], words: str) -> None:
    """The argument to blame is known, so that the command line can name its option."""
    with pytest.raises(UsageError) as caught:
        kind(**values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and "--" not in str(caught.value)
    assert caught.value.argument in values


def test_a_recipe_checks_itself() -> None:
    with pytest.raises(UsageError, match="epochs must be above 0"):
        FeatureSettings(recipe={"epochs": 0})


def test_logits_of_a_classifier_may_be_asked_for() -> None:
    network = classifier()
    assert FeatureSettings(network, extra_heads=["energy"]).needs_logits
    assert FeatureSettings(network, head="energy").needs_logits
    assert not FeatureSettings(network, extra_heads=["pca"]).needs_logits
    assert not FeatureSettings(network).needs_logits


def test_device_is_looked_for_where_it_is_used(tmp_path: Path) -> None:
    assert Runtime().place == resolve_device("auto")
    assert Runtime(device="cpu").place == torch.device("cpu")
    with pytest.raises(UsageError, match="no device 'abacus'") as caught:
        _ = Runtime(device="abacus").place
    assert caught.value.argument == "device"
    assert Runtime(cache=tmp_path).cache_folder == tmp_path
    assert Runtime(cache=str(tmp_path)).cache_folder == tmp_path


@BOTH
def test_unknown_names_get_a_hint(kind: type[Settings]) -> None:
    detector = DETECTORS[kind]
    with pytest.raises(UsageError, match="^unknown argument 'calibratio'; did you mean calibration") as caught:
        detector(calibratio=0.1)
    assert caught.value.argument == "calibratio"
    with pytest.raises(UsageError, match="^unknown argument 'xyzzy'$"):
        detector(xyzzy=1)
    with pytest.raises(UsageError, match="^unknown argument 'calibratio'; did you mean calibration"):
        kind.of({"calibratio": 0.1})
    with pytest.raises(UsageError, match="^run.toml: unknown argument 'xyzzy'$"):
        kind.of({"xyzzy": 1}, where="run.toml")
    assert kind.of({"seed": 4}) == kind(seed=4)


# ---- what is saved ----


@BOTH
def test_saved_settings_are_plain_and_hold_nothing_of_the_run(kind: type[Settings], tmp_path: Path) -> None:
    settings = kind(seed=5, weights=tmp_path / "w.safetensors", cache=tmp_path, workers=3, recipe={"epochs": 7})
    saved = settings.saved()
    assert set(saved) == set(kind.names()) - set(RUNTIME)
    assert saved["recipe"] == dataclasses.asdict(Recipe(epochs=7))
    assert saved["weights"] == str(tmp_path / "w.safetensors")
    assert saved["seed"] == 5

    read = json.loads(json.dumps(saved))
    again = kind.of(read)
    assert again.recipe == settings.recipe
    assert json.dumps(again.saved()) == json.dumps(saved)


def test_saved_path_of_weights_does_not_depend_on_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert FeatureSettings(weights="w.safetensors").saved()["weights"] == str(tmp_path / "w.safetensors")


def test_detector_from_settings_has_these_settings() -> None:
    settings = FeatureSettings("test_resnet", seed=9, extra_heads=["pca"])
    assert Detector.from_settings(settings).settings == settings
