"""``featdiff recalibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE, Stopped
from .options import groups_option, load_model, runtime_options, weights_option
from .progress import Bars, calibrated, list_unreadable
from .speech import say, without_duplicates
from .train import check_free

if TYPE_CHECKING:
    from featdiff import Detector, PixelDetector
    from featdiff.detectors.recalibration import Recalibration


@click.command("recalibrate")
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@click.option("--fpr", type=float, help="False-alarm rate of the new model [that of MODEL].")
@groups_option("near-copies, where there are many")
@click.option("--force", is_flag=True, help="Replace another model that is already at -o.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the new model.")
@weights_option
@runtime_options
def command(
    model: str,
    images: tuple[str, ...],
    fpr: float | None,
    groups: str | None,
    force: bool,
    output: Path,
    quiet: bool,
    **options: Any,
) -> int:
    """Calibrate MODEL anew with IMAGES, normal ones of another site or camera with the same object.

    Only the threshold is made anew; what was learned stays, so nothing is trained. IMAGES must not have been in
    training; all of them calibrate: 19 do for --fpr 0.05, 99 for 0.01. MODEL is left as it is.

    \b
    Example: featdiff recalibrate my-model site-b/ -o site-b-model
    """
    from featdiff.detectors.recalibration import recalibrate
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    _check_place(output, model, force)
    detector = _load(model, options)
    try:
        with Bars(quiet) as bars:
            result = recalibrate(detector, list(images), fpr=fpr, groups=groups, progress=bars)
    except KeyboardInterrupt:
        raise Stopped("interrupted; features are kept, the same command goes on from there") from None

    result.detector.save_pretrained(output)
    _summary(result, model, output, quiet)
    list_unreadable(result.unreadable, quiet)
    return EXIT_UNREADABLE if result.unreadable else 0


def _check_place(output: Path, model: str, force: bool) -> None:
    """Refuse the old model's own place: without it there is no way back."""
    from featdiff.exceptions import UsageError

    if output.exists() and Path(model).exists() and output.samefile(model):
        raise UsageError(f"{output} is the model itself, which is kept: choose another folder", argument="output")
    check_free(output, force)


def _load(model: str, options: dict[str, Any]) -> Detector | PixelDetector:
    from featdiff.detectors.saved import VECTORS
    from featdiff.exceptions import UsageError
    from featdiff.exported.layout import is_exported
    from featdiff.files.model_folder import locate, read_config
    from featdiff.hardening.layout import is_hardened

    if is_exported(model):
        raise UsageError(f"{model} is an exported model: recalibrate the model that it was made of, and export that")
    if is_hardened(model):
        raise UsageError(f"{model} is a hardened student, whose guard cannot be recalibrated: harden it anew")
    if read_config(locate(model)).get("mode") == VECTORS:
        raise UsageError(f"{model} was trained on vectors, not on images: train anew on vectors of the new place")
    return load_model(model, options).detector


def _summary(result: Recalibration[Any], model: str, output: Path, quiet: bool) -> None:
    new = result.detector.calibration_
    bad = f", {len(result.unreadable):,} unreadable" if result.unreadable else ""
    say(f"{len(new):,} images{without_duplicates(result.n_duplicates)}{bad}; fpr {result.fpr:g}", quiet)

    before, after = result.thresholds
    if before is None or result.share is None:
        say(f"old calibration: {len(result.old):,} images, too few for this rate", quiet)
    else:
        share, low, high = result.share
        fine = ": it would do here, too" if low <= result.fpr <= high else ""
        flagged = f"flags {share:.1%} of these images ({result.flagged:,}; 95 % interval {low:.1%} to {high:.1%})"
        say(f"old calibration: {flagged}, threshold {before:.2f}{fine}", quiet)
    low, high = result.expected
    say(f"new calibration: will flag {low:.1%} to {high:.1%} of further ones (95 %), threshold {after:.2f}", quiet)

    say(calibrated(new, result.grouping, "images"), quiet)
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    say(f"model: {output} ({size:.1f} MB), {model} is as it was. Next: featdiff score IMAGES -m {output}", quiet)
