"""Weights files: which ones load, which ones are refused, and that code in them is never run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from weights_files import KERNEL, MISFITS, State, Trap, floats, head_of, one_line, without, write

from featdiff.exceptions import WeightsError
from featdiff.features.backbones import load_backbone
from featdiff.features.networks import fingerprint

# ---------------------------------------- weights files that load


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


@pytest.mark.parametrize("name", GOOD_FILES)
def test_weights_file(name: str, tmp_path: Path, state: State, seeded_sha256: str) -> None:
    file = write(GOOD_FILES[name](state), tmp_path / name)
    backbone = load_backbone("test_resnet", weights=file)
    assert (backbone.tag, backbone.source) == ("test_resnet.r160_in1k", f"file {name}")
    loaded = backbone.model.state_dict()
    assert loaded.keys() == without(state, "fc.").keys()
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)
    assert backbone.fingerprint == seeded_sha256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_file_is_cast_to_float32(dtype: torch.dtype, tmp_path: Path, state: State) -> None:
    file = write(floats(state, dtype), tmp_path / "half.safetensors")
    loaded = load_backbone("test_resnet", weights=file).model.state_dict()
    assert loaded[KERNEL].dtype == torch.float32
    assert torch.equal(loaded[KERNEL], state[KERNEL].to(dtype).float())


def test_file_with_every_tensor_in_half_precision(tmp_path: Path, state: State) -> None:
    """The counters of batch norm too, as a plain loop over the state dict leaves them."""
    file = write({key: value.half() for key, value in state.items()}, tmp_path / "half.safetensors")
    loaded = load_backbone("test_resnet", weights=file).model.state_dict()
    assert torch.equal(loaded[KERNEL], state[KERNEL].half().float())
    assert loaded["bn1.num_batches_tracked"].dtype == torch.int64


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
