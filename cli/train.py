"""``featdiff train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE, Stopped
from .options import (
    MODEL_FOLDER,
    backbone_options,
    detector_arguments,
    groups_option,
    log_to_option,
    runtime_options,
    seed_option,
    weights_in,
)
from .progress import Bars, calibrated, list_unreadable
from .speech import is_first_process, say, without_duplicates
from .vectors import features_option, train_on_vectors

if TYPE_CHECKING:
    from PIL import Image

    from featdiff import Detector
    from featdiff.detectors import ImageDetector
    from featdiff.runtime.progress import Progress

    from .config import Config

INPAINTINGS = "inpaintings.png"


@click.command("train")
@click.argument("images", nargs=-1)
@features_option
@groups_option("near-copies, where there are too many for a split by chance")
@backbone_options
@seed_option
@click.option("--join", type=click.Choice(["z-sum", "min-p"]), help="How scores of several backbones join [z-sum].")
@click.option(
    "--mode",
    type=click.Choice(["feature", "pixel"]),
    help="pixel: inpaint the images themselves (LMD), slow and classic [feature].",
)
@click.option("--pretrained", metavar="FOLDER|ORG/NAME", help="Pixel mode: a diffusers pipeline, not trained again.")
@click.option("--distances", metavar="NAMES", help="Pixel mode: the first of them is the score [lpips,mse,ssim].")
@click.option("--config", metavar="NAME|FILE", help="A preset (dlsr_paper, lmd_small ...) or a TOML file.")
@click.option("--fpr", type=float, help="False-alarm rate to be able to hold [0.05].")
@click.option("--no-pretrained", is_flag=True, help="Random backbone: for tests only, scores mean nothing.")
@click.option("--local/--no-local", default=None, help="Look at places of a picture, too [if the images are alike].")
@click.option("--no-paths", is_flag=True, help="Keep no paths of training images in the model (for featdiff explain).")
@click.option("--thumbnails", is_flag=True, help="Keep small pictures of training images in the model, 16 MB at most.")
@log_to_option
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
    images: tuple[str, ...],
    groups: str | None,
    output: Path,
    force: bool,
    no_pretrained: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Learn what is normal from IMAGES: files, folders, globs, zip or tar archives, or - for paths on stdin.

    No labels and no bad examples are needed. Without IMAGES, the data named in the config is used, and without
    that the built-in sample set. Mask, repetitions and steps of the pixel mode are set in a config, like the preset
    lmd_small.

    With --features, the rows of a file are learned in place of images; --layers then tells which columns belong to
    which layer, like 0:192,192:320.

    \b
    Example: featdiff train photos/ --backbone resnet50 -o my-model
    Example: featdiff train photos/ --backbone tf_efficientnet_lite0,tf_efficientnet_lite2 -o my-model
    Example: featdiff train --features embeddings.npy -o my-model
    """
    from featdiff.runtime.allocator import keep_freed_memory
    from featdiff.runtime.run_log import logged_to

    from .config import Config, load_config

    keep_freed_memory()
    if not is_first_process():
        quiet = True
        options["log_to"] = ()
    check_free(output, force)
    if options["features"]:
        options["no_pretrained"] = no_pretrained
        return train_on_vectors(options["features"], images, groups, output, quiet, options)

    config = load_config(options["config"]) if options["config"] else Config()
    detector = _new_detector(config, no_pretrained, options)
    if no_pretrained:
        say("WARNING: --no-pretrained: the backbone is random, the scores of this model mean nothing")
    source: object = list(images) or config.images or _sample_set()

    try:
        with Bars(quiet) as bars, logged_to(options["log_to"], detector.settings.saved()):
            detector.fit(source, _tell_where(bars, detector, quiet), groups=groups or config.groups)
        if not is_first_process():
            return 0
        _save(detector, output)
    except KeyboardInterrupt:
        raise Stopped("interrupted; features and checkpoints are kept, the same command goes on from there") from None

    _summary(detector, output, bars, quiet)
    list_unreadable(detector.unreadable_, quiet)
    return EXIT_UNREADABLE if detector.unreadable_ else 0


