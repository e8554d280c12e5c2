"""``featdiff score``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from .main import EXIT_OOD, EXIT_UNREADABLE, Stopped
from .options import load_model, model_option, output_options, runtime_options, weights_option
from .output import guess_format, open_output
from .progress import Bars, say
from .vectors import features_option, open_vectors, score_vectors

if TYPE_CHECKING:
    import numpy as np

    from featdiff import Detector, PixelDetector, Scores
    from featdiff.data.references import ImageRef


@click.command("score")
@click.argument("images", nargs=-1)
@features_option
@model_option
@weights_option
@output_options
@click.option("--fpr", type=float, help="False-alarm rate [the one given at training].")
@click.option(
    "--exclude-known", is_flag=True, help="Do not compare training images with themselves; see also featdiff audit."
)
@click.option(
    "--figure",
    type=click.Path(path_type=Path),
    help="Pixel mode: a picture of the least and the most strange images and their inpaintings.",
)
@click.option("--fail-on-ood", is_flag=True, help="Leave with exit code 4 if any image is flagged.")
@runtime_options
def command(
    images: tuple[str, ...],
    features: str | None,
    model: str,
    format_: str | None,
    output: Path | None,
    fpr: float | None,
    exclude_known: bool,
    figure: Path | None,
    fail_on_ood: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Score IMAGES: files, folders, globs, zip or tar archives, or - for paths on stdin; or the rows of a file of
    vectors, with --features.

    One row each: path, status, reason, ood_score (higher = stranger), p_value, is_ood, and one column per layer.
    is_ood means p_value <= fpr: of images like those trained on, this share is flagged.

    \b
    Example: featdiff score images/ --fpr 0.01 -o scores.csv
    Example: featdiff score --features embeddings.npy -o scores.csv
    """
    from featdiff.exceptions import UsageError
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    bars = Bars(quiet or (output is None and sys.stdout.isatty()))
    if features:
        options |= {"figure": figure, "exclude_known": exclude_known}
        work = _vectors(features, images, model, fpr, options, bars)
    else:
        work = _images(images, model, fpr, options, figure, bars, exclude_known)

    first = next(work.parts, None)
    if first is None:
        raise UsageError("there are no paths on standard input")
    counts = Counts()
    with open_output(output) as stream, bars:
        scores = _write(chain([first], work.parts), guess_format(output, format_), stream, counts, keep=bool(work.draw))
    if work.draw:
        work.draw(scores)

    _summary(counts, work, bars, quiet)
    if fail_on_ood and (counts.flagged or counts.failed):
        return EXIT_OOD
    return EXIT_UNREADABLE if counts.unreadable or counts.failed else 0


@dataclass
class Work:
    """What is scored: parts of the rows, as they come, the false-alarm rate, and what a row is called.

    ``excluded``: training images are not compared with themselves.
    """

    parts: Iterator[Scores]
    fpr: float
    what: str
    draw: Callable[[list[np.ndarray]], None] | None = None
    excluded: bool = False


@dataclass
class Counts:
    """Rows that were written, and how many of them were flagged, could not be read, failed, or are training images."""

    rows: int = 0
    flagged: int = 0
    unreadable: int = 0
    failed: int = 0
    known: int = 0


def _vectors(
    file: str, images: tuple[str, ...], model: str, fpr: float | None, options: dict[str, Any], bars: Bars
) -> Work:
    estimator, arrays = open_vectors(file, images, model, options)
    rate = estimator.fpr_ if fpr is None else fpr
    return Work(score_vectors(estimator, arrays, fpr, bars), rate, "rows")


def _images(
    images: tuple[str, ...],
    model: str,
    fpr: float | None,
    options: dict[str, Any],
    figure: Path | None,
    bars: Bars,
    exclude_known: bool,
) -> Work:
    from featdiff.data.references import list_images

    if not images:
        raise click.UsageError("Missing argument 'IMAGES...', or --features FILE.")
    detector = load_model(model, options).detector
    rate = detector.fpr if fpr is None else fpr
    if figure is None:
        parts = detector.iter_scores(list(images), fpr, bars, exclude_known)
        return Work(parts, rate, "images", excluded=exclude_known)

    refs = list_images(list(images))  # the picture needs them again, and standard input ends
    draw = _figure(detector, refs, figure)
    parts = detector.iter_scores(refs, fpr, bars, exclude_known)
    return Work(parts, rate, "images", draw, exclude_known)


def _write(parts: Iterable[Scores], format_: str, stream: IO[bytes], counts: Counts, keep: bool) -> list[np.ndarray]:
    """Write rows as they come; the scores of all, if they are to be kept."""
    from featdiff.report.writers import open_writer
    from featdiff.verdicts.results import ERROR, UNREADABLE

    kept = []
    writer = open_writer(format_, stream)
    try:
        for part in parts:
            writer.write(part)
            counts.rows += len(part)
            counts.flagged += part.flagged
            counts.unreadable += part.status.count(UNREADABLE)
            counts.failed += part.status.count(ERROR)
            if part.known is not None:
                counts.known += int(part.known.sum())
            if keep:
                kept.append(part.ood_score)
    except KeyboardInterrupt:
        raise Stopped(f"interrupted; {counts.rows:,} rows are written") from None
    finally:
        writer.close()
    return kept


def _summary(counts: Counts, work: Work, bars: Bars, quiet: bool) -> None:
    seconds = bars.seconds.get("scoring", 0.0)
    speed = f"{seconds:.1f} s ({bars.rate('scoring'):,.0f} {work.what}/s)"
    bad = f", {counts.unreadable:,} unreadable" if counts.unreadable else ""
    bad += f", {counts.failed:,} failed" if counts.failed else ""
    say(f"{counts.rows:,} {work.what} in {speed}: {counts.flagged:,} OOD at fpr {work.fpr:g}{bad}", quiet)
    if counts.known and not work.excluded:
        say(f"WARNING: {counts.known:,} of these images were in training, so they look ordinary.", quiet)
        say("featdiff audit finds the odd ones of a training set; --exclude-known leaves out each image itself.", quiet)


def _figure(
    detector: Detector | PixelDetector, refs: Sequence[ImageRef], file: Path
) -> Callable[[list[np.ndarray]], None]:
    """A function of all scores that draws the least and the most strange images; checked before the long work."""
    from featdiff.detectors import PixelDetector
    from featdiff.exceptions import UsageError

    if not isinstance(detector, PixelDetector):
        raise UsageError("--figure shows inpaintings, and this model makes none: train one with --mode pixel")
    if file.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--figure {file}: the file must end in .png, .svg or .pdf")
    if not file.parent.is_dir():
        raise UsageError(f"no folder {file.parent} for {file.name}")
    pixels: PixelDetector = detector

    def draw(scores: list[np.ndarray]) -> None:
        import numpy as np

        from featdiff.detectors.pixel import least_and_most
        from featdiff.report.figures import save_inpaintings

        # inpainted once more: the same noise gives the same picture
        shown = [refs[i] for i in least_and_most(np.concatenate(scores))]
        if shown:
            save_inpaintings(file, *pixels.inpaintings(shown))

    return draw
