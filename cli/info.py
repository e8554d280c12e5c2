"""``featdiff info``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .exported import describe, open_exported
from .options import MODEL_FOLDER
from .speech import show

if TYPE_CHECKING:
    from torch import Tensor


@click.command("info")
@click.argument("model", default=MODEL_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="The whole config as JSON.")
def command(model: str, as_json: bool) -> None:
    """Show what the saved MODEL is; its files are checked, the backbone is not loaded.

    The digest stands for all that its two files hold: compare it with the one that you were told.
    MODEL may also be what featdiff export wrote.

    \b
    Example: featdiff info featdiff-model
    """
    from featdiff.exported.layout import is_exported

    if is_exported(model):
        _show_exported(model, as_json)
        return

    from featdiff.detectors.saved import check_config, saved_mode
    from featdiff.exceptions import ModelError
    from featdiff.files.model_folder import load
    from featdiff.hardening.layout import GUARD, find_model, is_hardened

    folder = Path(find_model(model))
    folder = folder / GUARD if is_hardened(folder) else folder
    config, tensors = load(folder)
    check_config(config, folder, saved_mode(config, folder))
    if as_json:
        click.echo(json.dumps(config, indent=2))
        return

    others = {"joined": _joined_facts, "pixel": _pixel_facts, "vectors": _vector_facts}
    describe = others.get(str(config.get("mode")), _feature_facts)
    try:
        lines = _shared_facts(folder, config) | describe(config, tensors) | _training_facts(config)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"the model at {folder} is damaged: config.json: {type(error).__name__} {error}") from None

    for name, value in lines.items():
        show(f"{name:<11} {value}")


def _show_exported(model: str, as_json: bool) -> None:
    detector = open_exported(model, {})
    if as_json:
        click.echo(json.dumps(detector.facts, indent=2))
        return
    for name, value in describe(detector).items():
        show(f"{name:<11} {value}")


def _shared_facts(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6
    made = f"format {config['format_version']}, featdiff {config['featdiff_version']}"
    return {"model": f"{folder} ({size:.1f} MB, {made})", "digest": f"SHA-256 {config['digest']}"}


def _feature_facts(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, str]:
    from featdiff.features.views import in_words

    backbone = config["backbone"]
    settings = config["settings"]
    parameters = _parameters(tensors, "diffusion.denoiser.")

    neighbours = "none"
    if settings["head"] == "fused" and settings["neighbors"] > 0:
        neighbours = f"{settings['neighbors']} of {config['images']['bank']:,} in-domain images"

    view = "what the module's own transform shows" if backbone["source"] == "module" else in_words(settings)
    return {
        "backbone": f"{backbone['tag']} ({backbone['source']}), SHA-256 {backbone['fingerprint'][:16]}",
        "fitted in": f"{backbone['precision']}, by {backbone['engine']}",
        "view": view,
        "layers": ", ".join(f"{name} ({width})" for name, width in config["layers"].items()),
        "denoisers": f"{parameters:.2g} M parameters, {'joint' if settings['joint'] else 'one per layer'}",
        "neighbours": neighbours,
        "local score": _local(config, tensors),
        "keeps": _kept(config, tensors),
        "score": f"{settings['head']}, start times {settings['start_times']}, "
        f"{settings['draws']} stored noise samples each",
    }


def _joined_facts(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, str]:
    """What each encoder is, its number behind each name."""
    shared = {name.removeprefix("0."): value for name, value in tensors.items() if name.startswith("0.bank_")}
    facts = {"encoders": f"{len(config['encoders'])}, joined by {config['settings']['join']}"}
    kept = ""
    for i, encoder in enumerate(config["encoders"]):
        own = {name.removeprefix(f"{i}."): value for name, value in tensors.items() if name.startswith(f"{i}.")}
        of_this = _feature_facts(encoder, shared | own)
        of_this.pop("local score")
        kept = of_this.pop("keeps")
        facts |= {f"{name} {i + 1}": value for name, value in of_this.items()}
    return facts | {"keeps": kept}


def _local(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """The maps of a local score, and how large it is."""
    if not config["local"]:
        return "none"
    size = sum(values.nbytes for name, values in tensors.items() if name.startswith("joint."))
    return f"places in {', '.join(config['local'])} ({size / 1e6:.1f} MB)"


def _kept(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """What the model holds of its training images, beside their features."""
    count = config["images"]["bank"]
    paths = tensors.get("bank_paths")
    if paths is None:
        return f"digests of {count:,} training images, no paths and no pictures"
    held = f"paths of {count:,} training images ({paths.nbytes / 1e6:.1f} MB)"
    pictures = tensors.get("bank_thumbnails")
    if pictures is None:
        return f"{held}, no pictures"
    return f"{held}, small pictures of them ({pictures.nbytes / 1e6:.1f} MB)"


def _pixel_facts(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, str]:
    settings = config["settings"]
    size = config["unet"]["sample_size"]
    channels = config["unet"]["in_channels"]
    source = settings["pretrained"] or "trained here"

    return {
        "images": f"{size} x {size} pixels, {channels} channel{'s' if channels > 1 else ''}",
        "U-Net": f"{_parameters(tensors, 'denoiser.'):.2g} M parameters, {source}",
        "inpainting": f"mask {settings['mask']}, {settings['sampler']} in {settings['steps']} steps, "
        f"{settings['repetitions']} repetitions",
        "score": f"{settings['aggregate']} of {settings['distances'][0]} over repetitions",
    }


def _vector_facts(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, str]:
    bank = config["images"]["bank"]
    settings = config["settings"]
    parameters = _parameters(tensors, "heads.diffusion.denoiser.")

    return {
        "vectors": f"rows of {config['width']:,} numbers",
        "layers": ", ".join(f"{name} ({width})" for name, width in config["layers"].items()),
        "denoisers": f"{parameters:.2g} M parameters, one per layer",
        "neighbours": f"{settings['neighbors']} of {bank:,} in-domain rows" if bank else "none",
        "score": f"fused, start times {settings['start_times']}, {settings['draws']} stored noise samples each",
    }


def _training_facts(config: dict[str, Any]) -> dict[str, str]:
    from featdiff.verdicts.calibration import smallest_rate

    images = config["images"]
    held_out = images["calibration"]
    groups = images["calibration_groups"]
    fpr = config["settings"]["fpr"]
    what = "rows" if config.get("mode") == "vectors" else "images"

    of_groups = f" in {groups:,} groups" if groups < held_out else ""
    recalibrated = {}
    for change in config.get("recalibrations", [])[-1:]:
        told = f"{change['images']:,} {what}; fpr {change['fpr']:g}: threshold {change['threshold']:.2f}"
        if change["old_flagged"] is not None:
            share = change["old_flagged"] / change["images"]
            told += f", before {change['old_threshold']:.2f}, which flagged {share:.1%} of them"
        recalibrated["made anew"] = told
    return {
        "trained on": f"{images['different']:,} different {what}, in {config['training_seconds']:.0f} s",
        "calibrated": f"{held_out:,} held-out {what}{of_groups}; fpr {fpr:g}, possible from {smallest_rate(groups)} up",
    } | recalibrated


def _parameters(tensors: dict[str, Tensor], prefix: str) -> float:
    """How many parameters have names of this beginning, in millions."""
    return sum(value.numel() for name, value in tensors.items() if name.startswith(prefix)) / 1e6
