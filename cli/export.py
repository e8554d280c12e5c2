"""``featdiff export``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE
from .options import load_model, model_option, runtime_options, weights_option
from .progress import Bars, list_unreadable
from .speech import say

if TYPE_CHECKING:
    from featdiff import Guard
    from featdiff.detectors import ImageDetector
    from featdiff.export.verify import Agreement

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
@click.option("--triton", type=click.Path(path_type=Path), help="Also a model repository for NVIDIA Triton, here.")
@runtime_options
def command(
    model: str,
    output: Path,
    formats: str,
    images: tuple[str, ...],
    triton: Path | None,
    quiet: bool,
    **options: Any,
) -> int:
    """Write a saved model and its backbone as one file each for ONNX Runtime and for torch.export.

    Both take preprocessed images, pixels (B, 3, H, W), and return ood_score (B,), p_value (B,) and layer_scores (B, L)
    for any B, and for every H and W that the model's pictures may have. Sizes, threshold, preprocessing and more are in
    their metadata. Files are made on the CPU. Those of a hardened student also return its logits.

    featdiff score IMAGES -m FOLDER scores with the ONNX file, without PyTorch, and featdiff serve -m FOLDER answers
    over HTTP. --triton writes the ONNX file once more, where Triton looks for it, with a config.pbtxt.

    \b
    Example: featdiff export -m featdiff-model --verify photos_test/
    """
    from featdiff.data.references import list_images
    from featdiff.exceptions import ModelError, UsageError
    from featdiff.export.export import check_exportable, export, facts, need
    from featdiff.export.triton import write_repository
    from featdiff.export.verify import verify
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    if triton and "onnx" not in wanted:
        raise UsageError("--triton needs an ONNX file: add onnx to --format")
    if images and "onnx" in wanted:
        need("onnxruntime")
    options["device"] = options["device"] or "cpu"
    loaded = load_model(model, options)
    detector = check_exportable(loaded.detector)
    exported: ImageDetector | Guard = loaded.guard or loaded.detector
    refs = list_images(list(images)) if images else []

    say(f"exporting {detector.name}, which takes about a minute", quiet)
    files = export(exported, output, wanted, loaded.classes)
    for file in files.values():
        say(f"{file} ({file.stat().st_size / 1e6:.1f} MB)", quiet)
    if triton:
        name = re.sub(r"[^\w.-]+", "-", Path(model).resolve().name)
        say(f"{write_repository(files['onnx'], triton, name)} (for Triton)", quiet)
    _summary(facts(exported), loaded.classes if loaded.guard else (), quiet)
    if not images:
        return 0

    unreadable: dict[str, str] = {}
    with Bars(quiet) as bars:
        agreements = verify(exported, list(files.values()), refs, bars, unreadable)
    for agreement in agreements:
        say(_line(agreement), quiet)
    list_unreadable(list(unreadable.items()), quiet)

    problems = [agreement.problem for agreement in agreements if agreement.problem]
    if problems:
        raise ModelError("; ".join(problems))
    return EXIT_UNREADABLE if unreadable else 0


def _summary(facts: dict[str, Any], classes: tuple[str, ...], quiet: bool) -> None:
    """Inputs, outputs and threshold of the files."""
    from featdiff.exported.layout import LAYER_SCORES, PART_SCORES

    outputs = "ood_score (B,), p_value (B,)"
    if classes:
        outputs += f", logits (B, {len(classes)})"
    for name in (LAYER_SCORES, PART_SCORES):
        if facts[name]:
            outputs += f", {name} (B, {len(facts[name])})"
    side = facts["sizes"]["height"]
    if side["min"] < side["max"]:
        say(f"pixels (B, 3, H, W) -> {outputs}", quiet)
        say(f"H and W: multiples of {side['multiple_of']} from {side['min']} to {side['max']}", quiet)
    else:
        size = ", ".join(map(str, facts["input_size"]))
        say(f"pixels (B, {size}) -> {outputs}", quiet)

    rate = f"fpr {facts['fpr']:g}, {facts['calibration_images']:,} calibration images"
    say(f"OOD where ood_score > {facts['threshold']:.6g} ({rate})", quiet)


def _line(agreement: Agreement) -> str:
    """How a file compares with torch, in one line."""
    ratio = agreement.speed / agreement.torch_speed
    speed = f"{agreement.speed:,.0f} images/s, torch {agreement.torch_speed:,.0f} ({ratio:.2f} x)"
    verdicts = f"{agreement.verdicts:,} other verdicts" if agreement.verdicts else "same verdicts"
    scores = f"{agreement.images:,} images, scores within {agreement.difference:.1e}"
    return f"{agreement.file.name}: {scores}, {verdicts}; {speed}"
