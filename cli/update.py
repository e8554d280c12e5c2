"""``featdiff update``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE, Stopped
from .options import groups_option, model_arguments, runtime_options, weights_option
from .progress import Bars, list_unreadable
from .speech import say, without_duplicates
from .train import check_apart, check_free

if TYPE_CHECKING:
    from featdiff import Detector
    from featdiff.detectors.updating import Changes

# What follows the name of the old model in that of the new one.
_ENDING = "-updated"
# Stages of the work on a local score.
_PLACES = ("places", "training places", "held-out places")
# Where the features of the old images come from.
_SOURCES = {"cache": "in the cache", "given": "computed again where they were gone", "model": "kept in the model"}


@click.command("update")
@click.argument("model", metavar="MODEL")
@click.argument("images", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help=f"Folder of the new model [that of the old one with {_ENDING}].",
)
@click.option("--accept", is_flag=True, help="Add the images though most of them are OOD to the model.")
@click.option(
    "--old",
    multiple=True,
    metavar="IMAGES",
    help="Images it was trained on: if it has a local score, or the cache is gone; repeat.",
)
@groups_option("near-copies, where there are too many for a split by chance")
@weights_option
@click.option("--force", is_flag=True, help="Replace a model that is already at -o.")
@runtime_options
def command(
    model: str,
    images: tuple[str, ...],
    output: Path | None,
    accept: bool,
    old: tuple[str, ...],
    groups: str | None,
    force: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Add good IMAGES to what MODEL takes for normal, without training anew: files, folders, globs, archives, or -.

    Only the new images go through the backbone. The banks of the model get them, its denoisers train on from where they
    are, and a fifth of the new images is held out to calibrate beside the old held-out ones. Images that the model was
    trained on are left out. If most of the others are OOD to the model, nothing is done without --accept.

    MODEL is never changed: the new model is written whole to another folder. Features of its training images are found
    in the cache. If that is gone, some hundred rows of features in MODEL stand for them; --old IMAGES is better. A
    MODEL with a local score always needs --old: places of some of its training images are looked at again.

    \b
    Example: featdiff update my-model new-photos/ -o my-model-2
    """
    from featdiff.detectors import load_detector
    from featdiff.detectors.updating import update
    from featdiff.files.atomic import filling
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    target = _target(model, output)
    check_apart(target, model)
    check_free(target, force)
    detector = load_detector(_folder(model), **model_arguments(options))
    try:
        with Bars(quiet) as bars:
            updated, changes = update(
                detector, list(images), accept=accept, old=list(old) or None, groups=groups, progress=bars
            )
        with filling(target) as place:
            updated.save_pretrained(place)
    except KeyboardInterrupt:
        raise Stopped(f"interrupted; features are kept, and {model} is as it was") from None

    _tell(updated, changes, bars, quiet)
    size = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    say(f"model: {target} ({size:.1f} MB); {model} is as it was. Next: featdiff score IMAGES -m {target}", quiet)
    list_unreadable(changes.unreadable, quiet)
    return EXIT_UNREADABLE if changes.unreadable else 0


def _target(model: str, output: Path | None) -> Path:
    """Where the new model is written."""
    from featdiff.exceptions import UsageError

    if output is None and not Path(model).is_dir():
        raise UsageError(f"{model} is no folder here: say where to write the new model", argument="output")
    return output or Path(model).with_name(Path(model).resolve().name + _ENDING)


def _folder(model: str) -> str:
    """Where the model lies, if it is of a kind that can be updated; one on the hub is downloaded."""
    from featdiff.detectors.saved import VECTORS
    from featdiff.exceptions import UsageError
    from featdiff.exported.layout import is_exported
    from featdiff.files.model_folder import read_config
    from featdiff.hardening.layout import find_model, is_hardened

    if is_exported(model):
        raise UsageError(f"{model} is an exported model: update the model that it was made of, and export that")
    folder = find_model(model)
    if is_hardened(folder):
        raise UsageError(
            f"{model} is a hardened student, which cannot be updated: harden it anew, on old and new images"
        )
    if read_config(Path(folder)).get("mode") == VECTORS:
        raise UsageError(f"{model} was trained on vectors, and cannot be updated: train anew, on old and new rows")
    return folder


def _tell(detector: Detector, changes: Changes, bars: Bars, quiet: bool) -> None:
    """What was added, and what has changed."""
    known = f", {changes.known:,} known to the model left out" if changes.known else ""
    bad = f", {len(changes.unreadable):,} unreadable" if changes.unreadable else ""
    speed = f"features {bars.seconds['features']:.0f} s ({bars.rate('features'):,.0f} images/s)"
    say(f"{changes.added:,} new images{without_duplicates(detector.n_duplicates_)}{known}{bad}; {speed}", quiet)

    place = _SOURCES[changes.source]
    if changes.at_hand < changes.old_images:
        say(f"{changes.old_images:,} old images; for them stand features of {changes.at_hand:,}, {place}", quiet)
    else:
        say(f"{changes.old_images:,} old images; their features are {place}", quiet)
    how = "fitted anew on these features, for the model is calibrated by folds" if changes.anew else "trained on"
    say(f"{how}: {bars.seconds.get('training', 0.0):.0f} s", quiet)
    if changes.local:
        spent = sum(bars.seconds.get(stage, 0.0) for stage in _PLACES)
        say(f"local score {'fitted anew' if changes.anew else 'trained on'}: {spent:.0f} s", quiet)

    old, new = changes.held_out
    before, after = changes.threshold
    say(f"held out: {old:,} old images, {new:,} new ones", quiet)
    say(f"threshold at fpr {changes.fpr:g}: {before:.3f} -> {after:.3f} (each on its own scale)", quiet)
    rates = [f"{name} {_rates(*changes.false_alarms[name])}" for name in ("old", "new")]
    say(f"false alarms among held-out images: {', '.join(rates)}", quiet)
    say(f"of all new images, {changes.strange:.1%} were flagged before; updated in {changes.seconds:.0f} s", quiet)


def _rates(before: float, after: float) -> str:
    return "none held out" if math.isnan(before) else f"{before:.1%} -> {after:.1%}"
