"""Backbones by name: the embedded default, weights files, folders, the hub's cache, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from torch import Tensor

from featdiff.exceptions import UsageError, WeightsError
from featdiff.features.backbones import TRANSFORM_KEYS, Backbone, list_backbones, load_backbone
from featdiff.features.networks import fingerprint

State = dict[str, Tensor]
EMBEDDED_SHA256 = "7a8f2e2ce2e7e5b8477cb4334e92c789dcd9464ebcaf64af2fa1e913db5600c2"
KERNEL = "layer1.0.conv1.weight"  # some tensor in the middle of test_resnet
CONFIG = {
    "architecture": "test_resnet",
    "num_classes": 1000,
    "pretrained_cfg": {
        "num_classes": 1000,
        "classifier": "fc",
        "input_size": [3, 96, 96],
        "mean": [0.1, 0.2, 0.3],
    },
}


@pytest.fixture
def state(seeded_backbone: Path) -> State:
    """The tensors of the seeded weights file, with its classifier ``fc`` of 1000 classes."""
    return load_file(seeded_backbone)


@pytest.fixture(scope="module")
def seeded_sha256(seeded_backbone: Path) -> str:
    return load_backbone("test_resnet", weights=seeded_backbone).fingerprint


def without(state: State, *prefixes: str) -> State:
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def floats(state: State, dtype: torch.dtype) -> State:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


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
    found = load_backbone("tf_efficientnet_lite0.in1k")
    assert (found.tag, found.source, found.fingerprint) == (
        "tf_efficientnet_lite0.in1k",
        "embedded",
        EMBEDDED_SHA256,
    )


def test_embedded_weights_know_a_palace_and_a_daisy() -> None:
    """Every tensor of the package sits where timm wants it: the whole network classifies real photographs."""
    found = load_backbone(model_args={"num_classes": 1000})
    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    with torch.inference_mode():
        logits = found.model(torch.stack([found.transform(photograph) for photograph in photographs]))
    assert logits.argmax(1).tolist() == [698, 985]  # ImageNet's palace and daisy


def test_list_backbones_says_which_is_embedded() -> None:
    found = dict(list_backbones("efficientnet_lite0"))
    assert found["tf_efficientnet_lite0.in1k"] == "embedded"
    assert dict(list_backbones("test_res*")) == {"test_resnet.r160_in1k": "hub"}
    assert list_backbones("no such model") == []


# ---------------------------------------- weights files that load


def head_of(classes: int, state: State) -> State:
    width = state["fc.weight"].shape[1]
    return {**without(state, "fc."), "fc.weight": torch.ones(classes, width), "fc.bias": torch.ones(classes)}


GOOD_FILES: dict[str, Callable[[State], Any]] = {
    "as_is.safetensors": lambda state: state,
    "as_is.pth": lambda state: state,
    "checkpoint.pth": lambda state: {"state_dict": state, "epoch": 3, "arch": "test_resnet"},
    "with_optimizer.pth.tar": lambda state: {"state_dict": state, "optimizer": {"lr": 0.1, "steps": [1, 2]}},
    "model_key.pth": lambda state: {"model": state},
    "data_parallel.pth": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "double.safetensors": lambda state: floats(state, torch.float64),
    "other_classes.safetensors": lambda state: head_of(7, state),
    "no_classifier.safetensors": lambda state: without(state, "fc."),
}


def write(content: Any, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in content.items()}, file)
    else:
        torch.save(content, file)
    return file


@pytest.mark.parametrize("name", GOOD_FILES)
def test_weights_file(name: str, tmp_path: Path, state: State, seeded_sha256: str) -> None:
    file = write(GOOD_FILES[name](state), tmp_path / name)
    found = load_backbone("test_resnet", weights=file)
    assert (found.tag, found.source) == ("test_resnet.r160_in1k", f"file {name}")
    own = found.model.state_dict()
    assert own.keys() == without(state, "fc.").keys()
    assert all(torch.equal(own[key], state[key]) for key in own)
    assert found.fingerprint == seeded_sha256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_file_is_cast_to_float32(dtype: torch.dtype, tmp_path: Path, state: State) -> None:
    file = write(floats(state, dtype), tmp_path / "half.safetensors")
    own = load_backbone("test_resnet", weights=file).model.state_dict()
    assert own[KERNEL].dtype == torch.float32
    assert torch.equal(own[KERNEL], state[KERNEL].to(dtype).float())


def test_file_with_every_tensor_in_half_precision(tmp_path: Path, state: State) -> None:
    """The counters of batch norm too, as a plain loop over the state dict leaves them."""
    file = write({key: value.half() for key, value in state.items()}, tmp_path / "half.safetensors")
    own = load_backbone("test_resnet", weights=file).model.state_dict()
    assert torch.equal(own[KERNEL], state[KERNEL].half().float())
    assert own["bn1.num_batches_tracked"].dtype == torch.int64


def test_weights_may_be_given_as_text_or_path(seeded_backbone: Path, seeded_sha256: str) -> None:
    assert load_backbone("test_resnet", weights=str(seeded_backbone)).fingerprint == seeded_sha256


def test_author_naming_is_brought_to_timm_naming(tmp_path: Path) -> None:
    """A ConvNeXt file in its authors' names (dwconv, pwconv1 ...) loads through timm's filter."""
    torch.manual_seed(0)
    model = timm.create_model("test_convnext", pretrained=False, num_classes=0)
    theirs = {}
    for key, value in model.state_dict().items():
        if key.startswith("stem."):
            name = f"downsample_layers.0.{key.removeprefix('stem.')}"
        elif ".downsample." in key:
            _, stage, _, rest = key.split(".", 3)
            name = f"downsample_layers.{stage}.{rest}"
        else:
            name = key.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
            name = name.replace("head.norm.", "norm.")
        theirs[name] = value.clone()
    assert theirs.keys() != model.state_dict().keys()
    file = write(theirs, tmp_path / "convnext.safetensors")
    assert load_backbone("test_convnext", weights=file).fingerprint == fingerprint(model)


# ---------------------------------------- weights files that are refused


def without_means(state: State) -> State:
    return {key: value for key, value in state.items() if "running_mean" not in key}


MISFITS: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (lambda s: without(s, KERNEL), f"1 tensors missing (first {KERNEL})"),
    "missing_buffers": (
        lambda s: {k: v for k, v in s.items() if "running_mean" not in k},
        "15 tensors missing",
    ),
    "extra": (lambda s: {**s, "neck.weight": torch.ones(3)}, "1 tensors not known (first neck.weight)"),
    "reshaped": (
        lambda s: {**s, KERNEL: s[KERNEL].flatten()},
        f"1 tensors of another shape (first {KERNEL})",
    ),
    "nan": (lambda s: {**s, KERNEL: s[KERNEL] * float("nan")}, f"1 tensors NaN or infinite (first {KERNEL})"),
    "infinite": (
        lambda s: {**s, "bn1.bias": s["bn1.bias"] + float("inf")},
        "NaN or infinite (first bn1.bias)",
    ),
    "overflow": (lambda s: {**s, KERNEL: s[KERNEL].double() * 1e300}, f"NaN or infinite (first {KERNEL})"),
    "integers": (lambda s: {**s, KERNEL: s[KERNEL].to(torch.int32)}, KERNEL),
    "complex": (lambda s: {**s, KERNEL: s[KERNEL].to(torch.complex64)}, KERNEL),
    "empty": (lambda s: {}, "90 tensors missing"),
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_weights_that_do_not_fit_are_refused(name: str, tmp_path: Path, state: State) -> None:
    change, expected = MISFITS[name]
    file = write(change(state), tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError) as error:
        load_backbone("test_resnet", weights=file)
    text = one_line(error)
    assert expected in text and str(file) in text and "test_resnet" in text


def test_weights_of_another_model_are_refused(seeded_backbone: Path) -> None:
    with pytest.raises(WeightsError) as error:
        load_backbone("test_convnext", weights=seeded_backbone)
    assert "does not fit test_convnext" in one_line(error)
    with pytest.raises(WeightsError, match="does not fit tf_efficientnet_lite0"):
        load_backbone(weights=seeded_backbone)


def test_missing_weights_file(tmp_path: Path) -> None:
    for file in (tmp_path / "none.pth", tmp_path):  # a folder is no file either
        with pytest.raises(WeightsError) as error:
            load_backbone("test_resnet", weights=file)
        assert one_line(error) == f"no weights file at {file}"


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", ["text", "zero bytes", "picture", "truncated", "other format"])
def test_files_that_hold_no_weights_are_refused(kind: str, suffix: str, tmp_path: Path, state: State) -> None:
    file = write(state, tmp_path / f"weights{suffix}")
    if kind == "text":
        file.write_text("this is not a model\n" * 20)
    elif kind == "picture":
        Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
        file.write_bytes((tmp_path / "picture.png").read_bytes())
    elif kind == "other format":
        np.savez(tmp_path / "arrays.npz", weight=np.ones(3))
        file.write_bytes((tmp_path / "arrays.npz").read_bytes())
    else:
        file.write_bytes(b"" if kind == "zero bytes" else cut(file.read_bytes()))
    with pytest.raises(WeightsError) as error:
        load_backbone("test_resnet", weights=file)
    assert f"{file} is not a weights file" in one_line(error)


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": 1}, torch.ones(3), None, {"state_dict": [1]}, {1: torch.ones(3)}], ids=repr
)
def test_checkpoints_without_a_state_dict_are_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        load_backbone("test_resnet", weights=write(content, tmp_path / "weights.pth"))
    assert "is not a weights file" in one_line(error)
    assert "object has no attribute" not in one_line(error)  # a user cannot act on that


class Trap:
    """Unpickling this would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["plain pickle", "torch archive", "named safetensors"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_is_not_executed(kind: str, tmp_path: Path, state: State) -> None:
    sprung = tmp_path / "sprung"
    file = tmp_path / ("trap.safetensors" if kind == "named safetensors" else "trap.pth")
    with file.open("wb") as stream:
        if kind == "torch archive":
            torch.save({"state_dict": state, "args": Trap(sprung)}, stream)
        else:
            pickle.dump({"state_dict": state, "args": Trap(sprung)}, stream)
    with pytest.raises(WeightsError) as error:
        load_backbone("test_resnet", weights=file)
    assert not sprung.exists()
    text = one_line(error)
    assert "is not a weights file that can be read safely" in text
    assert "weights_only=False" not in text  # advice that would run the code
    with file.open("rb") as stream:  # the trap is a live one
        if kind == "torch archive":
            torch.load(stream, weights_only=False)
        else:
            pickle.load(stream)
    assert sprung.exists()


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
    found = load_backbone(f"local-dir:{folder}")
    assert (found.tag, found.source) == (f"local-dir:{folder}", "local folder")
    assert found.fingerprint == seeded_sha256
    assert tuple(found.data_config["mean"]) == (0.1, 0.2, 0.3)
    assert found.transform(Image.new("RGB", (200, 120))).shape == (3, 96, 96)
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
    assert "hub" in text and "weights=..." in text and "backbone=tf_efficientnet_lite0" in text
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
    found = []
    for kind in ("", "same"):
        torch.manual_seed(0)
        found.append(load_backbone("test_efficientnet", pretrained=False, model_args={"pad_type": kind}))
    assert found[0].fingerprint == found[1].fingerprint
    picture = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.inference_mode():
        plain, padded = (backbone.model(picture) for backbone in found)
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
    found = load_backbone("test_resnet", pretrained=False, transform=overrides)
    pixels = found.transform(Image.new("RGB", (100, 80), "white"))
    assert pixels.shape == (3, 64, 48)
    assert pixels.amin((1, 2)).tolist() == pixels.amax((1, 2)).tolist() == [1.0, 1.0, 0.0]
    assert found.data_config["interpolation"] == "bilinear"  # the model's own, where nothing was said
    assert {**found.data_config, "mean": (0.0, 0.5, 1.0)} == found.data_config


def test_crop_and_interpolation_overrides_change_pixels() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    plain = load_backbone("test_resnet", pretrained=False).transform(picture)
    for change in ({"crop_pct": 0.5}, {"interpolation": "nearest"}, {"crop_mode": "squash"}):
        pixels = load_backbone("test_resnet", pretrained=False, transform=change).transform(picture)
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
        load_backbone("test_resnet", pretrained=False, transform=override)
    assert next(iter(override)) in one_line(error)


# ---------------------------------------- random weights, fingerprint


def test_no_pretrained_gives_random_weights_and_says_so() -> None:
    """Always the same ones: else a detector fitted on them could never be loaded again."""
    first, second = (load_backbone("test_resnet", pretrained=False) for _ in range(2))
    assert first.source == second.source == "random"
    assert first.tag == "test_resnet.r160_in1k"
    assert first.fingerprint == second.fingerprint
    assert load_backbone(pretrained=False).fingerprint != EMBEDDED_SHA256


def test_fingerprint_follows_every_weight(seeded_backbone: Path, seeded_sha256: str) -> None:
    model = load_backbone("test_resnet", weights=seeded_backbone).model
    assert fingerprint(model) == seeded_sha256
    for name in (KERNEL, "bn1.running_var", "layer4.0.bn2.num_batches_tracked"):
        tensor = dict(model.state_dict())[name].view(-1)
        before = tensor[-1].clone()
        tensor[-1] = torch.nextafter(before, before + 1) if before.is_floating_point() else before + 1
        assert fingerprint(model) != seeded_sha256, name
        tensor[-1] = before
    assert fingerprint(model) == seeded_sha256


def test_fingerprint_tells_names_shapes_and_types_apart() -> None:
    def holder(name: str, value: Tensor) -> torch.nn.Module:
        module = torch.nn.Module()
        module.register_buffer(name, value)
        return module

    values = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(2, dtype=torch.float64),
    ]
    prints = {fingerprint(holder("a", value)) for value in values} | {fingerprint(holder("b", values[0]))}
    assert len(prints) == 5
    columns = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(holder("a", columns.T.contiguous().T)) == fingerprint(holder("a", columns))  # memory order


