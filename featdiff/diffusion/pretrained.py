"""Unconditional diffusers pipelines -> a U-Net and its schedule, strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..exceptions import WeightsError, first_line
from ..files.hub import find_folder

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

# Schedules of the same kind of noise; what they say of themselves fits a DDPMScheduler.
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")


def load_pipeline(name: str) -> tuple[UNet2DModel, DDPMScheduler]:
    """The U-Net and schedule of a pipeline folder, or of one on the hub (``google/ddpm-cifar10-32``).

    Raises
    ------
    WeightsError
        It cannot be had, is not an unconditional pixel pipeline, or its weights are not whole.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    files = ["*.json", "*.safetensors", "*.bin"]
    folder = find_folder(name, files, lambda why: WeightsError(f"no pipeline at {name}: {why}"))
    unet = folder / "unet" if (folder / "unet").is_dir() else folder  # older pipelines keep all files side by side
    schedule = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    kind = _read(unet / "config.json", name).get("_class_name")
    if kind != "UNet2DModel":
        raise WeightsError(f"{name} holds a {kind}: an unconditional pixel model (UNet2DModel) is needed")
    settings = _read(schedule / "scheduler_config.json", name)
    if settings.get("_class_name") not in _SCHEDULERS:
        known = ", ".join(_SCHEDULERS)
        raise WeightsError(f"{name} was trained with a {settings.get('_class_name')}; known schedules: {known}")
    # diffusers fills missing weights with whatever is in memory, and only logs it
    try:
        model, report = UNet2DModel.from_pretrained(
            unet, output_loading_info=True, low_cpu_mem_usage=False, local_files_only=True
        )
    except Exception as error:  # no file, a damaged one, weights of other shapes: each its own error
        raise WeightsError(f"the weights in {unet} cannot be read: {first_line(error)}") from None
    for what, names in report.items():
        if names:
            raise WeightsError(
                f"the weights in {unet} do not fit its config.json: {what.replace('_', ' ')}: {names[0]}"
            )
    if problem := _unfit(model.config):
        raise WeightsError(f"{name} cannot be used here: its U-Net {problem}")
    for weight, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"the weights in {unet} are damaged: {weight} holds NaN or infinite values")
    try:
        return model, DDPMScheduler.from_config({k: v for k, v in settings.items() if not k.startswith("_")})
    except (NotImplementedError, TypeError, ValueError) as error:
        raise WeightsError(f"the schedule of {name} cannot be built: {first_line(error)}") from None


def _unfit(config: Any) -> str:
    """What keeps a U-Net from inpainting square images by their noise alone; empty if nothing does."""
    if not isinstance(config.sample_size, int):
        return f"takes images of {config.sample_size} pixels, not of one square size"
    if config.out_channels != config.in_channels:
        return f"gives {config.out_channels} channels for {config.in_channels} (a learned variance?)"
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        return "wants to be told a class"
    return ""


def _read(file: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise WeightsError(f"{name} is not a diffusers pipeline: no {file.name} that can be read in {file.parent}")
    return content
