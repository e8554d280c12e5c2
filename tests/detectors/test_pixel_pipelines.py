"""Pretrained pipelines of diffusers in place of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from small_pixels import PIXEL

from featdiff import PixelDetector, load_detector
from featdiff.diffusion.unet import make_unet
from featdiff.exceptions import UsageError, WeightsError


def pipeline(folder: Path, size: int = 16, channels: int = 3, **scheduler: Any) -> Path:
    """A pipeline folder as diffusers writes it."""
    unet = make_unet(size, channels, width=8, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100, **scheduler)).save_pretrained(folder)
    return folder


# ---- pretrained pipelines ----


def test_a_pipeline_stands_in_for_training(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "pipeline")
    unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    detector = PixelDetector(**{k: v for k, v in PIXEL.items() if k != "size"}, pretrained=str(folder))
    detector.fit(folders["train"])
    assert detector.training_seconds_ == 0 and not hasattr(detector, "training_log_")
    assert detector.extractor_.size == 16
    assert detector.heads_.scheduler.config.num_train_timesteps == 100
    for name, value in unet.state_dict().items():
        assert torch.equal(detector.heads_.denoiser.unet.state_dict()[name], value)
    detector.save_pretrained(tmp_path / "model")
    expected = detector.score(folders["digits"]).ood_score
    shutil.rmtree(folder)  # a model holds all that it needs
    assert np.array_equal(load_detector(tmp_path / "model").score(folders["digits"]).ood_score, expected)


def test_files_side_by_side_are_an_older_pipeline(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "pipeline")
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            shutil.move(file, folder)
        (folder / part).rmdir()
    assert PixelDetector(pretrained=str(folder), distances=["mse"]).prepare().extractor_.size == 16


def damaged_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("conv_in.weight")
    save_file(state, file)


def nan_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.bias"][0] = float("nan")
    save_file(state, file)


def other_config(folder: Path) -> None:
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"block_out_channels": [16, 32]}))


def other_network(folder: Path) -> None:
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "UNet2DConditionModel"}))


def other_schedule(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "ScoreSdeVeScheduler"}))


def learned_variance(folder: Path) -> None:
    unet = make_unet(16, 3, width=8, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0)
    UNet2DModel.from_config(unet.config, out_channels=6).save_pretrained(folder / "unet")


def with_classes(folder: Path) -> None:
    unet = make_unet(16, 3, width=8, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0)
    UNet2DModel.from_config(unet.config, num_class_embeds=4).save_pretrained(folder / "unet")


def no_size(folder: Path) -> None:
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": None}))


def odd_schedule(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_schedule": "wavy"}))


def no_weights(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged_weights, "missing keys: conv_in.weight"),
        (nan_weights, "conv_in.bias holds NaN"),
        (other_config, "cannot be read"),
        (other_network, "UNet2DConditionModel"),
        (other_schedule, "ScoreSdeVeScheduler"),
        (no_weights, "cannot be read"),
        (learned_variance, "gives 6 channels for 3"),
        (with_classes, "is class-conditional"),
        (no_size, "None pixels"),
        (odd_schedule, "wavy"),
    ],
)
def test_pipelines_that_are_not_whole_are_refused(tmp_path: Path, damage: Any, words: str) -> None:
    folder = pipeline(tmp_path / "pipeline")
    damage(folder)
    with pytest.raises(WeightsError) as error:
        PixelDetector(pretrained=str(folder), distances=["mse"]).prepare()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "org/nowhere", "./nowhere/else"])
def test_pipelines_that_cannot_be_had_are_named(name: str) -> None:
    with pytest.raises(WeightsError) as error:
        PixelDetector(pretrained=name, distances=["mse"]).prepare()
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"), [({"size": 32}, "size 16, not 32"), ({"channels": 1}, "channels 3, not 1")]
)
def test_a_pipeline_of_another_size_is_refused(tmp_path: Path, arguments: dict[str, int], words: str) -> None:
    folder = pipeline(tmp_path / "pipeline")
    with pytest.raises(UsageError) as error:
        PixelDetector(pretrained=str(folder), distances=["mse"], **arguments).prepare()
    assert words in str(error.value)
