"""``featdiff train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .main import EXIT_UNREADABLE, Stopped
from .options import MODEL_FOLDER, backbone_options, detector_arguments, runtime_options
from .progress import Bars, list_unreadable, say


@click.command("train")
@click.argument("images", nargs=-1)
@backbone_options
@click.option("--config", metavar="NAME|FILE", help="A preset (dlsr_paper) or a TOML file.")
@click.option("--fpr", type=float, help="False-alarm rate to be able to hold [0.05].")
@click.option("--no-pretrained", is_flag=True, help="Random backbone: for tests only, scores mean nothing.")
@click.option("--force", is_flag=True, help="Replace a model that is already there.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=MODEL_FOLDER,
    show_default=True,
    help="Model folder.",
)
@runtime_options
def command(
    images: tuple[str, ...], output: Path, force: bool, no_pretrained: bool, quiet: bool, **options: Any
) -> int:
    """Learn what is normal from IMAGES: files, folders, globs, zip or tar archives, or - for paths on stdin.

    No labels and no bad examples are needed. Without IMAGES, the data named in the config is used, and without
    that the built-in sample set.

    \b
    Example: featdiff train photos/ --backbone resnet50 -o my-model
    """
    from featdiff import Detector, samples
    from featdiff.allocator import keep_freed_memory
    from featdiff.exceptions import UsageError
    from featdiff.persist import check_target, is_model

    from .config import Config, load_config

    keep_freed_memory()
    config = load_config(options["config"]) if options["config"] else Config()
    check_target(output)
    if is_model(output) and not force:
        raise UsageError(f"a model is already at {output}: add --force to replace it, or choose another folder with -o")
    detector = Detector(
        **config.detector | detector_arguments(options) | ({"pretrained": False} if no_pretrained else {})
    )
    if no_pretrained:
        say("WARNING: --no-pretrained: the backbone is random, the scores of this model mean nothing")
    source: object = list(images) or config.images
    if not source:
        train_tiles, _ = samples.tiles()
        source = list(train_tiles.values())
        say(f"NO IMAGES GIVEN: training on the built-in sample set, {len(train_tiles)} tiles of two photographs.")
        say("This only shows that featdiff runs; for your own data: featdiff train FOLDER")
    try:
        with Bars(quiet) as bars:
            detector.fit(source, bars)
        detector.save_pretrained(output)
    except KeyboardInterrupt:
        raise Stopped("interrupted; features and checkpoints are kept, the same command goes on from there") from None
    _summary(detector, output, bars, quiet)
    list_unreadable(detector.unreadable_, quiet)
    return EXIT_UNREADABLE if detector.unreadable_ else 0


def _summary(detector: Any, output: Path, bars: Bars, quiet: bool) -> None:
    n_cal = len(detector.calibration_)
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    duplicates = f", {detector.n_duplicates_:,} duplicates left out" if detector.n_duplicates_ else ""
    bad = f", {len(detector.unreadable_):,} unreadable" if detector.unreadable_ else ""
    rate = f"{bars.rate('features'):,.0f} images/s"
    say(
        f"{detector.n_images_:,} images{duplicates}{bad}; features {bars.seconds['features']:.0f} s ({rate})",
        quiet,
    )
    trained = bars.seconds.get("training")
    say(f"trained {trained:.0f} s" if trained else "training found complete in the cache", quiet)
    say(f"calibrated on {n_cal:,} held-out images: --fpr from {1 / (n_cal + 1):.2g} up", quiet)
    say(f"model: {output} ({size:.1f} MB). Next: featdiff score IMAGES -m {output}", quiet)
