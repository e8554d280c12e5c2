"""The result of a benchmark -> rows, CSV, and tables for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..files.text import for_spreadsheet, for_terminal

COLUMNS = (
    *("task", "ood", "protocol", "method", "n_id", "n_ood", "auroc", "auroc_low", "auroc_high", "fpr95"),
    *("aupr_in", "aupr_out", "images_per_second", "training_seconds", "megabytes", "accuracy", "published_in"),
)


@dataclass(frozen=True)
class Grid:
    """A table of text: the results of a task under one protocol.

    Attributes
    ----------
    title : str
    header : list of str
        Names of the columns.
    lines : list of list of str
        One per method, with a cell per column.
    """

    title: str
    header: list[str]
    lines: list[list[str]]


def long_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each task, OOD set, protocol and method.

    Parameters
    ----------
    result : mapping
        As from :func:`featdiff.evaluation.benchmark.run_suite`.

    Returns
    -------
    list of dict
        With the keys ``COLUMNS``; AUROC, AUPR and FPR95 are shares, 0 .. 1. Published numbers name their source.
        Values that a row lacks are None.
    """
    rows: list[dict[str, Any]] = []
    for task in result["tasks"]:
        for pair in task["pairs"]:
            rows += _measured_rows(task, pair)

    for number in result["published"]:
        row = {key: number[key] for key in ("task", "ood", "protocol", "method", "auroc", "fpr95")}
        rows.append(row | {"published_in": number["source"]})

    return [{column: row.get(column) for column in COLUMNS} for row in rows]


def _measured_rows(task: Mapping[str, Any], pair: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each method, with its costs."""
    for method, metrics in pair["heads"].items():
        row = {"task": task["name"], "method": method}
        for key in ("ood", "protocol", "n_id", "n_ood"):
            row[key] = pair[key]
        for key in ("auroc", "fpr95", "aupr_in", "aupr_out"):
            row[key] = metrics[key]
        row["auroc_low"], row["auroc_high"] = metrics["auroc_ci"]
        yield row | task["methods"].get(method, {})


def to_csv(result: Mapping[str, Any], raw: bool = False) -> str:
    """:func:`long_rows` as comma-separated values with a header; empty where there is no number.

    Parameters
    ----------
    result : mapping
        As from :func:`featdiff.evaluation.benchmark.run_suite`.
    raw : bool, default False
        Leave names as they are that :func:`featdiff.files.text.for_spreadsheet` would change.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in long_rows(result):
        writer.writerow([for_spreadsheet(cell) if isinstance(cell, str) and not raw else cell for cell in row.values()])
    return text.getvalue()


def to_markdown(result: Mapping[str, Any]) -> str:
    """Every grid as a Markdown table."""
    head = for_terminal(f"Backbone: {result['backbone']}. {EXPLANATION}")
    parts = [f"# {for_terminal(result['suite'])}\n\n{head}"]
    for grid in grids(result):
        rule = ["---"] + ["---:"] * (len(grid.header) - 1)
        lines = [f"| {' | '.join(map(for_terminal, cells))} |" for cells in (grid.header, rule, *grid.lines)]
        parts.append(f"## {for_terminal(grid.title)}\n\n" + "\n".join(lines))

    parts += [for_terminal(f"Left out: {name}: {reason}") for name, reason in result["left_out"].items()]
    return "\n\n".join(parts) + "\n"


#: Columns after the results.
COSTS = ("images/s", "x time", "train", "MB")
#: What the cells of a grid mean.
EXPLANATION = (
    "AUROC [95 % interval] / FPR95 in percent, mean: AUROC / FPR95; images/s: decoding, backbone and method; "
    "x time: the time for an image, as a multiple of featdiff's; train: seconds of training its networks; "
    "MB: what it needs to keep; ID accuracy of a classifier on the test images."
)


def grids(result: Mapping[str, Any]) -> Iterator[Grid]:
    """One grid for each task and protocol, without scores of single layers; :func:`long_rows` has those.

    Parameters
    ----------
    result : mapping
        As from :func:`featdiff.evaluation.benchmark.run_suite`.

    Yields
    ------
    Grid
    """
    for task in result["tasks"]:
        for protocol in dict.fromkeys(pair["protocol"] for pair in task["pairs"]):
            pairs = [pair for pair in task["pairs"] if pair["protocol"] == protocol]
            numbers = [n for n in result["published"] if (n["task"], n["protocol"]) == (task["name"], protocol)]
            yield _grid(task, protocol, pairs, numbers)


def _grid(task: Mapping[str, Any], protocol: str, pairs: list[dict[str, Any]], published: list[dict[str, Any]]) -> Grid:
    costs = task["methods"]
    sets = [pair["ood"] for pair in pairs]
    methods = [name for name in pairs[0]["heads"] if name in costs and not _is_single_layer(name)]

    default_speed = costs[methods[0]]["images_per_second"]
    lines = [_line(name, pairs, costs[name], default_speed) for name in methods]
    lines += _published_lines(published, sets)

    header = ["method", *sets, "mean", *COSTS]
    if any("accuracy" in cost for cost in costs.values()):
        header.append("ID accuracy")
    lines = [(line + [""])[: len(header)] for line in lines]  # published lines have no accuracy

    images = f"{task['n_train']:,} images to train, {task['n_bank']:,} of them for baselines"
    return Grid(f"{task['name']}, {protocol} ({images}, {pairs[0]['n_id']:,} to test)", header, lines)


def _is_single_layer(method: str) -> bool:
    return method.startswith("baseline_mahalanobis_") and method != "baseline_mahalanobis_all"


def _line(method: str, pairs: list[dict[str, Any]], costs: Mapping[str, float], default_speed: float) -> list[str]:
    """The cells of a measured method."""
    metrics = [pair["heads"][method] for pair in pairs]
    cells = [method]
    for m in metrics:
        low, high = m["auroc_ci"]
        cells.append(f"{100 * m['auroc']:.1f} [{100 * low:.1f}, {100 * high:.1f}] / {100 * m['fpr95']:.1f}")

    auroc = 100 * np.mean([m["auroc"] for m in metrics])
    fpr95 = 100 * np.mean([m["fpr95"] for m in metrics])
    cells.append(f"{auroc:.2f} / {fpr95:.2f}")

    speed = costs["images_per_second"]
    cells.append(f"{speed:.4g}")
    cells.append(f"{default_speed / speed:.3g}")
    cells.append(f"{costs['training_seconds']:.1f}")
    cells.append(f"{costs['megabytes']:.1f}")
    cells.append(f"{100 * costs['accuracy']:.1f}" if "accuracy" in costs else "")
    return cells


def _published_lines(numbers: list[dict[str, Any]], sets: list[str]) -> Iterator[list[str]]:
    """What papers report for these sets (or, without a set, for the mean), marked as published."""
    by_source: dict[tuple[str, str], dict[str, Any]] = {}
    for number in numbers:
        by_source.setdefault((number["method"], number["source"]), {})[number["ood"]] = number

    for (method, source), by_set in by_source.items():
        cells = [_number(by_set.get(name)) for name in (*sets, "")]
        if any(cells):
            yield [f"published: {method} ({source})", *cells, "", "", "", ""]


def _number(published: Mapping[str, Any] | None) -> str:
    if published is None:
        return ""
    fpr95 = "" if published["fpr95"] is None else f" / {100 * published['fpr95']:.1f}"
    return f"{100 * published['auroc']:.1f}{fpr95}"
