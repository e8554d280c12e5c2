"""The result of a benchmark -> rows, CSV, and tables for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

COLUMNS = (
    *("task", "ood", "protocol", "method", "n_id", "n_ood", "auroc", "auroc_low", "auroc_high", "fpr95"),
    *("aupr_in", "aupr_out", "images_per_second", "training_seconds", "megabytes", "accuracy", "published_in"),
)


@dataclass(frozen=True)
class Grid:
    """A table of text: one line for each method, the set by set results of a task under one protocol."""

    title: str
    header: list[str]
    lines: list[list[str]]


def long_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each task, OOD set, protocol and method, with ``COLUMNS``; published ones carry their source.

    AUROC, AUPR and FPR95 are shares, 0..1.
    """
    rows = []
    for task in result["tasks"]:
        for pair in task["pairs"]:
            shared = {"task": task["name"]} | {key: pair[key] for key in ("ood", "protocol", "n_id", "n_ood")}
            for method, m in pair["heads"].items():
                low, high = m["auroc_ci"]
                measured = {key: m[key] for key in ("auroc", "fpr95", "aupr_in", "aupr_out")}
                costs = task["methods"].get(method, {})
                rows.append(shared | {"method": method, "auroc_low": low, "auroc_high": high} | measured | costs)
    for number in result["published"]:
        row = {key: number[key] for key in ("task", "ood", "protocol", "method")}
        rows.append(row | {"auroc": number["auroc"], "fpr95": number["fpr95"], "published_in": number["source"]})
    return [{column: row.get(column) for column in COLUMNS} for row in rows]


def to_csv(result: Mapping[str, Any]) -> str:
    """:func:`long_rows` as comma-separated values with a header; empty where there is no number."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(long_rows(result))
    return text.getvalue()


def to_markdown(result: Mapping[str, Any]) -> str:
    """Every grid as a Markdown table."""
    parts = [f"# {result['suite']}\n\nBackbone: {result['backbone']}. {EXPLANATION}"]
    for grid in grids(result):
        lines = [grid.header, ["---", *("---:" for _ in grid.header[1:])], *grid.lines]
        parts.append(f"## {grid.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts += [f"Left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    return "\n\n".join(parts) + "\n"


#: Columns behind the results.
COSTS = ("images/s", "x time", "train", "MB")
#: What the cells of a grid say.
EXPLANATION = (
    "AUROC [95 % interval] / FPR95 in percent, mean: AUROC / FPR95; images/s: decoding, backbone and method; "
    "x time: the time for an image in times of featdiff's; train: seconds of training its networks; "
    "MB: what it needs to keep; ID accuracy of a classifier on the test images."
)


def grids(result: Mapping[str, Any]) -> Iterator[Grid]:
    """One grid for each task and protocol; scores of single layers are left to the rows."""
    for task in result["tasks"]:
        for protocol in dict.fromkeys(pair["protocol"] for pair in task["pairs"]):
            pairs = [pair for pair in task["pairs"] if pair["protocol"] == protocol]
            header = ["method", *(pair["ood"] for pair in pairs), "mean", *COSTS, "ID accuracy"]
            if not any("accuracy" in costs for costs in task["methods"].values()):
                header.pop()
            methods = [name for name in pairs[0]["heads"] if name in task["methods"] and not _is_single_layer(name)]
            default = task["methods"][methods[0]]["images_per_second"]
            lines = [_line(name, pairs, task["methods"][name], default) for name in methods]
            here = [n for n in result["published"] if (n["task"], n["protocol"]) == (task["name"], protocol)]
            lines += _published_lines(here, [pair["ood"] for pair in pairs])
            lines = [(line + [""])[: len(header)] for line in lines]  # to accuracy, where there is any
            train, bank, test = task["n_train"], task["n_bank"], pairs[0]["n_id"]
            images = f"{train:,} images to train, {bank:,} of them for baselines, {test:,} to test"
            yield Grid(f"{task['name']}, {protocol} ({images})", header, lines)


def _is_single_layer(method: str) -> bool:
    return method.startswith("baseline_mahalanobis_") and method != "baseline_mahalanobis_all"


def _line(method: str, pairs: list[dict[str, Any]], costs: Mapping[str, float], default_speed: float) -> list[str]:
    found = [pair["heads"][method] for pair in pairs]
    cells = []
    for m in found:
        low, high = m["auroc_ci"]
        cells.append(f"{100 * m['auroc']:.1f} [{100 * low:.1f}, {100 * high:.1f}] / {100 * m['fpr95']:.1f}")
    means = [100 * np.mean([m[key] for m in found]) for key in ("auroc", "fpr95")]
    speed, seconds, size = (costs[key] for key in ("images_per_second", "training_seconds", "megabytes"))
    return [
        method,
        *cells,
        f"{means[0]:.2f} / {means[1]:.2f}",
        f"{speed:.4g}",
        f"{default_speed / speed:.3g}",
        f"{seconds:.1f}",
        f"{size:.1f}",
        f"{100 * costs['accuracy']:.1f}" if "accuracy" in costs else "",
    ]


def _published_lines(numbers: list[dict[str, Any]], sets: list[str]) -> Iterator[list[str]]:
    """What papers say about these sets (or, without a set, about the mean), marked as published."""
    for method, source in dict.fromkeys((n["method"], n["source"]) for n in numbers):
        mine = {n["ood"]: n for n in numbers if (n["method"], n["source"]) == (method, source)}
        cells = [_number(mine.get(name)) for name in (*sets, "")]
        if set(cells) != {""}:
            yield [f"published: {method} ({source})", *cells, "", "", "", ""]


def _number(published: Mapping[str, Any] | None) -> str:
    if published is None:
        return ""
    fpr95 = "" if published["fpr95"] is None else f" / {100 * published['fpr95']:.1f}"
    return f"{100 * published['auroc']:.1f}{fpr95}"
