"""``featdiff export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .main import EXIT_UNREADABLE
from .options import load_model, model_option, runtime_options, weights_option
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
    preprocessing and more stand in their metadata. Files are made on the CPU. Of a hardened student they give the
    logits, too.

    \b
    Example: featdiff export -m featdiff-model --verify photos_test/
    """
    from featdiff.data.references import list_images
    from featdiff.exceptions import ModelError
    from featdiff.export.export import check_exportable, export, facts, need
    from featdiff.export.verify import verify
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    if images and "onnx" in wanted:
        need("onnxruntime")
    options["device"] = options["device"] or "cpu"
    loaded = load_model(model, options)
    detector, exported = check_exportable(loaded.detector), loaded.guard or loaded.detector
    refs = list_images(list(images)) if images else []
    say(f"exporting {detector.name}, which takes about a minute", quiet)
    files = export(exported, output, wanted, loaded.classes)
    for file in files.values():
        say(f"{file} ({file.stat().st_size / 1e6:.1f} MB)", quiet)
    known = facts(exported)
    shape = ", ".join(map(str, known["input_size"]))
    gives = "ood_score (B,), p_value (B,)" + (f", logits (B, {len(loaded.classes)})" if loaded.guard else "")
    say(f"pixels (B, {shape}) -> {gives}", quiet)
    rate = f"fpr {known['fpr']:g}, {known['calibration_images']:,} calibration images"
    say(f"OOD where ood_score > {known['threshold']:.6g} ({rate})", quiet)
    if not images:
        return 0
    unreadable: dict[str, str] = {}
    with Bars(quiet) as bars:
        found = verify(exported, list(files.values()), refs, bars, unreadable)
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
