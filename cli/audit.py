"""``featdiff audit``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE, Stopped
from .options import backbone_options, detector_arguments, groups_option, output_options, runtime_options
from .output import choose_format, write_rows
from .progress import Bars, list_unreadable
from .report import check_report, report_images_option, report_option, source_of_audit, write_report
from .speech import say

if TYPE_CHECKING:
    from featdiff import Scores
    from featdiff.data.references import ImageRef

# Rows on a terminal, and groups that are listed, unless more are asked for.
_SHOWN = 20
_LISTED = 10


@click.command("audit")
@click.argument("images", nargs=-1, required=True)
@groups_option("auto")
@click.option("--top", type=click.IntRange(1), metavar="N", help="Only the N oddest [20 on a terminal, else all].")
@click.option("--fpr", type=float, default=0.05, show_default=True, help="Share of the images that is marked.")
@report_option
@report_images_option
@output_options
@backbone_options
@runtime_options
def command(
    images: tuple[str, ...],
    groups: str | None,
    top: int | None,
    fpr: float,
    report: Path | None,
    report_images: int | None,
    format_: str | None,
    output: Path | None,
    raw_csv: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Find the odd ones among IMAGES: files, folders, globs, zip or tar archives, or - for paths on stdin.

    Needs no model and no training: each image is compared with the others, near-copies of itself left out. The oddest
    come first. Beside the columns of score there are group (near-copies have one number), nearest (the nearest image
    outside the group) and duplicate_of.

    The p-value is a rank among these images, so that about the share --fpr is always marked. An ood_score above 3
    is rare among ordinary images: such an image stands apart.

    \b
    Example: featdiff audit photos/
    Example: featdiff audit photos/ --top 50 -o odd.csv
    Example: featdiff audit photos/ --report odd.html
    """
    from featdiff.data.references import list_images
    from featdiff.detectors.audit import audit
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    chosen = choose_format(output, format_)
    arguments = detector_arguments(options)
    check_report(report, report_images)
    refs = list_images(list(images))
    try:
        with Bars(quiet) as bars:
            scores = audit(refs, groups=groups or "auto", fpr=fpr, progress=bars, **arguments)
    except KeyboardInterrupt:
        raise Stopped("interrupted; features are kept, the same command goes on from there") from None

    if top is None and chosen == "table" and output is None and sys.stdout.isatty():
        top = _SHOWN
    write_rows(output, chosen, scores.sorted()[:top], raw_csv)
    code = _summary(scores, bars, fpr, quiet)
    if report:
        _report(report, report_images, scores, refs, fpr, options, bars, quiet)
    return code


def _report(
    file: Path,
    pictures: int | None,
    scores: Scores,
    refs: list[ImageRef],
    fpr: float,
    options: dict[str, Any],
    bars: Bars,
    quiet: bool,
) -> None:
    from featdiff.detectors.audit import STANDS_APART
    from featdiff.features.weights import DEFAULT_BACKBONE
    from featdiff.report.rows import ReportRows

    rows = ReportRows()
    rows.add(scores)
    facts = {
        "Stand apart": f"{int((scores.ood_score > STANDS_APART).sum()):,}, with a score above {STANDS_APART:g}",
        "Backbone": options["backbone"] or DEFAULT_BACKBONE,
    }
    source = source_of_audit(refs, facts, options)
    write_report(file, rows, fpr, source, pictures, sum(bars.seconds.values()), quiet)


def _summary(scores: Scores, bars: Bars, fpr: float, quiet: bool) -> int:
    """What was found, on standard error; returns the exit code."""
    from featdiff.detectors.audit import STANDS_APART
    from featdiff.exceptions import some_of
    from featdiff.verdicts.results import UNREADABLE

    unreadable = [(row.path, row.reason) for row in scores if row.status == UNREADABLE]
    apart = int((scores.ood_score > STANDS_APART).sum())
    seconds = sum(bars.seconds.values())
    bad = f", {len(unreadable):,} unreadable" if unreadable else ""
    say(f"{len(scores):,} images{bad}; {seconds:.0f} s ({bars.rate('features'):,.0f} images/s)", quiet)
    say(
        f"{int(scores.is_ood.sum()):,} marked as OOD: the oddest {100 * fpr:.3g} % of them, so there are always some",
        quiet,
    )
    say(f"{apart:,} stand apart, with an ood_score above {STANDS_APART:g}", quiet)

    groups = _near_copies(scores)
    if groups:
        count = sum(map(len, groups.values()))
        lines = [f"group {name}: {some_of(paths)}" for name, paths in groups.items()]
        _list(f"{count:,} near-copies in {len(groups):,} group{'' if len(groups) == 1 else 's'}", lines, quiet)

    copies = [row for row in scores if row.extra["duplicate_of"]]
    if copies:
        lines = [f"{row.path} has the content of {row.extra['duplicate_of']}" for row in copies]
        _list(f"{len(copies):,} duplicate{'' if len(copies) == 1 else 's'}", lines, quiet)

    list_unreadable(unreadable, quiet)
    return EXIT_UNREADABLE if unreadable else 0


def _near_copies(scores: Scores) -> dict[str, list[str]]:
    """Different images of each group that has several, by its name."""
    groups: dict[str, list[str]] = {}
    for row in scores:
        if row.extra["group"] and not row.extra["duplicate_of"]:
            groups.setdefault(row.extra["group"], []).append(row.path)
    return {name: paths for name, paths in groups.items() if len(paths) > 1}


def _list(title: str, lines: list[str], quiet: bool) -> None:
    """A title and the first lines below it."""
    say(title, quiet)
    for line in lines[:_LISTED]:
        say(f"  {line}", quiet)
    if len(lines) > _LISTED:
        say(f"  ... and {len(lines) - _LISTED:,} more", quiet)
