"""Backbones by name: the embedded default, folders, the hub's cache, arguments, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from weights_files import CONFIG, KERNEL, MISFITS, State, Trap, head_of, one_line, write

from featdiff.exceptions import UsageError, WeightsError
from featdiff.features.backbones import TRANSFORM_KEYS, Backbone, list_backbones, load_backbone

EMBEDDED_SHA256 = "7a8f2e2ce2e7e5b8477cb4334e92c789dcd9464ebcaf64af2fa1e913db5600c2"


# ---------------------------------------- the embedded default


@pytest.fixture(scope="module")
def embedded() -> Backbone:
    return load_backbone()


def test_embedded_default(embedded: Backbone) -> None:
    assert (embedded.tag, embedded.source) == ("tf_efficientnet_lite0.in1k", "embedded")
    assert embedded.fingerprint == EMBEDDED_SHA256
    assert embedded.data_config["mean"] == embedded.data_config["std"] == (0.5, 0.5, 0.5)
    assert embedded.data_config["input_size"] == (3, 224, 224)
    assert not embedded.model.training
    assert not any(parameter.requires_grad for parameter in embedded.model.parameters())
    assert embedded.transform(Image.new("RGB", (300, 250), "white")).unique().tolist() == [1.0]


def test_embedded_default_by_its_full_name() -> None:
    backbone = load_backbone("tf_efficientnet_lite0.in1k")
    assert (backbone.tag, backbone.source, backbone.fingerprint) == (
        "tf_efficientnet_lite0.in1k",
        "embedded",
        EMBEDDED_SHA256,
    )


def test_embedded_weights_know_a_palace_and_a_daisy() -> None:
    """Every tensor of the package sits where timm wants it: the whole network classifies real photographs."""
    backbone = load_backbone(model_args={"num_classes": 1000}, view="crop")
    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    with torch.inference_mode():
        logits = backbone.model(torch.stack([backbone.transform(photograph) for photograph in photographs]))
    assert logits.argmax(1).tolist() == [698, 985]  # ImageNet's palace and daisy


def test_list_backbones_says_which_is_embedded() -> None:
    sources = dict(list_backbones("efficientnet_lite0"))
    assert sources["tf_efficientnet_lite0.in1k"] == "embedded"
    assert dict(list_backbones("test_res*")) == {"test_resnet.r160_in1k": "hub"}
    assert list_backbones("no such model") == []


# ---------------------------------------- folders


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[[State], Path]:
    """Writes a timm model folder (config.json, model.safetensors)."""

    def make(state: State, config: dict[str, Any] | str = CONFIG) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        write(state, folder / "model.safetensors")
        return folder

    return make


def test_local_folder(
    model_folder: Callable[[State], Path], state: State, seeded_sha256: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(state)
    backbone = load_backbone(f"local-dir:{folder}")
    assert (backbone.tag, backbone.source) == (f"local-dir:{folder}", "local folder")
    assert backbone.fingerprint == seeded_sha256
    assert tuple(backbone.data_config["mean"]) == (0.1, 0.2, 0.3)
    assert backbone.transform(Image.new("RGB", (200, 120))).shape == (3, 64, 128)
    monkeypatch.chdir(folder.parent)
    assert load_backbone("local-dir:model").fingerprint == seeded_sha256


def test_local_folder_with_a_classifier_of_another_size(
    model_folder: Callable[..., Path], state: State, seeded_sha256: str
) -> None:
    config = {**CONFIG, "num_classes": 7, "pretrained_cfg": {"num_classes": 7, "classifier": "fc"}}
    folder = model_folder(head_of(7, state), config)
    assert load_backbone(f"local-dir:{folder}").fingerprint == seeded_sha256


def test_weights_file_replaces_those_of_a_folder(
    model_folder: Callable[[State], Path], state: State, seeded_backbone: Path, seeded_sha256: str
) -> None:
    folder = model_folder({**state, KERNEL: state[KERNEL] + 1})
    assert load_backbone(f"local-dir:{folder}").fingerprint != seeded_sha256
    assert load_backbone(f"local-dir:{folder}", weights=seeded_backbone).fingerprint == seeded_sha256


@pytest.mark.parametrize("name", ["missing", "missing_buffers", "extra", "reshaped", "nan", "integers", "empty"])
def test_weights_of_a_folder_are_checked_as_strictly_as_a_file(
    name: str, model_folder: Callable[[State], Path], state: State
) -> None:
    """Otherwise tensors that are missing would stay random, and every score would be noise."""
    folder = model_folder(MISFITS[name][0](state))
    with pytest.raises(WeightsError) as error:
        load_backbone(f"local-dir:{folder}")
    one_line(error)


@pytest.mark.parametrize("config", ["{oops", "[]", "{}", '{"architecture": "no_such_net"}'])
def test_folder_with_a_bad_config(config: str, model_folder: Callable[..., Path], state: State) -> None:
    folder = model_folder(state, config)
    with pytest.raises((UsageError, WeightsError)) as error:
        load_backbone(f"local-dir:{folder}")
    text = one_line(error)
    assert str(folder) in text
    assert "does not take these model arguments" not in text  # none were given


def test_folder_without_weights_or_config(model_folder: Callable[[State], Path], state: State, tmp_path: Path) -> None:
    folder = model_folder(state)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="model"):
        load_backbone(f"local-dir:{folder}")
    (tmp_path / "empty").mkdir()
    with pytest.raises((UsageError, WeightsError), match=r"config\.json"):
        load_backbone(f"local-dir:{tmp_path / 'empty'}")
    with pytest.raises(UsageError, match="no folder at"):
        load_backbone(f"local-dir:{tmp_path / 'none'}")


def test_pickled_code_in_a_folder_is_not_executed(
    model_folder: Callable[[State], Path], state: State, tmp_path: Path
) -> None:
    folder = model_folder(state)
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": state, "args": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError) as error:
        load_backbone(f"local-dir:{folder}")
    one_line(error)
    assert not (tmp_path / "sprung").exists()


# ---------------------------------------- the hub's cache

_HUB_SCRIPT = """
import json, sys
from featdiff.features.backbones import load_backbone
answers = {}
for name in sys.argv[1:]:
    try:
        found = load_backbone(name)
        answers[name] = [found.tag, found.source, found.fingerprint]
    except Exception as error:
        answers[name] = [type(error).__name__, str(error)]
