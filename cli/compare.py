"""``featdiff compare``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .exported import open_exported
from .main import EXIT_UNREADABLE
from .options import file_option, groups_option, load_model, runtime_options
from .output import ROWS, choose_format
from .progress import Bars, list_unreadable
from .report import check_report, report_option, write_comparison
from .speech import say, show
from .tables import output_width, print_grid, print_text

if TYPE_CHECKING:
    from featdiff.evaluation.comparison import ComparedSet, Comparison, Scorer

_WIDTH = 120
# Changed verdicts of each kind that are named.
_NAMED = 5
# Endings of files of rows; a table for people has no columns for two models.
_ENDINGS = {ending: format_ for ending, format_ in ROWS.items() if format_ != "table"}


@click.command("compare")
@click.argument("model_a")
@click.argument("model_b")
@click.option(
    "--id",
    "in_domain",
    multiple=True,
    required=True,
    metavar="IMAGES",
    help="In-domain images that neither was trained on.",
)
@click.option(
    "--ood", multiple=True, metavar="[NAME=]IMAGES", help="An out-of-distribution set; repeat for more. [none]"
)
@click.option("--fpr", type=float, help="False-alarm rate of both [each has its own].")
@groups_option("none")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
@file_option("Rows of all images by both models: .csv, .jsonl or .parquet.")
@report_option
@runtime_options
def command(
    model_a: str,
    model_b: str,
    in_domain: tuple[str, ...],
    ood: tuple[str, ...],
    fpr: float | None,
    groups: str | None,
    as_json: bool,
    output: Path | None,
    report: Path | None,
    quiet: bool,
    **options: Any,
) -> int:
    """Compare MODEL_A and MODEL_B on the same images: what would change from A to B?

    For each OOD set the difference of AUROC with a 95 % interval for paired scores (DeLong), that of FPR95, what each
    finds, and which verdicts changed. Where an interval holds 0, no difference is shown. Without --ood, false alarms
    and verdicts are compared. The models may have other backbones or modes; exported ones are read, too.

    \b
    Example: featdiff compare my-model new-model --id test/ --ood signs=gtsrb/
    Example: featdiff compare my-model new-model --id test/ --report compared.html
    """
    from featdiff.evaluation.comparison import compare_models
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    check_report(report)
    format_ = choose_format(output, None, _ENDINGS) if output else ""
    sets = _ood_sets(ood)
    names = (model_a, model_b)
    first, second = (_open(name, options) for name in names)
    with Bars(quiet) as bars:
        compared = compare_models(
            first, second, list(in_domain), sets, fpr=fpr, groups=groups, names=names, progress=bars
        )

    _warn_of_known(compared, quiet)
    if as_json:
        click.echo(json.dumps(compared.result, indent=2))
    else:
        _print(compared)
    if output:
        _write_rows(output, format_, compared.sets)
    if report:
        write_comparison(report, compared, options, sum(bars.seconds.values()), quiet)
    left_out = compared.result["left_out"]
    list_unreadable(list(left_out.items()), quiet, what="left out for both: ")
    return EXIT_UNREADABLE if left_out else 0


def _open(name: str, options: dict[str, Any]) -> Scorer:
    """A saved or an exported model."""
    from featdiff.exported.layout import is_exported

    if is_exported(name):
        return open_exported(name, {**options, "cache": None, "report": None})
    return load_model(name, {**options, "weights": None}).detector


def _ood_sets(items: tuple[str, ...]) -> dict[str, str]:
    """``IMAGES`` or ``NAME=IMAGES`` of each ``--ood`` -> images by name; a path may hold an equals sign, too."""
    from featdiff.evaluation.comparison import IN_DOMAIN

    sets: dict[str, str] = {}
    for item in items:
        name, equals, source = item.partition("=")
        if not equals or "/" in name:
            name, source = Path(item).name or item, item
        if not name or not source:
            raise click.UsageError(f"--ood takes IMAGES or NAME=IMAGES, not {item!r}")
        if name in sets or name == IN_DOMAIN:
            raise click.UsageError(f"--ood names {name!r} twice: give each set a name of its own, NAME=IMAGES")
        sets[name] = source
    return sets


def _warn_of_known(compared: Comparison, quiet: bool) -> None:
    for letter, model in zip("AB", compared.result["models"], strict=True):
        if model["known"]:
            say(
                f"WARNING: {model['known']:,} of the images were in training of {letter}, to which they look ordinary: "
                "the comparison is not fair",
                quiet,
            )


def _print(compared: Comparison) -> None:
    """What differs in words, the table, and the names of some images whose verdict changed."""
    from featdiff.report.comparisons import EXPLANATION, grid, set_words

    width = output_width(_WIDTH)
    for letter, model in zip("AB", compared.result["models"], strict=True):
        held_out = f"{model['calibration']:,} held-out images"
        print_text(f"{letter}: {model['name']}, flags at {100 * model['fpr']:g} %, {held_out}", width)
    for first, *others in set_words(compared.result):
        print_text(first, width, rest="  ")
        for text in others:
            print_text(text, width, first="  ", rest="  ")

    show("")
    print_grid(grid(compared.result), width)
    for part, images in zip([compared.result["id"], *compared.result["pairs"]], compared.sets, strict=True):
        for letter, key in (("A", "only_a"), ("B", "only_b")):
            _print_changed(f"{images.name}, flagged by {letter} alone", part[key])
    show("")
    print_text(EXPLANATION, width)


def _print_changed(title: str, paths: list[str]) -> None:
    if paths:
        show(f"{title}:")
    for path in paths[:_NAMED]:
        show(f"  {path}")
    if len(paths) > _NAMED:
        show(f"  ... and {len(paths) - _NAMED:,} more: all of them with -o FILE.csv or --json")


def _write_rows(output: Path, format_: str, sets: list[ComparedSet]) -> None:
    from featdiff.files.atomic import write_output
    from featdiff.report.writers import open_writer

    data = io.BytesIO()
    writer = open_writer(format_, data)
    for images in sets:
        rows = list(images.rows())
        writer.write_rows(rows, list(rows[0]), ("set", "changed"))
    writer.close()
    write_output(output, data.getvalue())
