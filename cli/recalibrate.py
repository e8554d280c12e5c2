"""``featdiff recalibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE, Stopped
from .options import groups_option, load_model, runtime_options, weights_option
from .progress import Bars, calibrated, list_unreadable
from .speech import say, without_duplicates
from .train import check_apart, check_free
from .vectors import features_option, recalibrate_on_vectors

if TYPE_CHECKING:
    from featdiff.detectors.recalibration import Recalibration


@click.command("recalibrate")
@click.argument("model")
@click.argument("images", nargs=-1)
@features_option
@click.option("--fpr", type=float, help="False-alarm rate of the new model [that of MODEL].")
@groups_option("near-copies, where there are many")
@click.option("--force", is_flag=True, help="Replace another model that is already at -o.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the new model.")
@weights_option
@runtime_options
def command(
    model: str,
    images: tuple[str, ...],
    features: str | None,
    fpr: float | None,
    groups: str | None,
    force: bool,
    output: Path,
    quiet: bool,
    **options: Any,
) -> int:
    """Calibrate MODEL anew with IMAGES, normal ones of another site or camera with the same object.

    Only the threshold is made anew; what was learned stays, so nothing is trained. IMAGES must not have been in
    training; all of them calibrate: 19 do for --fpr 0.05, 99 for 0.01. MODEL is left as it is. A model of vectors takes
    --features FILE in place of IMAGES, as train does; of a hardened student, the guard is calibrated.

    \b
    Example: featdiff recalibrate my-model site-b/ -o site-b-model
    """
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    check_apart(output, model)
    folder = _folder(model, features, images)
    _check_free(folder, output, force)
    what = "rows" if features else "images"
    try:
        with Bars(quiet) as bars:
            if features:
                result, bad = recalibrate_on_vectors(features, images, str(folder), fpr, groups, options)
            else:
                result = _on_images(folder, images, fpr, groups, bars, options)
                bad = result.unreadable
    except KeyboardInterrupt:
        raise Stopped("interrupted; features are kept, the same command goes on from there") from None

    _save(result.detector, folder, output)
    _summary(result, what, len(bad), model, output, quiet)
    list_unreadable(bad, quiet)
    return EXIT_UNREADABLE if bad else 0


def _folder(model: str, features: str | None, images: tuple[str, ...]) -> Path:
    """Where the model lies, if it can be recalibrated with what is given; one on the hub is downloaded."""
    from featdiff.detectors.saved import VECTORS
    from featdiff.exceptions import UsageError
    from featdiff.exported.layout import is_exported
    from featdiff.files.model_folder import read_config
    from featdiff.hardening.layout import find_model, is_hardened

    if is_exported(model):
        raise UsageError(f"{model} is an exported model: recalibrate the model that it was made of, and export that")
    folder = Path(find_model(model))
    of_vectors = not is_hardened(folder) and read_config(folder).get("mode") == VECTORS
    if of_vectors and not features:
        raise UsageError(f"{model} was trained on vectors, not on images: give a file of them", argument="features")
    if not features and not images:
        raise UsageError("name IMAGES to calibrate with, or a file of vectors with --features FILE")
    return folder


def _check_free(folder: Path, output: Path, force: bool) -> None:
    from featdiff.hardening.layout import is_hardened

    if is_hardened(folder):
        from featdiff.hardening.harden import check_hardened_target

        check_hardened_target(output, force)
    else:
        check_free(output, force)


def _on_images(
    folder: Path, images: tuple[str, ...], fpr: float | None, groups: str | None, bars: Bars, options: dict[str, Any]
) -> Recalibration[Any]:
    from featdiff.detectors.recalibration import recalibrate

    detector = load_model(str(folder), options).detector
    return recalibrate(detector, list(images), fpr=fpr, groups=groups, progress=bars)


def _save(detector: Any, folder: Path, output: Path) -> None:
    from featdiff.hardening.layout import is_hardened

    if is_hardened(folder):
        from featdiff.hardening.harden import save_with_guard

        save_with_guard(folder, detector, output)
    else:
        detector.save_pretrained(output)


def _summary(result: Recalibration[Any], what: str, unreadable: int, model: str, output: Path, quiet: bool) -> None:
    """What was given, and old and new rates; ``what`` is images or rows."""
    new = result.detector.calibration_
    bad = f", {unreadable:,} unreadable" if unreadable else ""
    say(f"{len(new):,} {what}{without_duplicates(result.n_duplicates)}{bad}; fpr {result.fpr:g}", quiet)

    before, after = result.thresholds
    if before is None or result.share is None:
        say(f"old calibration: {len(result.old):,} {what}, too few for this rate", quiet)
    else:
        share, low, high = result.share
        fine = ": it would do here, too" if low <= result.fpr <= high else ""
        flagged = f"flags {share:.1%} of these {what} ({result.flagged:,}; 95 % interval {low:.1%} to {high:.1%})"
        say(f"old calibration: {flagged}, threshold {before:.2f}{fine}", quiet)
    low, high = result.expected
    say(f"new calibration: will flag {low:.1%} to {high:.1%} of further ones (95 %), threshold {after:.2f}", quiet)

    say(calibrated(new, result.grouping, what), quiet)
    size = sum(file.stat().st_size for file in output.rglob("*")) / 1e6
    given = "--features FILE" if what == "rows" else "IMAGES"
    say(f"model: {output} ({size:.1f} MB), {model} is as it was. Next: featdiff score {given} -m {output}", quiet)
