"""What ``featdiff score`` scores: images, rows of a file of vectors; by a saved model or an exported one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .exported import open_exported
from .options import load_model
from .progress import Bars
from .rates import Rate
from .report import Source, source_of_images, source_of_vectors
from .sources import Named
from .vectors import open_vectors, score_vectors

if TYPE_CHECKING:
    import numpy as np

    from featdiff import Scores
    from featdiff.data.references import ImageRef
    from featdiff.detectors import ImageDetector


@dataclass
class Work:
    """What is scored.

    ``total``: how many rows, or ``UNKNOWN``; ``names``: of the first so many; ``score``: the parts of the rows from a
    number on, as they come; ``columns``: of the rows; ``what``: what a row is called; ``made_with``: what decides the
    rows, by a name for people; ``source``: what a report shows beside the rows; ``groups``: held-out images behind the
    p-values, or groups of them; ``excluded``: training images are not compared with themselves; ``refs``: the images,
    if there are any; ``explained``: the model can explain its scores.
    """

    total: int
    names: Callable[[int], Iterator[str]]
    score: Callable[[int], Iterator[Scores]]
    columns: Sequence[str]
    fpr: float
    what: str
    made_with: dict[str, Any]
    source: Source
    groups: int
    draw: Callable[[list[np.ndarray]], None] | None = None
    excluded: bool = False
    refs: Sequence[ImageRef] = ()
    explained: bool = False


def work_on_vectors(
    file: str, images: tuple[str, ...], model: str, asked: Rate, options: dict[str, Any], bars: Bars
) -> Work:
    """The rows of a file of vectors."""
    from featdiff.verdicts.results import columns_of

    estimator, arrays = open_vectors(file, images, model, options)
    rate = asked.supported_by(estimator.calibration_, estimator.fpr_)
    status = os.stat(file)

    return Work(
        len(arrays),
        lambda count: map(arrays.name, range(count)),
        lambda start: score_vectors(estimator, arrays, rate, bars, start),
        columns_of(estimator.layers_),
        rate,
        "rows",
        {f"content of {file}": [status.st_size, status.st_mtime_ns]},
        source_of_vectors(estimator, file, model),
        estimator.calibration_.groups,
    )


def work_on_images(
    images: Named,
    model: str,
    asked: Rate,
    options: dict[str, Any],
    figure: Path | None,
    bars: Bars,
    exclude_known: bool,
) -> Work:
    """Images, by a saved model; they are looked for when the model and the rate are fine."""
    from featdiff.detectors import PixelDetector
    from featdiff.verdicts.results import columns_of

    images.check()
    detector = load_model(model, options).detector
    rate = asked.supported_by(detector.calibration_, detector.fpr)
    images.find()
    refs = images.refs

    return Work(
        images.total,
        images.names,
        lambda start: images.scored(
            lambda refs, progress: detector.iter_scores(refs, rate, progress, exclude_known), start, bars
        ),
        columns_of(detector.layers, (), detector.parts),
        rate,
        "images",
        {
            "exclude-known": exclude_known,
            "max-pixels": detector.settings.max_pixels,
            "max-bytes": detector.settings.max_bytes,
        },
        source_of_images(detector, refs, model, rate),
        detector.calibration_.groups,
        _figure(detector, refs, figure) if figure else None,
        exclude_known,
        refs,
        not isinstance(detector, PixelDetector) and not images.stream,
    )


def work_of_exported(images: Named, model: str, asked: Rate, options: dict[str, Any], bars: Bars) -> Work:
    """The same for an exported model, without PyTorch."""
    from featdiff.verdicts.results import columns_of

    images.check()
    detector = open_exported(model, options)
    rate = asked.supported_by(detector.calibration_, detector.fpr)
    images.find()

    return Work(
        images.total,
        images.names,
        lambda start: images.scored(lambda refs, progress: detector.iter_scores(refs, rate, progress), start, bars),
        columns_of(detector.layers, (), detector.parts),
        rate,
        "images",
        {"max-pixels": detector.max_pixels, "max-bytes": detector.max_bytes},
        Source(detector.calibration_),
        detector.calibration_.groups,
        refs=images.refs,
    )


def _figure(detector: ImageDetector, refs: Sequence[ImageRef], file: Path) -> Callable[[list[np.ndarray]], None]:
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
