"""``featdiff export``: options and refusals. What it writes and says by default is in ``tests/test_exporting.py``."""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from click.testing import Result
from google.protobuf import text_format
from helpers import fails
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

Cli = Callable[..., Result]


def test_one_format_into_a_folder_of_choice_and_a_file_that_disagrees(
    featdiff_cli: Cli, tiny_model: Path, few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is as near to torch as this limit asks for."""
    monkeypatch.setattr("featdiff.export.verify.LIMIT", -1.0)
    options = ["--format", "pt2", "-o", tmp_path / "deep" / "out", "--verify", few_images, "-q"]
    result = featdiff_cli("export", "-m", tiny_model, *options)
    (file,) = (tmp_path / "deep" / "out").iterdir()
    assert file.name == "model.pt2" and zipfile.is_zipfile(file)
    fails(result, 1, f"{file} disagrees with torch, do not use it: of 6 images", "0 verdicts and 0 p-values are wrong")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "onxx"], ["unknown format 'onxx'", "did you mean onnx?"]),
        (["--format", ","], ["name at least one format"]),
        (["--verify", "nowhere"], ["nowhere"]),
    ],
)
def test_options_that_make_no_sense(
    featdiff_cli: Cli, tiny_model: Path, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    fails(featdiff_cli("export", "-m", tiny_model, "-o", tmp_path / "out", "-q", *options), 2, *words)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way(featdiff_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = featdiff_cli("export", "-m", tiny_model, "-o", tmp_path / "file", "-q")
    fails(result, 1, f"{tmp_path / 'file'} cannot be written: File exists")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_packages_that_are_missing(
    featdiff_cli: Cli,
    tiny_model: Path,
    few_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    options = ["-o", tmp_path / "out", "--verify", few_images, "-q"]
    result = featdiff_cli("export", "-m", tiny_model, *options)
    fails(result, 2, f"{package} is not installed", "pip install 'featdiff[onnx]'", "choose the format pt2")
    assert not (tmp_path / "out").exists()


def test_no_model_and_a_backbone_of_other_weights(featdiff_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    fails(featdiff_cli("export", "-m", tmp_path / "none"), 1, "no featdiff model at")
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), tmp_path / "other.safetensors")
    model = shutil.copytree(tiny_model, tmp_path / "model")
    result = featdiff_cli("export", "-m", model, "--weights", tmp_path / "other.safetensors", "-q")
    fails(result, 1, "has other weights than this detector was fitted with")


def test_a_repository_for_triton(featdiff_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """Its config is one by Triton's own description of it, and says what the file takes and gives."""
    repository = tmp_path / "models"
    options = ["--format", "onnx", "-o", tmp_path / "out", "--triton", repository]
    result = featdiff_cli("export", "-m", tiny_model, *options)
    assert result.exit_code == 0, result.stderr
    place = repository / tiny_model.name
    assert f"{place} (for Triton)" in result.stderr
    assert (place / "1" / "model.onnx").read_bytes() == (tmp_path / "out" / "model.onnx").read_bytes()

    config = text_format.Parse((place / "config.pbtxt").read_text(), ModelConfig())
    assert (config.name, config.platform, config.max_batch_size) == (tiny_model.name, "onnxruntime_onnx", 32)
    assert config.HasField("dynamic_batching")
    session = onnxruntime.InferenceSession(place / "1" / "model.onnx")
    for given, tensors in ((session.get_inputs(), config.input), (session.get_outputs(), config.output)):
        assert [tensor.name for tensor in tensors] == [each.name for each in given]
        for tensor, each in zip(tensors, given, strict=True):
            assert DataType.Name(tensor.data_type) == "TYPE_FP32" and each.type == "tensor(float)"
            sides = [side if isinstance(side, int) else -1 for side in each.shape[1:]]
            assert list(tensor.dims) == (sides or [1])
            assert tensor.HasField("reshape") == (not sides)
    assert list(config.input[0].dims)[0] == 3

    refused = featdiff_cli("export", "-m", tiny_model, "--format", "pt2", "--triton", repository, "-q")
    fails(refused, 2, "--triton needs an ONNX file")
