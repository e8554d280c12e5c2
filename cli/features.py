"""``featdiff features``: what ``featdiff train`` would compute first, ahead of it and on many machines."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE
from .options import backbone_options, detector_arguments, runtime_options
from .progress import Bars, list_unreadable
from .shards import check_part, cluster_of, lasting, part_options, shard_of
from .signals import catching_stop
from .speech import say

if TYPE_CHECKING:
    from featdiff.detectors.filling import Filled
    from featdiff.serving.manifest import Manifest


@click.command("features")
@click.option("--manifest", required=True, metavar="FILE", help="The images, as featdiff manifest has listed them.")
@part_options
@backbone_options
@click.option("--config", metavar="NAME|FILE", help="A preset or a TOML file, as for featdiff train.")
@runtime_options
def command(manifest: str, quiet: bool, **options: Any) -> int:
    """Compute the features of a manifest's images, so that featdiff train only has to read them.

    Give what train is given: --backbone, --weights, --view, --size, --layers, --precision, --engine or --config.
    Features go to the cache, where train finds them by the content of the images; what is there is not computed again.
    Workers on several machines share one --cache folder.

    \b
    Example: featdiff features --manifest manifest.parquet --backbone resnet50 --cache /shared/cache
    """
    from featdiff.serving.cluster import BLOCK, shard
    from featdiff.serving.manifest import Manifest

    check_part(options)
    number, count = shard_of(options["shard"])
    arguments = _arguments(options)
    images = Manifest(manifest)
    size = options["block"] or BLOCK
    blocks = shard(images.blocks(size), number, count)

    bars = Bars(quiet)
    total = _fill(images, size, blocks, arguments, bars, options)
    return _say(total, bars, quiet)


def _arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The settings of the detector that is to be trained, as far as they are given."""
    from featdiff.detectors.config import FeatureSettings
    from featdiff.exceptions import UsageError

    from .config import FEATURE, Config, load_config

    config = load_config(options["config"]) if options["config"] else Config()
    if config.mode != FEATURE:
        raise UsageError(f"--config {options['config']} is of mode {config.mode}, which has no features")
    arguments = config.detector | detector_arguments(options)
    settings = FeatureSettings.of(arguments)

    arguments["cache"] = os.path.abspath(settings.cache_folder)
    if settings.weights:
        arguments["weights"] = lasting(os.fspath(settings.weights))
    return arguments


def _fill(
    images: Manifest, size: int, blocks: range, arguments: dict[str, Any], bars: Bars, options: dict[str, Any]
) -> Filled:
    """Compute what these blocks lack."""
    from featdiff.detectors.filling import Filled

    rows = sum(images.rows_of(block, size) for block in blocks)
    total = Filled()
    work: Iterable[Filled]
    with bars, catching_stop() as stop:
        try:
            if options["ray"]:
                work = _on_ray(images, size, blocks, arguments, options)
            else:
                work = _here(images, size, blocks, arguments, bars, rows)
            for part in work:
                total.add(part)
                bars("features", total.images, rows)
        except KeyboardInterrupt:
            raise stop.stopped("features are kept, the same command goes on from there") from None
    return total


def _here(
    images: Manifest, size: int, blocks: range, arguments: dict[str, Any], bars: Bars, rows: int
) -> Iterable[Filled]:
    from featdiff.serving.training_features import filling

    if not blocks:
        return
    filler = filling(images, arguments)
    done = 0

    def report(stage: str, of_block: int, _: int) -> None:
        bars(stage, done + of_block, rows)

    for number in blocks:
        part = filler.add(images.block(number, size).refs(), report)
        done += part.images
        yield part


def _on_ray(
    images: Manifest, size: int, blocks: range, arguments: dict[str, Any], options: dict[str, Any]
) -> Iterable[Filled]:
    from featdiff.serving.ray_pool import Task
    from featdiff.serving.training_features import fill_on

    task = Task(manifest=lasting(images.name), block=size, arguments=arguments, working_folder=os.getcwd())
    return fill_on(cluster_of(options), task, blocks)


def _say(total: Filled, bars: Bars, quiet: bool) -> int:
    there = total.images - total.computed - total.unreadable
    bad = f", {total.unreadable:,} unreadable" if total.unreadable else ""
    seconds = bars.seconds.get("features", 0.0)
    speed = f"{seconds:.1f} s ({bars.rate('features'):,.0f} images/s)"
    say(f"{total.images:,} images: features of {total.computed:,} computed, {there:,} were there{bad}; {speed}", quiet)
    list_unreadable(total.named, quiet)

    for folder, how in total.stores.items():
        say(f"they are in {folder} ({how})", quiet)
    engines = sorted({how.partition(" by ")[2].split()[0] for how in total.stores.values()})
    if len(total.stores) > 1:
        say("WARNING: not all workers computed the same: give --engine, --precision and --device, and run again", quiet)
    elif engines:
        say(f"Next: featdiff train IMAGES with the same options and --engine {engines[0]}", quiet)
    return EXIT_UNREADABLE if total.unreadable else 0
