"""``featdiff score --manifest``: one shard of many images, or all of them on a Ray cluster."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from .exported import exported_arguments, open_exported
from .main import EXIT_OOD, EXIT_UNREADABLE
from .options import identity, load_model, model_arguments
from .progress import Bars
from .rates import Rate
from .signals import catching_stop
from .speech import say
from .summary import in_words

if TYPE_CHECKING:
    from featdiff import ExportedDetector
    from featdiff.detectors import ImageDetector
    from featdiff.serving.cluster import Run
    from featdiff.serving.ray_pool import Cluster
    from featdiff.verdicts.counts import Counts

F = TypeVar("F", bound=Callable[..., Any])

# What may be given with --manifest; other options of score need all rows in one place.
_FITTING = {
    *("manifest", "out", "shard", "block", "ray", "actors", "gpus_per_actor"),
    *(
        "model",
        "weights",
        "fpr",
        "alarms_per_day",
        "rate",
        "exclude_known",
        "fail_on_ood",
        "quiet",
        "cache",
        "max_bytes",
        "max_pixels",
    ),
    *("workers", "image_batch", "engine", "device", "debug"),
}
_SHARD = re.compile(r"(\d+)/(\d+)")
# Where Ray is looked for without an address.
_HERE = "here"


def part_options(function: F) -> F:
    """Which blocks of a manifest, and where: one shard here, or all on a Ray cluster."""
    for option in (
        click.option("--gpus-per-actor", type=click.FloatRange(0), metavar="G", help="[1; without GPUs 0]"),
        click.option(
            "--actors", type=click.IntRange(1), metavar="N", help="Models at work [one per GPU, or per node]."
        ),
        click.option(
            "--ray",
            is_flag=False,
            flag_value=_HERE,
            metavar="[ADDRESS]",
            help="Do the manifest on a Ray cluster, or without an address on the one of this machine.",
        ),
        click.option("--block", type=click.IntRange(1), metavar="N", help="Images of a block [10,000]."),
        click.option("--shard", metavar="I/N", help="Do part I of N, counted from 1 [1/1]."),
    ):
        function = option(function)
    return function


def shard_options(function: F) -> F:
    """``--manifest`` and what belongs to it."""
    for option in (
        part_options,
        click.option("--out", metavar="DIR", help="Folder or URL for the blocks of rows of --manifest."),
        click.option("--manifest", metavar="FILE", help="Score what featdiff manifest has listed, in place of IMAGES."),
    ):
        function = option(function)
    return function


def score_manifest(context: click.Context) -> int:
    """Score what a manifest lists; returns the exit code."""
    from featdiff.serving.cluster import BLOCK, Run
    from featdiff.serving.manifest import Manifest

    options = context.params
    _check(context)
    number, count = shard_of(options["shard"])
    bars = Bars(options["quiet"])

    manifest = Manifest(options["manifest"])
    asked = asked_of(options)
    hints = {
        "manifest": lasting(options["manifest"]),
        "model folder": lasting(options["model"]),
        "shards": count,
    }
    run = Run(options["out"], manifest, asked.made_with, options["block"] or BLOCK, hints)
    run.begin()
    blocks = range(run.blocks) if options["ray"] else run.shard(number, count)
    return _score(run, blocks, asked, bars, options)


@dataclass
class Asked:
    """The model, the rate, and what decides the rows, by a name for people."""

    detector: ImageDetector | ExportedDetector
    arguments: dict[str, Any]
    fpr: float
    exclude_known: bool
    made_with: dict[str, Any]


def asked_of(options: dict[str, Any]) -> Asked:
    """The model of ``-m`` and the rate, as the options say."""
    from featdiff import ExportedDetector
    from featdiff.exported.layout import is_exported
    from featdiff.verdicts.results import columns_of

    here = options | ({"device": "cpu"} if options["ray"] else {})  # the GPUs are those of the workers
    model = options["model"]
    detector: ImageDetector | ExportedDetector
    if is_exported(model):
        detector = open_exported(model, here)
        arguments = exported_arguments(model, here)
    else:
        detector = load_model(model, here).detector
        arguments = model_arguments(options)

    fpr = Rate.of(options).supported_by(detector.calibration_, detector.fpr)
    limits = detector if isinstance(detector, ExportedDetector) else detector.settings
    made_with = {
        "featdiff": version("featdiff"),
        "model": identity(model),
        "fpr": fpr,
        "exclude-known": options["exclude_known"],
        "max-pixels": limits.max_pixels,
        "max-bytes": limits.max_bytes,
        "columns": columns_of(detector.layers, (), detector.parts),
    }
    return Asked(detector, arguments, fpr, options["exclude_known"], made_with)


def _check(context: click.Context) -> None:
    """Refuse options that do not fit (``UsageError``)."""
    from featdiff.exceptions import UsageError

    options = context.params
    given = [
        parameter
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") not in (ParameterSource.DEFAULT, None)
    ]
    unfit = [max(parameter.opts, key=len) for parameter in given if parameter.name not in _FITTING]
    unfit = ["IMAGES" if name == "images" else name for name in unfit]
    if unfit:
        hint = "featdiff merge writes the rows of all blocks, and --report"
        raise UsageError(f"{', '.join(unfit)} cannot be given with --manifest: {hint}")
    if not options["out"]:
        raise UsageError("--manifest needs --out DIR, a folder or URL for the blocks of rows")
    check_part(options)


def check_part(options: dict[str, Any]) -> None:
    """Refuse options of shards and of Ray that do not go together (``UsageError``)."""
    from featdiff.exceptions import UsageError

    if options["ray"] is None and (options["actors"] or options["gpus_per_actor"] is not None):
        raise UsageError("--actors and --gpus-per-actor belong to --ray")
    if options["ray"] is not None and options["shard"]:
        raise UsageError("--ray shares out the blocks itself: drop --shard")


def cluster_of(options: dict[str, Any]) -> Cluster:
    """Where ``--ray`` wants the work done."""
    from featdiff.serving.ray_pool import Cluster

    address = None if options["ray"] == _HERE else options["ray"]
    return Cluster(address, options["actors"], options["gpus_per_actor"])


def check_alone(options: dict[str, Any]) -> None:
    """Without --manifest: refuse what belongs to it (``UsageError``)."""
    from featdiff.exceptions import UsageError

    for name in ("out", "shard", "block", "ray", "actors", "gpus_per_actor"):
        if options[name] is not None:
            raise UsageError("belongs to --manifest FILE, which featdiff manifest writes", argument=name)


def shard_of(text: str | None) -> tuple[int, int]:
    """Number and count of ``I/N`` (``UsageError`` if it is not that)."""
    from featdiff.exceptions import UsageError

    match = _SHARD.fullmatch(text or "1/1")
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(f"shard {text!r} must be I/N with I from 1 to N, such as 1/8 for the first of eight", "shard")
    return number, count


def lasting(name: str) -> str:
    """A name that means the same in another folder."""
    return os.path.abspath(name) if Path(name).exists() else name


def _score(run: Run, blocks: range, asked: Asked, bars: Bars, options: dict[str, Any]) -> int:
    from featdiff.verdicts.counts import Counts

    counts = Counts()
    done = run.done().intersection(blocks)
    there = sum(map(run.rows_of, done))
    rows = sum(map(run.rows_of, blocks))
    if done:
        known = f"{there:,} of {rows:,} images are scored already, in {len(done):,} of {len(blocks):,} blocks"
        say(known, options["quiet"])

    results = _on_ray(run, blocks, asked, options) if options["ray"] else _here(run, blocks, asked, bars, there, rows)
    with bars, catching_stop() as stop:
        try:
            for part in results:
                counts.add_counts(part)
                bars("scoring", there + counts.rows, rows)
        except KeyboardInterrupt:
            done = run.done().intersection(blocks)
            kept = f"{len(done):,} of {len(blocks):,} blocks are in {run.folder.name}: the same command does the others"
            raise stop.stopped(kept) from None

    return _say(run, blocks, counts, asked, bars, options)


def _here(run: Run, blocks: range, asked: Asked, bars: Bars, there: int, rows: int) -> Iterable[Counts]:
    """Score the blocks that are left, in this process."""
    from featdiff.serving.models import scoring

    score = scoring(asked.detector, asked.fpr, asked.exclude_known)
    done = there

    def report(stage: str, of_block: int, _: int) -> None:
        bars(stage, done + of_block, rows)

    for number in run.left(blocks):
        part = run.score(number, score, report)
        done += part.rows
        yield part


def _on_ray(run: Run, blocks: range, asked: Asked, options: dict[str, Any]) -> Iterable[Counts]:
    from featdiff.serving.ray_scoring import Task, score_on

    task = Task(
        manifest=lasting(run.manifest.name),
        block=run.block_rows,
        arguments=asked.arguments,
        working_folder=os.getcwd(),
        out=lasting(run.folder.name),
        made_with=asked.made_with,
        model=lasting(options["model"]),
        fpr=asked.fpr,
        exclude_known=asked.exclude_known,
    )
    return score_on(cluster_of(options), task, blocks)


def _say(run: Run, blocks: range, counts: Counts, asked: Asked, bars: Bars, options: dict[str, Any]) -> int:
    quiet = options["quiet"]
    seconds = bars.seconds.get("scoring", 0.0)
    speed = f" in {seconds:.1f} s ({bars.rate('scoring'):,.0f} images/s)"
    say(in_words(counts, "images", asked.fpr, speed), quiet)
    if counts.known and not asked.exclude_known:
        say(f"WARNING: {counts.known:,} of these images were in training, so they look ordinary.", quiet)

    out = run.folder.name
    say(f"done: {len(blocks):,} of {run.blocks:,} blocks, in {out}", quiet)
    if len(blocks) == run.blocks:
        say(f"Next: featdiff merge {out} -o scores.parquet", quiet)

    if options["fail_on_ood"] and (counts.flagged or counts.failed):
        return EXIT_OOD
    return EXIT_UNREADABLE if counts.unreadable or counts.failed else 0
