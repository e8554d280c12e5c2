"""``featdiff score``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .choice import Choice, choice_options
from .flagged import Flagged, flagged_options, open_flagged, undo
from .main import EXIT_OOD, EXIT_UNREADABLE
from .options import identity, model_option, output_options, runtime_options, weights_option
from .output import choose_format, deliver, is_stream
from .progress import Bars
from .rates import Batch, Rate, fdr_option, rate_options
from .report import check_report, report_images_option, report_option, write_report
from .rows import Rows, open_rows
from .shards import check_alone, score_manifest, shard_options
from .signals import Stop, catching_stop
from .sources import UNKNOWN, Named, every_option
from .speech import say
from .summary import FEW, Strangest, in_words, is_seen_as_table
from .vectors import features_option
from .work import Work, work_of_exported, work_on_images, work_on_vectors

if TYPE_CHECKING:
    import numpy as np

    from featdiff import Scores
    from featdiff.report.rows import ReportRows
    from featdiff.verdicts.counts import Counts


@click.command("score")
@click.argument("images", nargs=-1)
@features_option
@model_option
@weights_option
@output_options
@choice_options
@flagged_options
@click.option("--resume", is_flag=True, help="Go on with the rows of -o that an interrupted run has left.")
@every_option
@rate_options
@fdr_option
@click.option(
    "--exclude-known", is_flag=True, help="Do not compare training images with themselves; see also featdiff audit."
)
@click.option(
    "--figure",
    type=click.Path(path_type=Path),
    help="Pixel mode: a picture of the least and the most strange images and their inpaintings.",
)
@report_option
@report_images_option
@shard_options
@click.option("--fail-on-ood", is_flag=True, help="Leave with exit code 4 if any image is flagged.")
@runtime_options
def command(
    images: tuple[str, ...],
    features: str | None,
    model: str,
    format_: str | None,
    output: Path | None,
    raw_csv: bool,
    sort: bool,
    top: int | None,
    only_ood: bool,
    undo_manifest: Path | None,
    resume: bool,
    every: float | None,
    fdr: float | None,
    exclude_known: bool,
    figure: Path | None,
    report: Path | None,
    report_images: int | None,
    fail_on_ood: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Score IMAGES: files, folders, globs, zip or tar archives, Parquet files, videos, URLs (s3://, https:// ...) of
    any of these, or - for paths on stdin; a camera stream (rtsp:// ..., /dev/video0); or the rows of a file of
    vectors, with --features.

    One row each: path, status, reason, ood_score (higher = stranger), p_value, is_ood, and one column per layer.
    is_ood means p_value <= fpr: of images like those trained on, this share is flagged. --fdr looks at all images
    together, and bounds the share of normal ones among those it marks. A model with a local score adds
    p_value_global and p_value_local: of the picture as a whole, and of its strangest places.

    -m may also be what featdiff export wrote: that needs no PyTorch, and starts several times faster.

    \b
    Example: featdiff score images/ --fpr 0.01 -o scores.csv
    Example: featdiff score images/ --top 20
    Example: featdiff score images/ --report report.html -o scores.csv
    Example: featdiff score images/ --copy-to flagged
    Example: featdiff score --undo flagged/manifest.csv
    Example: featdiff score --features embeddings.npy -o scores.csv
    Example: featdiff score --manifest manifest.parquet --out scored --shard 1/8
    """
    from featdiff.exceptions import UsageError
    from featdiff.exported.layout import is_exported
    from featdiff.report.rows import ReportRows
    from featdiff.runtime.allocator import keep_freed_memory
    from featdiff.verdicts.counts import Counts
    from featdiff.verdicts.fdr import check_fdr

    if options["manifest"] is not None:
        return score_manifest(click.get_current_context())
    check_alone(options)
    if undo_manifest is not None:
        if images or features:
            raise UsageError("--undo takes back what was done, and scores nothing: give it alone")
        return undo(undo_manifest, quiet)

    keep_freed_memory()
    chosen = choose_format(output, format_)
    batch = None if fdr is None else Batch(check_fdr(fdr))
    choice = Choice(sort, top, only_ood, batch)
    asked = Rate.of(options)
    flagged = open_flagged(options, images, features)
    if resume and is_stream(output):
        raise UsageError("--resume needs -o FILE: only what is in a file can be continued")
    if resume and (figure or flagged or report) and chosen == "table" and choice.everything:
        needy = "--figure" if figure else f"--{flagged.action}-to" if flagged else "--report"
        raise UsageError(f"{needy} needs all scores, and a table has rounded ones: resume a .csv, .jsonl or .parquet")
    check_report(report, report_images)
    reported = ReportRows() if report else None

    bars = Bars(quiet or (output is None and sys.stdout.isatty()))
    named = Named(images, bool(figure or report or flagged), every)
    if features:
        options |= {"figure": figure, "exclude_known": exclude_known}
        work = work_on_vectors(features, images, model, asked, options, bars)
    elif is_exported(model):
        options |= {"figure": figure, "exclude_known": exclude_known, "report": report}
        work = work_of_exported(named, model, asked, options, bars)
    else:
        work = work_on_images(named, model, asked, options, figure, bars, exclude_known)

    if not is_stream(output):
        work.made_with |= {"featdiff": version("featdiff"), "model": identity(model), "fpr": work.fpr}
    with open_rows(output, chosen, raw_csv, work.made_with, work.columns, resume, choice) as rows, bars:
        counts = Counts(**rows.resumed(work.total, work.names))
        if resume:
            left = "" if work.total == UNKNOWN else f", {work.total - counts.rows:,} are left"
            say(f"{counts.rows:,} rows are there from an interrupted run{left}", quiet)
        run = Run(work, counts, flagged, reported, batch)
        run.look_at_rows(rows.before())
        _write(run, rows)
    deliver(output, quiet)
    if work.draw:
        work.draw(run.scores)

    seen = is_seen_as_table(output, chosen) and (choice.in_order_of_strangeness or counts.rows <= FEW)
    _summary(run, bars, model, seen, quiet)
    if report is not None and reported is not None:
        seconds = bars.seconds.get("scoring", 0.0)
        write_report(report, reported, work.fpr, work.source, report_images, seconds, quiet)
    code = flagged.place(work.refs, quiet) if flagged else 0
    if fail_on_ood and (counts.flagged or counts.failed):
        return EXIT_OOD
    return EXIT_UNREADABLE if counts.unreadable or counts.failed else code


