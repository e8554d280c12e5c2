"""``featdiff eval``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE
from .options import MODEL_FOLDER, groups_option, load_model, runtime_options, weights_option
from .progress import Bars, list_unreadable
from .speech import say

if TYPE_CHECKING:
    from featdiff import Detector


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
@click.option("--baselines", is_flag=True, help="Print kNN, Mahalanobis and PCA residual on the same features, too.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
@runtime_options
def command(
    in_domain: tuple[str, ...],
    ood: tuple[str, ...],
    models: tuple[str, ...],
    protocol: str,
    groups: str | None,
    baselines: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Measure how well a model separates in-domain test images from OOD sets.

    Prints AUROC with a 95 % bootstrap interval, FPR at 95 % TPR (in-domain is positive), and AUPR, for the default
    score (featdiff) and for every other head. With --groups, the interval resamples whole groups. With --baselines,
    classic methods are fitted on the training images, whose features are read from the cache. For a hardened student,
    the heads include the energy of its logits, and its accuracy is printed where the in-domain images lie in folders
    of its classes.

    \b
    Example: featdiff eval --id photos_test/ --ood signs=gtsrb/ --ood textures=dtd.zip
    """
    from featdiff.evaluation.baselines import fit_baselines
    from featdiff.evaluation.protocols import PROTOCOLS, evaluate_detector
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    sets = _ood_sets(ood)
    protocols = PROTOCOLS if protocol == "both" else (protocol,)
    loaded = [load_model(model, options) for model in models]  # before the long work: one may be missing

    unreadable: dict[str, str] = {}
    results: list[dict[str, Any]] = []
    for detector, guard, classes in loaded:
        with Bars(quiet) as bars:
            fitted = fit_baselines(detector) if baselines else None
            result = evaluate_detector(detector, list(in_domain), sets, protocols, bars, unreadable, fitted, groups)
            if guard is not None:
                result["accuracy"] = _accuracy(guard.detector, list(in_domain), classes, bars, quiet)
        results.append(result)

    _print(models, results, as_json)
    list_unreadable(list(unreadable.items()), quiet)
    return EXIT_UNREADABLE if unreadable else 0


def _print(models: tuple[str, ...], results: list[dict[str, Any]], as_json: bool) -> None:
    """JSON or tables; with several models, each result names its folder."""
    if len(models) > 1:
        results = [{"folder": model} | result for model, result in zip(models, results, strict=True)]

    if as_json:
        click.echo(json.dumps(results if len(models) > 1 else results[0], indent=2))
    else:
        for result in results:
            print_table(result)


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


def print_table(result: dict[str, Any]) -> None:
    """Percentages, one line per head, on standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from featdiff.files.text import for_terminal

    title = f"in-domain: {result['id']}   backbone: {result['model']}   (percent; featdiff is the default score)"
    if "folder" in result:
        title = f"{result['folder']}   {title}"
    if result.get("accuracy") is not None:
        title += f"   accuracy: {100 * result['accuracy']:.1f}"

    table = Table(title=escape(for_terminal(title)))
    for column in ("OOD set", "protocol", "head"):
        table.add_column(column)
    for column in ("AUROC", "95 % interval", "FPR95", "AUPR-in", "AUPR-out"):
        table.add_column(column, justify="right")

    for pair in result["pairs"]:
        names = [f"{pair['ood']} ({pair['n_ood']:,})", pair["protocol"]]
        for head, metrics in pair["heads"].items():
            table.add_row(*(escape(for_terminal(name)) for name in (*names, head)), *_cells(metrics))
            names = ["", ""]  # only the first line of a pair names it
        table.add_section()

    Console(width=None if Console().is_terminal else 120).print(table)


def _cells(metrics: dict[str, Any]) -> list[str]:
    """Metrics of a head in percent."""
    low, high = metrics["auroc_ci"]
    cells = [f"{100 * metrics['auroc']:.1f}", f"{100 * low:.1f} - {100 * high:.1f}"]
    for key in ("fpr95", "aupr_in", "aupr_out"):
        cells.append(f"{100 * metrics[key]:.1f}")
    return cells