def _sample_set() -> list[Image.Image]:
    """The built-in tiles, announced loudly: nobody must take them for their own images."""
    from featdiff.data import samples

    train_tiles, _ = samples.tiles()
    say(f"NO IMAGES GIVEN: training on the built-in sample set, {len(train_tiles)} tiles of two photographs.")
    say("This only shows that featdiff runs; for your own data: featdiff train FOLDER")
    return list(train_tiles.values())


def _save(detector: ImageDetector, output: Path) -> None:
    """Write the model, and in pixel mode a picture of inpaintings."""
    from featdiff.detectors import PixelDetector
    from featdiff.files.atomic import filling
    from featdiff.files.model_folder import check_target
    from featdiff.report.figures import save_inpaintings

    check_target(output)
    shown = detector.inpaintings() if isinstance(detector, PixelDetector) else None
    with filling(output) as place:
        detector.save_pretrained(place)
        if shown:
            save_inpaintings(place / INPAINTINGS, *shown)
    if not shown:
        (output / INPAINTINGS).unlink(missing_ok=True)  # of a model that is replaced


def check_apart(output: Path, old: str) -> None:
    """Whether a model that is made of another may be written there: not over that one, nor inside it."""
    from featdiff.exceptions import UsageError

    if Path(old).exists():
        place = output.resolve()
        if any(each.exists() and each.samefile(old) for each in (place, *place.parents)):
            raise UsageError(f"{output} is the old model, which is kept: choose another folder", argument="output")


def check_free(output: Path, force: bool) -> None:
    """Whether a model may be written there."""
    from featdiff.exceptions import UsageError
    from featdiff.files.model_folder import check_target, is_model

    check_target(output)
    if is_model(output) and not force:
        raise UsageError(f"a model is already at {output}: add --force to replace it, or choose another folder with -o")


def _new_detector(config: Config, no_pretrained: bool, options: dict[str, Any]) -> ImageDetector:
    """What the config and the options ask for, of the mode that either names."""
    from featdiff.detectors import Detector, JoinedDetector, PixelDetector
    from featdiff.detectors.config import FeatureSettings, PixelSettings
    from featdiff.detectors.joined_settings import JoinedSettings
    from featdiff.exceptions import UsageError

    mode = options["mode"] or config.mode
    if config.detector and mode != config.mode:
        raise UsageError(f"--config {options['config']} is of mode {config.mode}, not {mode}")
    given = detector_arguments(options)
    if options["pretrained"]:
        given["pretrained"] = options["pretrained"]
    if options["distances"]:
        given["distances"] = options["distances"].split(",")
    if mode == Detector.mode and (options["pretrained"] or options["distances"]):
        raise UsageError("--pretrained and --distances need --mode pixel")
    if mode == PixelDetector.mode and (options["layers"] or options["view"] or options["precision"] or no_pretrained):
        raise UsageError("--layers, --view, --precision and --no-pretrained mean nothing in pixel mode")
    if mode == PixelDetector.mode and options["local"] is not None:
        raise UsageError("--local and --no-local mean nothing in pixel mode")
    if mode == PixelDetector.mode and (options["no_paths"] or options["thumbnails"]):
        raise UsageError("--no-paths and --thumbnails mean nothing in pixel mode: such a model keeps no images")
    if no_pretrained:
        given["pretrained"] = False
    if options["no_paths"]:
        given["keep_paths"] = False
    if options["thumbnails"]:
        given["keep_thumbnails"] = True
    if options["local"] is not None:
        given["local"] = options["local"]
    values = config.detector | given
    if mode == PixelDetector.mode:
        return PixelDetector.from_settings(PixelSettings.of(values))
    if several := _several(values, options["join"]):
        return JoinedDetector.from_settings(JoinedSettings.of(several))
    return Detector.from_settings(FeatureSettings.of(values))


