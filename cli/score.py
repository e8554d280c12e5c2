"""``featdiff score``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from .main import EXIT_OOD, EXIT_UNREADABLE, Stopped
from .options import load_model, model_option, runtime_options, weights_option
from .progress import Bars, say
from .vectors import features_option, open_vectors, score_vectors

if TYPE_CHECKING:
    import numpy as np

    from featdiff import Detector, PixelDetector
    from featdiff.data.references import ImageRef


@click.command("score")
@click.argument("images", nargs=-1)
@features_option
@model_option
@weights_option
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "csv", "jsonl", "parquet"]),
    help="[by -o; table on a terminal, else csv]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File for the rows [standard output].")
@click.option("--fpr", type=float, help="False-alarm rate [the one given at training].")
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
    from featdiff.data.references import list_images
    from featdiff.exceptions import UsageError
    from featdiff.report.writers import open_writer
    from featdiff.runtime.allocator import keep_freed_memory
    from featdiff.verdicts.results import UNREADABLE

    keep_freed_memory()
    hidden = quiet or (output is None and sys.stdout.isatty())
    bars = Bars(hidden)
    draw: Callable[[list[np.ndarray]], None] | None = None
    if features:
        estimator, arrays = open_vectors(features, images, model, options | {"figure": figure})
        rows = score_vectors(estimator, arrays, fpr, bars)
        rate = estimator.fpr_
        what = "rows"
    else:
        detector = _open_detector(images, model, options)
        refs: object = list(images)
        if figure:
            refs = list_images(refs)  # named once: standard input ends, and the picture needs them again
            draw = _figure(detector, refs, figure)
        rows = detector.iter_scores(refs, fpr, bars)
        rate = detector.fpr
        what = "images"
    first = next(rows, None)
    if first is None:
        raise UsageError("there are no paths on standard input")
    flagged = unreadable = total = 0
    scores = []
    with _open(output) as stream, bars:
        writer = open_writer(format_ or _guess(output), stream)
        try:
            for part in chain([first], rows):
                writer.write(part)
                flagged += int(part.is_ood.sum())
                unreadable += part.status.count(UNREADABLE)
                total += len(part)
                if draw:
                    scores.append(part.ood_score)
        except KeyboardInterrupt:
            raise Stopped(f"interrupted; {total:,} rows are written") from None
        finally:
            writer.close()
    if draw:
        draw(scores)
    rate = rate if fpr is None else fpr
    seconds = bars.seconds.get("scoring", 0.0)
    bad = f", {unreadable:,} unreadable" if unreadable else ""
    speed = f"{seconds:.1f} s ({bars.rate('scoring'):,.0f} {what}/s)"
    say(f"{total:,} {what} in {speed}: {flagged:,} OOD at fpr {rate:g}{bad}", quiet)
    if flagged and fail_on_ood:
        return EXIT_OOD
    return EXIT_UNREADABLE if unreadable else 0


def _open_detector(images: tuple[str, ...], model: str, options: dict[str, Any]) -> Detector | PixelDetector:
    """A saved model of images."""
    if not images:
        raise click.UsageError("Missing argument 'IMAGES...', or --features FILE.")
    return load_model(model, options).detector


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


def _guess(output: Path | None) -> str:
    by_suffix = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv", ".txt": "table"}
    if output is not None:
        return by_suffix.get(output.suffix.lower(), "csv")
    return "table" if sys.stdout.isatty() else "csv"


@contextmanager
def _open(output: Path | None) -> Iterator[IO[bytes]]:
    if output is None:
        yield sys.stdout.buffer
        return
    with output.open("wb") as file:
        yield file
