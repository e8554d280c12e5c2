"""``featdiff demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import runtime_arguments, runtime_options
from .output import write_rows
from .progress import Bars
from .speech import say

if TYPE_CHECKING:
    from featdiff import Detector, Scores

# Rows of the audit that are shown.
_TOP = 10
# One split in place of five folds, which would train six times.
_CALIBRATION = 0.2


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="featdiff-demo",
    show_default=True,
    help="Folder for the results.",
)
@click.option("--all", "all_heads", is_flag=True, help="Print every score, not only featdiff and the best baseline.")
@runtime_options
def command(output: Path, all_heads: bool, quiet: bool, **options: Any) -> None:
    """Audit, train, score and evaluate on built-in images; under two minutes on two cores, no download.

    First question: which images of one folder are odd? The folder holds handwritten digits, and a few tiles of two
    photographs among them. Second question: is a new image like those before? Tiles train a model, other tiles and
    digits are scored. Writes the images, the model, scores.csv and histograms.png.

    \b
    Example: featdiff demo -o try-out
    """
    from featdiff.data import samples
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    arguments = runtime_arguments(options)
    mixed = samples.write_images(samples.mixed(), output / "mixed")
    folders = samples.write(output / "images")
    _audit(mixed, arguments, quiet)
    _train_and_score(output, folders, arguments, all_heads, quiet)

    say(f"written to {output}: mixed/, images/, model/, scores.csv, histograms.png", quiet)
    say(f"Next: featdiff score {output}/images/digits -m {output}/model", quiet)


def _audit(mixed: Path, arguments: dict[str, Any], quiet: bool) -> None:
    """The oddest images of a folder, as ``featdiff audit`` prints them."""
    from featdiff.detectors.audit import STANDS_APART, audit

    say(f"1. Which images are odd? {mixed} has 120 digits and 8 photo tiles.", quiet)
    say(f"$ featdiff audit {mixed} --top {_TOP}", quiet)
    with Bars(quiet) as bars:
        scores = audit(mixed, progress=bars, **arguments)

    apart = int((scores.ood_score > STANDS_APART).sum())
    say(f"{apart} of {len(scores)} images stand apart (score above {STANDS_APART:g}). The {_TOP} oddest:", quiet)
    write_rows(None, "table", scores.sorted()[:_TOP])
    say("", quiet)


def _train_and_score(
    output: Path, folders: dict[str, Path], arguments: dict[str, Any], all_heads: bool, quiet: bool
) -> None:
    """A model of the tiles, and what it makes of other tiles and of digits."""
    from featdiff import Detector
    from featdiff.evaluation.baselines import fit_baselines
    from featdiff.evaluation.protocols import ScoredPair, evaluate_detector

    from .evaluate import print_result

    say("2. Is a new image like those before? A model learns tiles and meets digits.", quiet)
    detector = Detector(calibration=_CALIBRATION, **arguments)
    with Bars(quiet) as bars:
        detector.fit(folders["train"], bars)
        detector.save_pretrained(output / "model")
        scores = {name: detector.score(folders[name], progress=bars) for name in ("test", "digits")}
        scored: list[ScoredPair] = []
        result = evaluate_detector(
            detector,
            folders["test"],
            {"digits": folders["digits"]},
            ["matched"],
            bars,
            baselines=fit_baselines(detector),
            scored=scored,
        )
    _write(output, detector, scores)
    print_result(detector, result, scored, all_heads)


def _write(output: Path, detector: Detector, scores: dict[str, Scores]) -> None:
    """All rows as CSV, and a picture of the scores."""
    from featdiff import Scores
    from featdiff.report.figures import save_histograms

    write_rows(output / "scores.csv", "csv", Scores.concatenate(scores.values()))
    save_histograms(
        output / "histograms.png",
        {f"{name} tiles" if name == "test" else name: part.ood_score for name, part in scores.items()},
        detector.calibration_.threshold(detector.fpr),
        detector.fpr,
        "featdiff demo: tiles of two photographs against handwritten digits",
    )
