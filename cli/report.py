"""``--report FILE.html``: what commands give to the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .progress import saying
from .speech import say

if TYPE_CHECKING:
    from PIL import Image

    from featdiff import FeatureDiffusion
    from featdiff.data.references import ImageRef
    from featdiff.detectors import ImageDetector
    from featdiff.evaluation.comparison import Comparison
    from featdiff.evaluation.protocols import ScoredPair
    from featdiff.report.rows import ReportRows
    from featdiff.verdicts.calibration import Calibration
    from featdiff.verdicts.explanation import Explanation

_WRITING = "writing the report"

F = TypeVar("F", bound=Callable[..., Any])


def report_option(function: F) -> F:
    """``--report``: a page that people look at."""
    return click.option(
        "--report",
        type=click.Path(path_type=Path),
        metavar="FILE.html",
        help="Write a page to look at: one HTML file with charts and pictures.",
    )(function)


def report_images_option(function: F) -> F:
    """``--report-images``: how many pictures are in it."""
    return click.option(
        "--report-images",
        type=click.IntRange(0),
        metavar="N",
        help="Pictures in the report, of the strangest images [100, of 1 MB at most].",
    )(function)


def check_report(file: Path | None, images: int | None = None) -> None:
    """Refuse a place where no page can be written (``UsageError``); better before the long work."""
    from featdiff.exceptions import UsageError

    if file is None and images is not None:
        raise UsageError("--report-images says how many pictures --report FILE.html has: give both")
    if file is None:
        return
    if file.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{file}: the name of a report ends in .html", argument="report")
    if file.is_dir():
        raise UsageError(f"{file} is a folder: name a file", argument="report")
    if not file.parent.is_dir():
        raise UsageError(f"no folder {file.parent} for {file.name}", argument="report")


@dataclass
class Source:
    """What a page says of scored images beside their rows, and how it shows them."""

    calibration: Calibration | None = None
    facts: dict[str, str] = field(default_factory=dict)
    pictures: Callable[[list[int]], Iterable[Image.Image | None]] | None = None
    explain: Callable[[list[int]], Iterable[Explanation]] | None = None


def source_of_images(detector: ImageDetector, refs: Sequence[ImageRef], model: str, fpr: float) -> Source:
    """For images that a detector scores."""
    from featdiff.detectors import PixelDetector

    held_out = len(detector.calibration_)
    compared = "all of them" if held_out == detector.n_images_ else f"{held_out:,} of them"
    facts = {
        "Model": model,
        "Backbone": detector.name,
        "Trained on": f"{detector.n_images_:,} normal images; scores are compared with {compared}",
    }
    explain = None
    if not isinstance(detector, PixelDetector):
        looking = detector  # the type is known inside the function below

        def explain(positions: list[int]) -> Iterable[Explanation]:
            return looking.iter_explanations([refs[at] for at in positions], fpr)

    return Source(detector.calibration_, facts, _pictures(refs, _limits(vars(detector.settings))), explain)


def source_of_vectors(estimator: FeatureDiffusion, file: str, model: str) -> Source:
    """For the rows of a file of vectors, which have no pictures."""
    return Source(estimator.calibration_, {"Model": model, "Vectors": file})


def source_of_audit(refs: Sequence[ImageRef], facts: dict[str, str], options: dict[str, Any]) -> Source:
    """For images that were compared with each other; of the command's options, those count that limit reading."""
    return Source(None, facts, _pictures(refs, _limits(options)))


def _limits(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("workers", "max_pixels", "max_bytes") if options.get(name) is not None}


def _pictures(refs: Sequence[ImageRef], limits: dict[str, Any]) -> Callable[[list[int]], Iterable[Image.Image | None]]:
    from featdiff.data.thumbnails import iter_thumbnails
    from featdiff.report.cards import PICTURE_SIDE

    return lambda positions: iter_thumbnails([refs[at] for at in positions], PICTURE_SIDE, **limits)


def write_report(
    file: Path, rows: ReportRows, fpr: float, source: Source, images: int | None, seconds: float | None, quiet: bool
) -> None:
    """Write the page on scored images, and say where it is."""
    from featdiff.report.html import save_report

    duration = {} if seconds is None else {"Duration": f"{seconds:,.1f} s"}
    facts = source.facts | duration | _now()
    with saying(_WRITING, quiet):
        save_report(file, rows, fpr, source.calibration, facts, images, source.pictures, source.explain)
    _say_where(file, quiet)


def write_evaluation(
    file: Path,
    models: Sequence[str],
    detectors: Sequence[ImageDetector],
    results: Sequence[dict[str, Any]],
    pairs: Sequence[list[ScoredPair]],
    unreadable: dict[str, str],
    options: dict[str, Any],
    seconds: float,
    quiet: bool,
) -> None:
    """Write the page on an evaluation, and say where it is."""
    from featdiff.data.thumbnails import iter_thumbnails
    from featdiff.report.cards import PICTURE_SIDE
    from featdiff.report.evaluations import Evaluated
    from featdiff.report.html_evaluation import save_evaluation

    evaluated = []
    for detector, result, scored in zip(detectors, results, pairs, strict=True):
        evaluated.append(Evaluated(result, scored, detector.calibration_, detector.fpr))
    facts = {
        "In-domain": str(results[0]["id"]),
        "Model": ", ".join(models),
        "Backbone": ", ".join(dict.fromkeys(str(result["model"]) for result in results)),
        "False-alarm rate": ", ".join(dict.fromkeys(f"{100 * detector.fpr:g} %" for detector in detectors)),
        "Unreadable": f"{len(unreadable):,}",
        "Duration": f"{seconds:,.1f} s",
    }
    with saying(_WRITING, quiet):
        save_evaluation(
            file,
            evaluated,
            facts | _now(),
            unreadable,
            lambda refs: iter_thumbnails(refs, PICTURE_SIDE, **_limits(options)),
        )
    _say_where(file, quiet)


def write_comparison(file: Path, compared: Comparison, options: dict[str, Any], seconds: float, quiet: bool) -> None:
    """Write the page on a comparison of two models, and say where it is."""
    from featdiff.data.thumbnails import iter_thumbnails
    from featdiff.report.cards import PICTURE_SIDE
    from featdiff.report.html_comparison import save_comparison

    result = compared.result
    facts = {"In-domain": result["id"]["images"], "Left out": f"{len(result['left_out']):,}"}
    facts["Duration"] = f"{seconds:,.1f} s"
    with saying(_WRITING, quiet):
        save_comparison(
            file,
            compared.sets,
            result,
            facts | _now(),
            lambda refs: iter_thumbnails(refs, PICTURE_SIDE, **_limits(options)),
        )
    _say_where(file, quiet)


def _now() -> dict[str, str]:
    return {"Date": datetime.now().strftime("%Y-%m-%d %H:%M"), "featdiff": version("featdiff")}


def _say_where(file: Path, quiet: bool) -> None:
    size = file.stat().st_size
    say(f"report: {file} ({size / 1e6:.1f} MB)" if size >= 1e5 else f"report: {file} ({size / 1e3:.0f} kB)", quiet)
