"""``featdiff merge``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_OOD, EXIT_UNREADABLE
from .options import identity, load_model, quiet_option, raw_csv_option, weights_option
from .output import ROWS, choose_format
from .progress import Bars
from .rates import Batch, fdr_option
from .report import Source, check_report, report_images_option, report_option, source_of_images, write_report
from .speech import say
from .summary import Strangest, in_words

if TYPE_CHECKING:
    from featdiff.report.rows import ReportRows
    from featdiff.serving.cluster import Run
    from featdiff.verdicts.counts import Counts


@click.command("merge")
@click.argument("folder", metavar="DIR")
@click.option("--manifest", metavar="FILE", help="The manifest [where it was when scoring began].")
@click.option("-o", "--output", metavar="FILE", help="File or URL for all rows, in the order of the manifest.")
@click.option("--format", "format_", type=click.Choice(["csv", "jsonl", "parquet"]), help="[by the ending of -o]")
@raw_csv_option
@fdr_option
@report_option
@report_images_option
@click.option("-m", "--model", metavar="DIR", help="The model, for --report [where it was when scoring began].")
@weights_option
@click.option("--fail-on-ood", is_flag=True, help="Leave with exit code 4 if any image is flagged.")
@quiet_option
def command(
    folder: str,
    manifest: str | None,
    output: str | None,
    format_: str | None,
    raw_csv: bool,
    fdr: float | None,
    report: Path | None,
    report_images: int | None,
    model: str | None,
    fail_on_ood: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Check that featdiff score --manifest --out DIR has scored every image once, and join its blocks.

    Nothing is scored. If blocks are missing, it says which shards to run again, and writes nothing. --fdr looks at the
    images of all blocks together, as featdiff score --fdr does.

    \b
    Example: featdiff merge scored/
    Example: featdiff merge scored/ -o scores.parquet --report report.html
    """
    from featdiff.report.rows import ReportRows
    from featdiff.serving.merging import open_run
    from featdiff.verdicts.fdr import check_fdr

    endings = {ending: kind for ending, kind in ROWS.items() if kind != "table"}
    chosen = choose_format(Path(output), format_, endings) if output else "csv"
    check_report(report, report_images)
    batch = None if fdr is None else Batch(check_fdr(fdr))
    bars = Bars(quiet)
    run, facts = open_run(folder, manifest)
    model = model or facts["model folder"]
    source = _source(run, model, facts, options) if report else Source()
    reported = ReportRows() if report else None

    _check_whole(run, facts, quiet)
    with bars:
        if batch:
            _collect(run, facts["fpr"], batch, bars)
        counts, strangest = _join(run, facts["fpr"], output, chosen, raw_csv, batch, reported, bars)

    blocks = f"{run.blocks:,} block{'' if run.blocks == 1 else 's'}"
    say(f"{in_words(counts, 'images', facts['fpr'])}; each is there once, in {blocks}", quiet)
    if batch:
        say(batch.in_words(), quiet)
    strangest.say(quiet)
    strangest.say_next(model, quiet)
    if report is not None and reported is not None:
        write_report(report, reported, facts["fpr"], source, report_images, None, quiet)
    if fail_on_ood and (counts.flagged or counts.failed):
        return EXIT_OOD
    return EXIT_UNREADABLE if counts.unreadable or counts.failed else 0


def _check_whole(run: Run, facts: dict[str, Any], quiet: bool) -> None:
    """Refuse a run that lacks blocks (``FeatdiffError``); name files that belong to none."""
    from featdiff.exceptions import FeatdiffError, some_of
    from featdiff.serving.merging import look_at, missing_in_words

    found = look_at(run)
    if found.foreign:
        say(f"WARNING: {run.folder.name} holds files of no block, which are left out: {some_of(found.foreign)}", quiet)
    if found.missing:
        raise FeatdiffError(missing_in_words(run, found.missing, facts))


def _collect(run: Run, fpr: float, batch: Batch, bars: Bars) -> None:
    """Look at the p-values of all rows: which of them are marked is known only then."""
    from featdiff.serving.merging import blocks_of, scores_of

    done = 0
    for table in blocks_of(run):
        batch.add(scores_of(table, fpr))
        done += len(table)
        bars("looking at p-values", done, run.manifest.rows)


def _join(
    run: Run,
    fpr: float,
    output: str | None,
    format_: str,
    raw_csv: bool,
    batch: Batch | None,
    reported: ReportRows | None,
    bars: Bars,
) -> tuple[Counts, Strangest]:
    """Write all rows; a block at a time is in memory."""
    from featdiff.serving.merging import TableWriter, blocks_of, scores_of, with_marks
    from featdiff.serving.places import placing
    from featdiff.verdicts.counts import Counts

    counts = Counts()
    strangest = Strangest()
    largest = batch.largest() if batch else 0.0
    with placing(output) if output else nullcontext() as stream:
        writer = TableWriter(format_, stream, raw_csv) if stream is not None else None
        for table in blocks_of(run):
            part = scores_of(table, fpr)
            counts.add(part)
            strangest.add(part)
            if writer is not None:
                writer.write(with_marks(table, largest) if batch else table)
            if reported is not None:
                reported.add(part)
            bars("merging", counts.rows, run.manifest.rows)
        if writer is not None:
            writer.close()
    return counts, strangest


def _source(run: Run, model: str, facts: dict[str, Any], options: dict[str, Any]) -> Source:
    """What a page says of the run beside its rows (``UsageError`` if this is not the model that scored)."""
    from featdiff.exceptions import UsageError
    from featdiff.exported.layout import is_exported
    from featdiff.serving.manifest import LazyRefs

    if identity(model) != facts["model"]:
        raise UsageError(f"{model} is not the model that scored these images: name it with -m")
    if is_exported(model):
        raise UsageError(f"{model} is an exported model, which explains nothing: a report needs the saved one")
    limits = {"max_pixels": facts["max-pixels"], "max_bytes": facts["max-bytes"]}
    detector = load_model(model, options | limits).detector
    return source_of_images(detector, LazyRefs(run.manifest), model, facts["fpr"])