def _several(values: dict[str, Any], how: str | None) -> dict[str, Any]:
    """Arguments for several backbones, if that is what is named; else none."""
    from featdiff.exceptions import UsageError

    backbone = values.get("backbone")
    names = backbone.split(",") if isinstance(backbone, str) else backbone
    if not isinstance(names, list) or len(names) < 2:
        if how:
            raise UsageError("there is nothing to join: name several backbones, like --backbone A,B", argument="join")
        return {}
    weights = {"weights": weights_in(Path(values["weights"]))} if isinstance(values.get("weights"), str | Path) else {}
    return values | {"backbone": names} | weights | ({"join": how} if how else {})


def _tell_where(bars: Bars, detector: ImageDetector, quiet: bool) -> Progress:
    """``bars``, and a word on where the loss and samples of a long training run can be seen."""

    def progress(stage: str, done: int, total: int) -> None:
        log = getattr(detector, "training_log_", None)  # of the pixel mode
        if stage == "training" and stage not in bars.counts and log:
            say(f"loss and samples, as training goes: {log}", quiet)
        bars(stage, done, total)

    return progress


def _summary(detector: ImageDetector, output: Path, bars: Bars, quiet: bool) -> None:
    from featdiff.detectors import Detector, JoinedDetector, PixelDetector
    from featdiff.features.views import in_words

    duplicates = without_duplicates(detector.n_duplicates_)
    bad = f", {len(detector.unreadable_):,} unreadable" if detector.unreadable_ else ""
    stage = "reading" if isinstance(detector, PixelDetector) else "features"
    speed = f"{stage} {bars.seconds['features']:.0f} s ({bars.rate('features'):,.0f} images/s)"
    say(f"{detector.n_images_:,} images{duplicates}{bad}; {speed}", quiet)
    if isinstance(detector, Detector):
        if waited := bars.waits.in_words("features", bars.seconds["features"]):
            say(waited, quiet)
        say(f"view: {in_words(detector.config()['settings'])}", quiet)
        if detector.engine_note_:
            say(f"engine: {detector.engine_note_}", quiet)
        if detector.precision_ != "float32":
            say(f"precision: {detector.precision_}", quiet)
        say(detector.local_note_ + _held(detector), quiet)
    if trained := bars.seconds.get("training"):
        say(f"trained {trained:.0f} s", quiet)
    elif isinstance(detector, PixelDetector) and detector.settings.pretrained:
        say(f"not trained: {detector.name}", quiet)
    else:
        say("training found complete in the cache", quiet)

    say(calibrated(detector.calibration_, detector.grouping_, "images"), quiet)
    if isinstance(detector, JoinedDetector):
        how = detector.settings.join
        say(f"{len(detector.encoders)} encoders, joined by {how}: {', '.join(detector.encoders)}", quiet)
    elif isinstance(detector, PixelDetector):
        say(f"the least and the most strange of them: {output / INPAINTINGS}", quiet)
    else:
        check_itself(detector, quiet)

    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    say(f"model: {output} ({size:.1f} MB). Next: featdiff score IMAGES -m {output}", quiet)


def _held(detector: Detector) -> str:
    """What a local score takes, if there is one."""
    from featdiff.detectors.local_fit import MOST_BYTES

    if detector.local_ is None:
        return ""
    return f"; {detector.local_.nbytes / 1e6:.1f} MB, trained on at most {MOST_BYTES / 1e6:.0f} MB of places"


def check_itself(detector: Detector, quiet: bool) -> None:
    """A line on what a detector that was just fitted makes of synthetic outliers."""
    from featdiff.exceptions import UsageError
    from featdiff.outliers.synthesis import self_check

    try:
        share = f"flags {self_check(detector):.0%} of near synthetic outliers at fpr {detector.fpr:g}"
        say(f"self-check: {share} (no real OOD image was seen)", quiet)
    except UsageError as error:
        say(f"self-check: left out: {error}", quiet)
