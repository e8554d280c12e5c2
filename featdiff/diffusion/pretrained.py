"""Unconditional diffusers pipelines, from a folder or the hub -> a U-Net and its noise schedule, loaded strictly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..exceptions import WeightsError, first_line
from ..files.hub import find_folder
from ..files.strict_json import parse_json

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

# Schedulers that add noise in the same way, so that their settings fit a DDPMScheduler.
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")


def load_pipeline(name: str) -> tuple[UNet2DModel, DDPMScheduler]:
    """Load the U-Net and the noise schedule of an unconditional pixel pipeline.

    Parameters
    ----------
    name : str
        Folder of a pipeline, or its name on the hub (``google/ddpm-cifar10-32``).

    Returns
    -------
    UNet2DModel
        The network.
    DDPMScheduler
        The noise schedule that it was trained on.

    Raises
    ------
    WeightsError
        The pipeline cannot be found, is not an unconditional pixel pipeline, or its weights are damaged or incomplete.
    """
    files = ["*.json", "*.safetensors", "*.bin"]
    folder = find_folder(name, files, lambda why: WeightsError(f"no pipeline at {name}: {why}"))

    # older pipelines keep all files in one folder
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    schedule_folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder

    kind = _read(unet_folder / "config.json", name).get("_class_name")
    if kind != "UNet2DModel":
        raise WeightsError(f"{name} holds a {kind}: an unconditional pixel model (UNet2DModel) is needed")
    settings = _read(schedule_folder / "scheduler_config.json", name)
    if settings.get("_class_name") not in _SCHEDULERS:
        known = ", ".join(_SCHEDULERS)
        raise WeightsError(f"{name} was trained with a {settings.get('_class_name')}; known schedules: {known}")

    unet = _load_unet(unet_folder)
    if problem := _unsuitable(unet.config):
        raise WeightsError(f"{name} cannot be used here: its U-Net {problem}")
    for weight, value in unet.state_dict().items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"the weights in {unet_folder} are damaged: {weight} holds NaN or infinite values")

    return unet, _make_schedule(settings, name)


def _load_unet(folder: Path) -> UNet2DModel:
    """The network with exactly its own weights: diffusers leaves missing ones uninitialised, and only logs it."""
    from diffusers import UNet2DModel

    try:
        unet, report = UNet2DModel.from_pretrained(
            folder, output_loading_info=True, low_cpu_mem_usage=False, local_files_only=True
        )
    except Exception as error:  # missing files, damaged ones and other shapes each raise an error of their own
        raise WeightsError(f"the weights in {folder} cannot be read: {first_line(error)}") from None

    for problem, names in report.items():
        if names:
            raise WeightsError(
                f"the weights in {folder} do not fit its config.json: {problem.replace('_', ' ')}: {names[0]}"
            )
    return unet


def _make_schedule(settings: dict[str, Any], name: str) -> DDPMScheduler:
    from diffusers import DDPMScheduler

    public = {key: value for key, value in settings.items() if not key.startswith("_")}
    try:
        return DDPMScheduler.from_config(public)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise WeightsError(f"the schedule of {name} cannot be built: {first_line(error)}") from None


def _unsuitable(config: Any) -> str:
    """Why a U-Net cannot inpaint square images without a condition; empty if it can."""
    if not isinstance(config.sample_size, int):
        return f"takes images of {config.sample_size} pixels, not of one square size"
    if config.out_channels != config.in_channels:
        return f"gives {config.out_channels} channels for {config.in_channels} (a learned variance?)"
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        return "is class-conditional"
    return ""


def _read(file: Path, name: str) -> dict[str, Any]:
    """The content of a JSON file of the pipeline."""
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise WeightsError(f"{name} is not a diffusers pipeline: no {file.name} that can be read in {file.parent}")
    return content
