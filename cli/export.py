"""``featdiff export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .main import EXIT_UNREADABLE
from .options import model_arguments, model_option, runtime_options, weights_option
from .progress import Bars, list_unreadable, say

FOLDER = "featdiff-export"


@click.command("export")
@model_option
@weights_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=FOLDER,
    show_default=True,
    help="Folder for model.onnx and model.pt2.",
)
@click.option("--format", "formats", default="onnx,pt2", show_default=True, help="onnx, pt2 (torch.export), or both.")
@click.option(
    "--verify",
    "images",
    multiple=True,
    metavar="IMAGES",
    help="Compare both files with torch on these images; repeat for more. Exit code 1 if they disagree.",
)
@runtime_options
def command(model: str, output: Path, formats: str, images: tuple[str, ...], quiet: bool, **options: Any) -> int:
    """Write a saved model and its backbone as one file each for ONNX Runtime and for torch.export.

    Both take preprocessed images, pixels (B, 3, H, W), and give ood_score (B,) and p_value (B,) for any B. Threshold,
    preprocessing and more stand in their metadata. Files are made on the CPU.

    \b
    Example: featdiff export -m featdiff-model --verify photos_test/
    """
    from featdiff.allocator import keep_freed_memory
    from featdiff.detectors import load_detector
    from featdiff.exceptions import ModelError
    from featdiff.exporting import check_exportable, export, facts, need
    from featdiff.sources import list_images
    from featdiff.verifying import verify

    keep_freed_memory()
    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    if images and "onnx" in wanted:
        need("onnxruntime")
    options["device"] = options["device"] or "cpu"
    detector = check_exportable(load_detector(model, **model_arguments(options)))
    refs = list_images(list(images)) if images else []
    say(f"exporting {detector.name}, which takes about a minute", quiet)
    files = export(detector, output, wanted)
    for file in files.values():
        say(f"{file} ({file.stat().st_size / 1e6:.1f} MB)", quiet)
    known = facts(detector)
    shape = ", ".join(map(str, known["input_size"]))
    say(f"pixels (B, {shape}) -> ood_score (B,), p_value (B,)", quiet)
    rate = f"fpr {known['fpr']:g}, {known['calibration_images']:,} calibration images"
    say(f"OOD where ood_score > {known['threshold']:.6g} ({rate})", quiet)
    if not images:
        return 0
    unreadable: dict[str, str] = {}
    with Bars(quiet) as bars:
        found = verify(detector, list(files.values()), refs, bars, unreadable)
    for agreement in found:
        say(_line(agreement), quiet)
    list_unreadable(list(unreadable.items()), quiet)
    if problems := [agreement.problem for agreement in found if agreement.problem]:
        raise ModelError("; ".join(problems))
    return EXIT_UNREADABLE if unreadable else 0


def _line(found: Any) -> str:
    ratio = found.speed / found.torch_speed
    speed = f"{found.speed:,.0f} images/s, torch {found.torch_speed:,.0f} ({ratio:.2f} x)"
    verdicts = f"{found.verdicts:,} other verdicts" if found.verdicts else "same verdicts"
    return f"{found.file.name}: {found.images:,} images, scores within {found.difference:.1e}, {verdicts}; {speed}"
