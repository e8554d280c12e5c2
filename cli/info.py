"""``featdiff info``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .options import MODEL_FOLDER


@click.command("info")
@click.argument("model", default=MODEL_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="The whole config as JSON.")
def command(model: str, as_json: bool) -> None:
    """Show what the saved MODEL is; its files are checked, the backbone is not loaded.

    \b
    Example: featdiff info featdiff-model
    """
    from featdiff.exceptions import ModelError
    from featdiff.persist import load, locate

    folder = locate(model)
    config, tensors = load(folder)
    if as_json:
        click.echo(json.dumps(config, indent=2))
        return
    try:
        lines = _facts(folder, config, tensors)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"the model at {folder} is damaged: config.json: {type(error).__name__} {error}") from None
    for name, value in lines.items():
        click.echo(f"{name:<11} {value}")


def _facts(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> dict[str, str]:
    backbone, images, arguments = config["backbone"], config["images"], config["arguments"]
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6
    parameters = sum(value.numel() for name, value in tensors.items() if name.startswith("diffusion.denoiser."))
    neighbours = arguments["head"] == "fused" and arguments["neighbors"] > 0
    return {
        "model": f"{folder} ({size:.1f} MB, format {config['format_version']}, featdiff {config['featdiff_version']})",
        "backbone": f"{backbone['tag']} ({backbone['source']}), SHA-256 {backbone['fingerprint'][:16]}",
        "layers": ", ".join(f"{name} ({width})" for name, width in config["layers"].items()),
        "denoisers": f"{parameters / 1e6:.1f} M parameters, {'joint' if arguments['joint'] else 'one per layer'}",
        "neighbours": f"{arguments['neighbors']} of {images['bank']:,} in-domain images" if neighbours else "none",
        "score": f"{arguments['head']}, start times {arguments['start_times']}, {arguments['draws']} stored draws each",
        "trained on": f"{images['different']:,} different images, in {config['training_seconds']:.0f} s",
        "calibrated": f"{images['calibration']:,} held-out images; fpr {arguments['fpr']:g}, possible from "
        f"{1 / (images['calibration'] + 1):.2g} up",
    }