print(json.dumps(answers))
"""


def hub_entry(cache: Path, repository: str, state: State) -> None:
    """One downloaded repository, as the hub's client keeps it: refs, blobs, and snapshots of links."""
    root, revision = cache / f"models--{repository.replace('/', '--')}", "0" * 40
    for folder in (root / "refs", root / "blobs", root / "snapshots" / revision):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    (root / "blobs" / "a").write_text(json.dumps(CONFIG))
    write(state, root / "blobs" / "b.safetensors")
    for name, blob in (("config.json", "a"), ("model.safetensors", "b.safetensors")):
        (root / "snapshots" / revision / name).symlink_to(f"../../blobs/{blob}")


@pytest.fixture(scope="module", autouse=True)
def hub_process(seeded_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A process whose hub cache was filled by hand; started early, since it takes seconds."""
    home = tmp_path_factory.mktemp("hf")
    state = load_file(seeded_backbone)
    hub_entry(home / "hub", "timm/test_resnet.r160_in1k", state)
    hub_entry(home / "hub", "me/mine", state)
    for name in ("missing", "extra", "nan"):
        hub_entry(home / "hub", f"me/{name}", MISFITS[name][0](state))
    names = ["test_resnet", "test_resnet.r160_in1k", "hf-hub:me/mine", "test_vit", "hf-hub:me/none"]
    names += [f"hf-hub:me/{name}" for name in ("missing", "extra", "nan")]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    process = subprocess.Popen(
        [sys.executable, "-c", _HUB_SCRIPT, *names],
        env={**clean, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def hub_answers(hub_process: subprocess.Popen[str]) -> dict[str, list[str]]:
    return json.loads(hub_process.communicate(timeout=120)[0])


def test_names_and_trouble_need_no_hub(tmp_path: Path) -> None:
    """An offline miss names the resolved tag and the three ways out, in one line."""
    with pytest.raises(WeightsError) as error:
        load_backbone("resnet50")
    text = one_line(error)
    assert "resnet50.a1_in1k" in text
    assert "hub" in text and "weights=FILE" in text and "backbone=tf_efficientnet_lite0" in text
    with pytest.raises(WeightsError, match=r"resnet50\.tv_in1k"):
        load_backbone("resnet50.tv_in1k")


def test_untrained_architecture_is_not_blamed_on_the_hub() -> None:
    with pytest.raises((WeightsError, UsageError)) as error:
        load_backbone("test_coatnet")
    text = one_line(error)
    assert "no pretrained weights" in text.lower()
    assert "connect to the hub" not in text  # that would not help
    assert ".." not in text


# ---------------------------------------- names, arguments, transforms


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet51", ["'resnet51'", "did you mean", "resnet50"]),
        ("RESNET50", ["'RESNET50'", "did you mean", "resnet50"]),
        ("test_resnet ", ["did you mean", "test_resnet"]),
        ("tf_efficientnet_lite", ["did you mean", "tf_efficientnet_lite4"]),
        ("resnet50.a1_in1", ["resnet50", "'a1_in1'", "a1_in1k"]),
        ("resnet50.", ["resnet50"]),
        ("", ["unknown backbone"]),
        ("hf:timm/resnet50", ["'hf:timm/resnet50'", "hf-hub", "local-dir"]),
        ("local_dir:models", ["'local_dir:models'", "local-dir"]),
        ("https://example.org/model", ["https", "hf-hub"]),
        ("local-dir:", ["local-dir"]),
        ("hf-hub:", ["hf-hub"]),
    ],
)
def test_unknown_names(name: str, expected: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        load_backbone(name)
    text = one_line(error)
    assert all(part in text for part in expected)


def test_unknown_architecture_beats_a_good_weights_file(seeded_backbone: Path) -> None:
    with pytest.raises(UsageError, match="did you mean test_resnet"):
        load_backbone("test_resnt", weights=seeded_backbone)


def test_model_arguments_reach_the_network() -> None:
    """Padding changes what the network computes, though its weights stay the same."""
    backbones = []
    for kind in ("", "same"):
        torch.manual_seed(0)
        backbones.append(load_backbone("test_efficientnet", pretrained=False, model_args={"pad_type": kind}))
    assert backbones[0].fingerprint == backbones[1].fingerprint
    picture = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.inference_mode():
        plain, padded = (backbone.model(picture) for backbone in backbones)
    assert (plain - padded).abs().max() > 0.1 * plain.abs().max()


@pytest.mark.parametrize(
    ("args", "word"),
    [({"pad_typ": "same"}, "pad_typ"), ({"global_pool": "nope"}, "nope"), ({"pretrained": 1}, "pretr")],
)
def test_wrong_model_arguments(args: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError) as error:
        load_backbone("test_resnet", pretrained=False, model_args=args)
    assert word in one_line(error) and "test_resnet" in one_line(error)
    with pytest.raises(UsageError, match=word):  # the same when weights would be fetched
        load_backbone("test_resnet", model_args=args)


def test_transform_overrides_are_applied() -> None:
    overrides = {"input_size": [3, 64, 48], "mean": [0.0, 0.5, 1.0], "std": [1.0, 0.5, 0.25], "crop_pct": 1.0}
    backbone = load_backbone("test_resnet", pretrained=False, transform=overrides, view="crop")
    pixels = backbone.transform(Image.new("RGB", (100, 80), "white"))
    assert pixels.shape == (3, 64, 48)
    assert pixels.amin((1, 2)).tolist() == pixels.amax((1, 2)).tolist() == [1.0, 1.0, 0.0]
    assert backbone.data_config["interpolation"] == "bilinear"  # the model's own, where nothing was said
    assert {**backbone.data_config, "mean": (0.0, 0.5, 1.0)} == backbone.data_config


def test_crop_and_interpolation_overrides_change_pixels() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    plain = load_backbone("test_resnet", pretrained=False, view="crop").transform(picture)
    for change in ({"crop_pct": 0.5}, {"interpolation": "nearest"}, {"crop_mode": "squash"}):
        pixels = load_backbone("test_resnet", pretrained=False, transform=change, view="crop").transform(picture)
        assert pixels.shape == plain.shape and not torch.allclose(pixels, plain, atol=0.05)


@pytest.mark.parametrize(("key", "near"), [("input_sise", "input_size"), ("means", "mean"), ("is_training", None)])
def test_unknown_transform_settings(key: str, near: str | None) -> None:
    with pytest.raises(UsageError) as error:
        load_backbone("test_resnet", pretrained=False, transform={key: 1})
    text = one_line(error)
    assert repr(key) in text and all(known in text for known in TRANSFORM_KEYS)
    assert near is None or f"did you mean {near}" in text


@pytest.mark.parametrize(
    "override",
    [
        {"input_size": (64, 64)},
        {"input_size": "64"},
        {"input_size": (3, 0, 0)},
        {"input_size": (1, 64, 64)},
        {"mean": (0.5, 0.5)},
        {"std": (0.0, 0.0, 0.0)},
        {"interpolation": "bycubic"},
        {"crop_mode": "centre"},
        {"crop_pct": "all"},
        {"crop_pct": -1.0},
        {"crop_pct": 0},
    ],
    ids=str,
)
def test_wrong_transform_values_are_refused_at_once(override: dict[str, Any]) -> None:
    """Not image by image later on, where every picture would be called unreadable."""
    with pytest.raises(UsageError) as error:
        load_backbone("test_resnet", pretrained=False, transform=override, view="crop")
    assert next(iter(override)) in one_line(error)


# ---------------------------------------- random weights, fingerprint


def test_no_pretrained_gives_random_weights_and_says_so() -> None:
    """Always the same ones: else a detector fitted on them could never be loaded again."""
    first, second = (load_backbone("test_resnet", pretrained=False) for _ in range(2))
    assert first.source == second.source == "random"
    assert first.tag == "test_resnet.r160_in1k"
    assert first.fingerprint == second.fingerprint
    assert load_backbone(pretrained=False).fingerprint != EMBEDDED_SHA256


# Last in this file: by now the process is done.


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k", "hf-hub:me/mine"])
def test_cached_repository_loads_offline(name: str, hub_answers: dict[str, list[str]], seeded_sha256: str) -> None:
    tag = name if ":" in name else "test_resnet.r160_in1k"
    assert hub_answers[name] == [tag, "hub", seeded_sha256]


@pytest.mark.parametrize(("name", "tag"), [("test_vit", "test_vit.r160_in1k"), ("hf-hub:me/none", "hf-hub:me/none")])
def test_repository_that_is_not_cached(name: str, tag: str, hub_answers: dict[str, list[str]]) -> None:
    kind, text = hub_answers[name]
    assert kind == "WeightsError" and f"no weights for {tag}" in text and "weights=FILE" in text


@pytest.mark.parametrize("name", ["missing", "extra", "nan"])
def test_weights_from_the_hub_are_checked_as_strictly_as_a_file(name: str, hub_answers: dict[str, list[str]]) -> None:
    assert hub_answers[f"hf-hub:me/{name}"][0] == "WeightsError"