@dataclass
class Run:
    """What is known of the rows so far.

    ``strangest``: None if some rows cannot be looked at; ``scores``: of all rows, if a picture of them is wanted.
    """

    work: Work
    counts: Counts
    flagged: Flagged | None
    reported: ReportRows | None = None
    batch: Batch | None = None
    strangest: Strangest | None = None
    scores: list[np.ndarray] = field(default_factory=list)

    def look_at(self, part: Scores) -> None:
        """The next part."""
        if self.flagged:
            self.flagged.add(part, self.counts.rows)
        self.counts.add(part)
        if self.strangest:
            self.strangest.add(part)
        if self.reported is not None:
            self.reported.add(part)
        if self.batch:
            self.batch.add(part)
        if self.work.draw:
            self.scores.append(part.ood_score)

    def look_at_rows(self, rows: Iterator[dict[str, Any]] | None) -> None:
        """Rows of an interrupted run, which are counted already; None if they cannot be read."""
        import numpy as np

        strangest = Strangest()
        self.strangest = strangest if rows is not None else None
        scores = []
        for number, row in enumerate(rows or ()):
            strangest.add_rows([row])
            if self.flagged:
                self.flagged.add_row(number, row)
            if self.reported is not None:
                self.reported.add_written(row)
            if self.batch:
                self.batch.add_row(row)
            scores.append(np.nan if row["ood_score"] is None else row["ood_score"])
        if self.work.draw:
            self.scores.append(np.array(scores))


def _write(run: Run, rows: Rows) -> None:
    """Write rows as they come."""
    with catching_stop() as stop:
        try:
            for part in _parts(run.work, run.counts.rows, stop):
                run.look_at(part)
                rows.write(part, asdict(run.counts))
            rows.finish()
        except KeyboardInterrupt:
            raise stop.stopped(rows.kept(run.counts.rows)) from None
        except Exception:
            if rows.resumable:
                say(rows.kept(run.counts.rows))
            raise


def _parts(work: Work, start: int, stop: Stop) -> Iterator[Scores]:
    """Parts from a row on, without one that a signal has cut short: where it ends, another run would not."""
    if start < work.total:
        for part in work.score(start):
            if not stop.signal:
                yield part


def _summary(run: Run, bars: Bars, model: str, seen: bool, quiet: bool) -> None:
    """Counts, the strangest rows unless they were ``seen``, and what to type next."""
    work = run.work
    counts = run.counts
    seconds = bars.seconds.get("scoring", 0.0)
    speed = f" in {seconds:.1f} s ({bars.rate('scoring'):,.0f} {work.what}/s)"
    say(in_words(counts, work.what, work.fpr, speed), quiet, fpr=work.fpr, **asdict(counts))
    if run.batch:
        say(run.batch.in_words(work.groups), quiet)
    if waited := bars.waits.in_words("scoring", seconds):
        say(waited, quiet)

    if counts.known and not work.excluded:
        say(f"WARNING: {counts.known:,} of these images were in training, so they look ordinary.", quiet)
        say("featdiff audit finds the odd ones of a training set; --exclude-known leaves out each image itself.", quiet)
    if run.strangest and not seen:
        run.strangest.say(quiet)
    moved = run.flagged is not None and run.flagged.action == "move"  # its path is not for long
    if run.strangest and work.explained and not moved:
        run.strangest.say_next(model, quiet)