# Last in this file: by now the process is done.


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k", "hf-hub:me/mine"])
def test_cached_repository_loads_offline(name: str, hub_answers: dict[str, list[str]], seeded_sha256: str) -> None:
    tag = name if ":" in name else "test_resnet.r160_in1k"
    assert hub_answers[name] == [tag, "hub", seeded_sha256]


@pytest.mark.parametrize(("name", "tag"), [("test_vit", "test_vit.r160_in1k"), ("hf-hub:me/none", "hf-hub:me/none")])
def test_repository_that_is_not_cached(name: str, tag: str, hub_answers: dict[str, list[str]]) -> None:
    kind, text = hub_answers[name]
    assert kind == "WeightsError" and f"no weights for {tag}" in text and "weights=..." in text


@pytest.mark.parametrize("name", ["missing", "extra", "nan"])
def test_weights_from_the_hub_are_checked_as_strictly_as_a_file(name: str, hub_answers: dict[str, list[str]]) -> None:
    assert hub_answers[f"hf-hub:me/{name}"][0] == "WeightsError"


def test_fingerprint_does_not_depend_on_the_memory_layout(seeded_sha256: str, seeded_backbone: Path) -> None:
    model = load_backbone("test_resnet", weights=seeded_backbone).model
    assert fingerprint(model.to(memory_format=torch.channels_last)) == seeded_sha256  # type: ignore[call-overload]
