"""``featdiff outliers``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE, Stopped
from .options import load_model, model_option, runtime_options, weights_option
from .progress import Bars, list_unreadable
from .speech import say

if TYPE_CHECKING:
    from featdiff import Detector
    from featdiff.outliers.stable_diffusion import StableDiffusion
    from featdiff.outliers.synthesis import Synthesis

STABLE = "stable-diffusion"
PIPELINE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# option -> methods that use it
_METHODS_OF = {"strength": ("diffusion",), "sigma": ("boundary", STABLE)} | {
    name: (STABLE,) for name in ("pipeline", "steps", "size")
}


@click.command("outliers")
@click.argument("images", nargs=-1, required=True)
@model_option
@weights_option
@click.option("-n", "count", type=click.IntRange(1), default=1000, show_default=True, help="Outliers in all.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="outliers.safetensors",
    show_default=True,
    help="File for the outliers.",
)
@click.option(
    "--method",
    type=click.Choice(["diffusion", "boundary", STABLE]),
    default="diffusion",
    show_default=True,
    help="Away from what the model's denoisers expect, noise around rare images (NPOS), or that and what Stable "
    "Diffusion makes of it.",
)
@click.option("--pipeline", metavar="FOLDER|ORG/NAME", help=f"Stable Diffusion 1.x or 2.x [{PIPELINE}].")
@click.option("--steps", type=click.IntRange(1), help="Its denoising steps [50].")
@click.option("--size", type=click.IntRange(8), help="Its pictures, in pixels to a side [what it was trained for].")
@click.option("--one-class", is_flag=True, help="Folders are not classes: take all images as one.")
@click.option(
    "--k",
    type=click.IntRange(1),
    help="Which neighbour's distance tells which images are rare [60 % of its class, <= 300].",
)
@click.option("--strength", type=float, help="Method diffusion: how far to push [0.5].")
@click.option("--sigma", type=float, help="Method boundary: deviation of the noise [as far as neighbour k].")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of everything that is random.")
@click.option(
    "--picture", type=click.Path(path_type=Path, dir_okay=False), help="File for the picture [like -o, with .png]."
)
@click.option("--force", is_flag=True, help="Replace files that are already there.")
@runtime_options
def command(
    images: tuple[str, ...],
    model: str,
    count: int,
    output: Path,
    method: str,
    one_class: bool,
    picture: Path | None,
    force: bool,
    seed: int,
    quiet: bool,
    **options: Any,
) -> int:
    """Make synthetic outliers just beyond IMAGES, in the feature space of a model, and a picture of both.

    IMAGES are ordinary ones: folders or archives, in which each folder below is a class; without such folders, all are
    one class. The outliers are rows of features with labels, in one safetensors file. Started from images that the
    model was trained on, outliers are flagged less often than from others.

    \b
    Example: featdiff outliers photos/ -n 1000 -o outliers.safetensors
    """
    from featdiff.files.cache import default_cache
    from featdiff.outliers.stable_diffusion import with_latents
    from featdiff.outliers.synthesis import feature_detector, synthesise
    from featdiff.report.figures import save_projection
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    picture = picture or output.with_suffix(".png")
    _check_files(output, picture, force)
    settings = {name: options[name] for name in (*_METHODS_OF, "k") if options[name] is not None}
    _check_method(method, settings)
    chosen = {name: settings[name] for name in ("k", "strength", "sigma") if name in settings}

    detector = feature_detector(load_model(model, options).detector)
    labelled = False if one_class else None
    stable = latents = None
    if method == STABLE:  # problems are found before the images are read
        stable = _stable_diffusion(detector, images, labelled, options["device"] or "auto", settings)
        latents = stable.store(Path(options["cache"] or default_cache()))

    try:
        with Bars(quiet) as bars:
            synthesis = synthesise(
                detector,
                list(images),
                count,
                "boundary" if stable else method,
                labelled=labelled,
                seed=seed,
                progress=bars,
                **chosen,
            )
            outliers = synthesis.outliers
            if stable:
                outliers = with_latents(outliers, stable, seed, bars, latents)
    except KeyboardInterrupt:
        kept = "features and latents" if stable else "features"
        raise Stopped(f"interrupted; {kept} are kept, the same command goes on") from None

    outliers.save(output)
    points, share = synthesis.projection()
    save_projection(picture, points, share, f"{method}, {len(outliers):,} outliers")

    _summary(synthesis, detector.fpr, output, picture, quiet)
    list_unreadable(detector.unreadable_, quiet)
    return EXIT_UNREADABLE if detector.unreadable_ else 0


def _check_files(output: Path, picture: Path, force: bool) -> None:
    """Check before the long work that both files can be written."""
    from featdiff.exceptions import UsageError

    if picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--picture {picture}: the file must end in .png, .svg or .pdf")
    if picture == output:
        raise UsageError(f"-o {output}: outliers go to another file than the picture; .safetensors is usual")
    if output.suffix.lower() not in ("", ".safetensors"):
        raise UsageError(f"-o {output}: the file must end in .safetensors, which is what it will be")
    for file in (output, picture):
        if not file.parent.is_dir():
            raise UsageError(f"no folder {file.parent} for {file.name}")
        if file.exists() and not force:
            raise UsageError(f"{file} is already there: add --force to replace it, or choose another file")


def _check_method(method: str, settings: dict[str, Any]) -> None:
    """Refuse settings of other methods."""
    from featdiff.exceptions import UsageError

    for name, methods in _METHODS_OF.items():
        if name in settings and method not in methods:
            raise UsageError(f"--{name} belongs to --method {methods[0]}")


def _stable_diffusion(
    detector: Detector, images: tuple[str, ...], labelled: bool | None, device: str, settings: dict[str, Any]
) -> StableDiffusion:
    """The pipeline, once it is clear that it takes the detector's features and the names of the classes."""
    from featdiff.outliers.stable_diffusion import StableDiffusion, pre_logits_in
    from featdiff.outliers.synthesis import with_classes

    pre_logits = pre_logits_in(detector.extractor_.layout)
    _, _, classes = with_classes(list(images), labelled)

    sampling = {name: settings[name] for name in ("steps", "size") if name in settings}
    stable = StableDiffusion(settings.get("pipeline", PIPELINE), device=device, **sampling)
    stable.check_width(pre_logits.width)
    stable.check_words(classes)
    return stable


def _summary(synthesis: Synthesis, fpr: float, output: Path, picture: Path, quiet: bool) -> None:
    """Median distances and flagged shares, one line for each kind of features, and where the results are."""
    say(f"{'':<11} distance  flagged at fpr {fpr:g}", quiet)
    for name, distance in synthesis.distances.items():
        say(f"{name:<11} {distance:8.3f}  {synthesis.flagged[name]:.1%}", quiet)
    say("distance: median to the nearest in-domain image", quiet)

    n = len(synthesis.outliers)
    classes = len(synthesis.outliers.classes)
    say(f"{n:,} outliers of {classes:,} class{'es' if classes > 1 else ''}: {output}", quiet)
    say(f"picture: {picture}", quiet)
