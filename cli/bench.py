"""``featdiff bench``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .config import load_config, preset_folder
from .main import EXIT_UNREADABLE
from .options import (
    backbone_options,
    detector_arguments,
    file_option,
    raw_csv_option,
    runtime_options,
    seed_option,
)
from .output import choose_format
from .progress import Bars, list_unreadable
from .speech import say
from .tables import output_width, print_grid, print_text

# Ending of a file of results -> format.
_REPORTS = {".md": "markdown", ".markdown": "markdown", ".json": "json", ".csv": "csv"}


@click.command("bench")
@click.argument("suite")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="Folder that holds the suite's images.",
)
@backbone_options
@seed_option
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Fit everything so often, with --seed, the next one and so on: means and spreads.",
)
@click.option(
    "--lmd",
    "lmd_config",
    metavar="NAME|FILE",
    help="Add the pixel mode, by a preset (lmd_small) or a TOML file; it takes a thousand times as long.",
)
@click.option("--trunk-weights", type=click.Path(path_type=Path), help="Weights of the network of its distance lpips.")
@click.option("--download", is_flag=True, help="Let torchvision fetch what is not in the data folder.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "json", "csv", "markdown"]),
    help="[by the ending of -o: .md, .json or .csv; without -o, table]",
)
@file_option("File for the result, - for standard output [-].")
@raw_csv_option
@runtime_options
def command(
    suite: str,
    data: Path,
    seeds: int,
    lmd_config: str | None,
    trunk_weights: Path | None,
    download: bool,
    format_: str | None,
    output: Path | None,
    raw_csv: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Compare featdiff, each of its heads, DLSR's joint network and the baselines on a SUITE of image sets.

    SUITE is cifar10, openood-cifar10, lmd, oal, folders (train/ and test/ are in-domain, every other folder or zip is
    an OOD set) or a TOML file. All share one extraction of features; published numbers are printed beside. Tables mark
    what is within noise of featdiff's own score (~), and what is better (+).

    \b
    Example: featdiff bench folders --data my-sets/ -o comparison.md
    """
    from featdiff.evaluation.benchmark import run_suite
    from featdiff.evaluation.suites import load_suite
    from featdiff.exceptions import UsageError
    from featdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    format_ = format_ or ("table" if output is None else choose_format(output, None, _REPORTS))
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"no folder {output.parent} for {output.name}")
    if output is not None and output.is_dir():
        raise UsageError(f"{output} is a folder: name a file in it", argument="output")
    file = _suite_file(suite)
    chosen = load_suite(file)
    chosen = replace(chosen, detectors=_with_lmd(chosen.detectors, lmd_config, trunk_weights))

    with Bars(quiet) as bars:
        result = run_suite(
            chosen,
            data,
            detector_arguments(options),
            download,
            bars,
            lambda line: say(line, quiet),
            seeds,
        )

    _write(result, format_, output, raw_csv, quiet)
    list_unreadable(list(result["unreadable"].items()), quiet)
    return EXIT_UNREADABLE if result["unreadable"] else 0


def _suite_file(suite: str) -> Path:
    """The TOML file of a suite that comes with featdiff, or of the user."""
    from featdiff.exceptions import UsageError, did_you_mean

    presets = {file.stem: file for file in sorted((preset_folder() / "suites").glob("*.toml"))}
    if suite in presets:
        return presets[suite]
    if not Path(suite).is_file():
        hint = did_you_mean(suite, list(presets))
        raise UsageError(f"no suite or file {suite!r}{hint}; suites: {', '.join(presets)}")
    return Path(suite)


def _with_lmd(
    detectors: Mapping[str, Mapping[str, Any]], config: str | None, trunk_weights: Path | None
) -> dict[str, dict[str, Any]]:
    """Settings of a suite's detectors, with one of the pixel mode added, and the weights of its perceptual network."""
    from featdiff.exceptions import UsageError

    merged = {name: dict(settings) for name, settings in detectors.items()}
    if config is not None:
        loaded = load_config(config)
        if loaded.mode != "pixel":
            raise UsageError(f"--lmd {config} is of mode {loaded.mode}: it must be of mode pixel")
        merged["lmd"] = {"mode": loaded.mode, **loaded.detector}

    if trunk_weights is not None:
        for settings in merged.values():
            if settings.get("mode") == "pixel":
                settings["weights"] = trunk_weights
    return merged


def _write(result: dict[str, Any], format_: str, output: Path | None, raw_csv: bool, quiet: bool) -> None:
    """Print the result, or write it into a file, where a table becomes Markdown."""
    from featdiff.files.atomic import write_output

    if output is None and format_ == "table":
        print_grids(result)
        return

    text = _text(result, format_, raw_csv)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_output(output, text.encode())
        say(f"written: {output}", quiet)


def _text(result: dict[str, Any], format_: str, raw_csv: bool) -> str:
    from featdiff.report.tables import to_csv, to_markdown

    if format_ == "json":
        return json.dumps(result, indent=2) + "\n"
    if format_ == "csv":
        return to_csv(result, raw_csv)
    return to_markdown(result)


def print_grids(result: dict[str, Any]) -> None:
    """Tables for people, on standard output."""
    from featdiff.report.tables import explanations, grids

    width = output_width(200)
    for grid in grids(result):
        print_grid(grid, width)
    cells, marks = explanations(result)
    print_text(f"{result['suite']}. {cells}", width)
    print_text(marks, width)
    for name, reason in result["left_out"].items():
        print_text(f"left out: {name}: {reason}", width)
