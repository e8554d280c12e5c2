"""``featdiff eval``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE
from .options import MODEL_FOLDER, groups_option, load_model, runtime_options, weights_option
from .progress import Bars, list_unreadable, saying
from .report import check_report, report_option, write_evaluation
from .speech import say
from .tables import print_evaluation

if TYPE_CHECKING:
    from featdiff import Detector
    from featdiff.detectors import ImageDetector
    from featdiff.evaluation.baselines import Baselines
    from featdiff.evaluation.protocols import ScoredPair


@click.command("eval")
@click.option(
    "--id",
    "in_domain",
    multiple=True,
    required=True,
    metavar="IMAGES",
    help="In-domain test images, not used for training.",
)
@click.option(
    "--ood",
    multiple=True,
    required=True,
    metavar="NAME=IMAGES",
    help="An out-of-distribution set; repeat for more.",
)
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    default=[MODEL_FOLDER],
    show_default=True,
    metavar="DIR",
    help="Folder of a saved model or of a hardened student, or org/name; repeat to compare.",
)
@weights_option
@click.option(
    "--protocol",
    type=click.Choice(["matched", "as-published", "both"]),
    default="both",
    show_default=True,
    help="matched: bring both sets to the smaller resolution first; as-published: straight to the model's size.",
)
@groups_option("none")
@click.option(
    "--baselines/--no-baselines",
    default=None,
    help="Whether to measure kNN, Mahalanobis and PCA residual on the same features, too [yes, if the cache still has "
    "the features of the training images; with --json: no].",
)
@click.option("--all", "all_heads", is_flag=True, help="Print every score, not only featdiff and the best baseline.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
@click.option(
    "--plots",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for ROC curves, histograms and contributions to the score, as SVG and PNG.",
)
@report_option
@runtime_options
def command(
    in_domain: tuple[str, ...],
    ood: tuple[str, ...],
    models: tuple[str, ...],
    protocol: str,
    groups: str | None,
    baselines: bool | None,
    all_heads: bool,
    as_json: bool,
    plots: Path | None,
    report: Path | None,
    quiet: bool,
    **options: Any,
) -> int:
    """Measure how well a model separates in-domain test images from OOD sets.

    Prints a verdict in words: how many OOD images are found, how many in-domain images are flagged, and how featdiff
    stands to the best baseline. Then a table of AUROC with a 95 % bootstrap interval, FPR at 95 % TPR (in-domain is
    positive), and AUPR; --all and --json have every score. With --groups, the interval resamples whole groups. For a
    hardened student, the scores include the energy of its logits, and its accuracy is printed where the in-domain
    images lie in folders of its classes.

    \b
    Example: featdiff eval --id photos_test/ --ood signs=gtsrb/ --ood textures=dtd.zip
    Example: featdiff eval --id photos_test/ --ood signs=gtsrb/ --plots figures/
    Example: featdiff eval --id photos_test/ --ood signs=gtsrb/ --report evaluation.html
    """
    from featdiff.evaluation.protocols import PROTOCOLS, evaluate_detector
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    check_report(report)
    sets = _ood_sets(ood)
    if plots:
        from featdiff.report.plots import check_folder

        check_folder(plots)
    protocols = PROTOCOLS if protocol == "both" else (protocol,)
    loaded = [load_model(model, options) for model in models]  # before the long work: one may be missing

    unreadable: dict[str, str] = {}
    results: list[dict[str, Any]] = []
    pairs: list[list[ScoredPair]] = []
    seconds = 0.0
    for detector, guard, classes in loaded:
        scored: list[ScoredPair] = []
        pairs.append(scored)
        with Bars(quiet) as bars:
            fitted = _baselines(detector, baselines, as_json, quiet)
            result = evaluate_detector(
                detector, list(in_domain), sets, protocols, bars, unreadable, fitted, groups, scored
            )
            if guard is not None:
                result["accuracy"] = _accuracy(guard.detector, list(in_domain), classes, bars, quiet)
        results.append(result)
        seconds += sum(bars.seconds.values())

    if len(models) > 1:
        results = [{"folder": model} | result for model, result in zip(models, results, strict=True)]
    if as_json:
        click.echo(json.dumps(results if len(models) > 1 else results[0], indent=2))
    else:
        for (detector, *_), result, scored in zip(loaded, results, pairs, strict=True):
            print_result(detector, result, scored, all_heads)
    if plots:
        _draw(plots, models, [detector for detector, *_ in loaded], results, pairs, quiet)
    if report:
        detectors = [detector for detector, *_ in loaded]
        write_evaluation(report, models, detectors, results, pairs, unreadable, options, seconds, quiet)
    list_unreadable(list(unreadable.items()), quiet)
    return EXIT_UNREADABLE if unreadable else 0


def print_result(
    detector: ImageDetector, result: dict[str, Any], scored: Sequence[ScoredPair], all_heads: bool
) -> None:
    """The verdict in words, and the table."""
    flagged = [(int(pair.id_flags.sum()), int(pair.ood_flags.sum())) for pair in scored]
    print_evaluation(result, flagged, detector.calibration_, detector.fpr, all_heads)


def _draw(
    folder: Path,
    models: Sequence[str],
    detectors: Sequence[ImageDetector],
    results: Sequence[dict[str, Any]],
    pairs: Sequence[Sequence[ScoredPair]],
    quiet: bool,
) -> None:
    """Pictures of all results; with several models, the names of the files begin with the model's."""
    from featdiff.report.evaluations import Evaluated
    from featdiff.report.plots import save_evaluations

    drawn: dict[str, Evaluated] = {}
    for i, (detector, result, scored) in enumerate(zip(detectors, results, pairs, strict=True)):
        name = re.sub(r"[^\w.-]+", "_", Path(models[i]).name)
        beginning = f"{i + 1}-{name}-" if len(models) > 1 else ""
        drawn[beginning] = Evaluated(result, scored, detector.calibration_, detector.fpr)

    with saying("drawing", quiet):
        files = save_evaluations(folder, drawn)
    say(f"written: {len(files)} pictures in {folder}", quiet)


def _baselines(detector: ImageDetector, wanted: bool | None, as_json: bool, quiet: bool) -> Baselines | None:
    """The fitted baselines; unless they are asked for, only where the cache has what they need."""
    from featdiff.evaluation.baselines import fit_baselines
    from featdiff.exceptions import UsageError

    if wanted is False or (wanted is None and as_json):
        return None
    try:
        return fit_baselines(detector)
    except UsageError as error:
        if wanted:
            raise
        say(f"no baselines: {error}", quiet)
        return None


def _accuracy(
    detector: Detector, in_domain: list[str], classes: tuple[str, ...], bars: Bars, quiet: bool
) -> float | None:
    """Accuracy of a classifier on images in folders of its classes; None if there are no such folders."""
    from featdiff.evaluation.protocols import measure_accuracy
    from featdiff.exceptions import UsageError

    try:
        return measure_accuracy(detector, in_domain, classes, bars)
    except UsageError as error:  # the other results are kept
        say(f"no accuracy: {error}", quiet)
        return None


def _ood_sets(items: tuple[str, ...]) -> dict[str, str]:
    """``NAME=IMAGES`` of each ``--ood`` -> images by name."""
    sets: dict[str, str] = {}
    for item in items:
        name, _, source = item.partition("=")
        if not name or not source:
            raise click.UsageError(f"--ood takes NAME=IMAGES, not {item!r}")
        if name in sets:
            raise click.UsageError(f"--ood names {name!r} twice")
        sets[name] = source
    return sets
