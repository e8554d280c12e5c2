"""The result of a benchmark -> rows, CSV, and tables for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..files.text import for_spreadsheet, for_terminal

COLUMNS = (
    *("task", "ood", "protocol", "method", "n_id", "n_ood", "auroc", "auroc_low", "auroc_high", "fpr95"),
    *("aupr_in", "aupr_out", "images_per_second", "training_seconds", "megabytes", "accuracy", "published_in"),
    *("auroc_difference", "auroc_difference_low", "auroc_difference_high"),
    *("fpr95_difference", "fpr95_difference_low", "fpr95_difference_high", "auroc_std", "fpr95_std"),
)
# Differences that are good news are above 0 for one metric and below 0 for the other.
_BETTER = {"auroc": 1, "fpr95": -1}
_WITHIN_NOISE = "~"
_BEYOND_NOISE = "+"
# Columns of differences, by metric.
_DIFFERENCES = {"auroc": "AUROC difference", "fpr95": "FPR95 difference"}


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
        With the keys ``COLUMNS``; AUROC, AUPR and FPR95 are shares, 0 .. 1. Differences are those of the method and
        featdiff's own score, with the ends of their 95 % intervals. Published numbers name their source. Values that a
        row lacks are None.
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
        for key in ("auroc", "fpr95", "aupr_in", "aupr_out", "auroc_std", "fpr95_std"):
            row[key] = metrics[key]
        for key in ("auroc_difference", "fpr95_difference"):
            row[key] = metrics[key]
            row[f"{key}_low"], row[f"{key}_high"] = metrics[f"{key}_ci"]
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
    parts = [f"# {for_terminal(result['suite'])}", *map(for_terminal, explanations(result))]
    for grid in grids(result):
        rule = ["---"] + ["---:"] * (len(grid.header) - 1)
        lines = [f"| {' | '.join(map(for_terminal, cells))} |" for cells in (grid.header, rule, *grid.lines)]
        parts.append(f"## {for_terminal(grid.title)}\n\n" + "\n".join(lines))

    parts += [for_terminal(f"Left out: {name}: {reason}") for name, reason in result["left_out"].items()]
    return "\n\n".join(parts) + "\n"


#: Columns after the results.
COSTS = ("images/s", "x time", "train", "MB")


def explanations(result: Mapping[str, Any]) -> tuple[str, str]:
    """What the cells of :func:`grids` mean, and what the marks in them do: a paragraph each.

    Parameters
    ----------
    result : mapping
        As from :func:`featdiff.evaluation.benchmark.run_suite`.
    """
    seeds = len(result["seeds"])
    if seeds == 1:
        cells, drawn = "AUROC [95 % interval] / FPR95 in percent, mean: AUROC / FPR95", "images"
    else:
        cells = f"AUROC / FPR95 in percent, means of {seeds} seeds with the standard deviation over them (\u00b1)"
        drawn = "images and seeds"
    cells = (
        f"Backbone: {result['backbone']}. {cells}; images/s: decoding, backbone and method; x time: the time for an "
        "image, as a multiple of featdiff's; train: seconds of training its networks; MB: what it needs to keep; ID "
        "accuracy of a classifier on the test images."
    )
    marks = (
        f"Compared with featdiff's own score: {_WITHIN_NOISE} within noise (the 95 % interval of the difference holds "
        f"0; resamples of {drawn}, the same for both), {_BEYOND_NOISE} better beyond noise, no mark: worse. "
        f"{', '.join(_DIFFERENCES.values())}: the mean less that of featdiff, and the interval."
    )
    return cells, marks


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
            (means,) = (means for means in task["means"] if means["protocol"] == protocol)
            numbers = [n for n in result["published"] if (n["task"], n["protocol"]) == (task["name"], protocol)]
            yield _grid(task, pairs, means, numbers)


def _grid(
    task: Mapping[str, Any], pairs: list[dict[str, Any]], means: Mapping[str, Any], published: list[dict[str, Any]]
) -> Grid:
    costs = task["methods"]
    sets = [pair["ood"] for pair in pairs]
    methods = [name for name in pairs[0]["heads"] if name in costs and not _is_single_layer(name)]

    default_speed = costs[methods[0]]["images_per_second"]
    lines = []
    for name in methods:
        lines.append([name, *_results(name, pairs, means, name == methods[0]), *_costs(costs[name], default_speed)])
    lines += _published_lines(published, sets)

    header = ["method", *sets, "mean", *_DIFFERENCES.values(), *COSTS]
    if any("accuracy" in cost for cost in costs.values()):
        header.append("ID accuracy")
    lines = [(line + [""])[: len(header)] for line in lines]  # published lines have no accuracy

    images = f"{task['n_train']:,} images to train, {task['n_bank']:,} of them for baselines"
    return Grid(f"{task['name']}, {means['protocol']} ({images}, {pairs[0]['n_id']:,} to test)", header, lines)


def _is_single_layer(method: str) -> bool:
    return method.startswith("baseline_mahalanobis_") and method != "baseline_mahalanobis_all"


def _results(method: str, pairs: list[dict[str, Any]], means: Mapping[str, Any], is_own: bool) -> Iterator[str]:
    """A cell for each set, the mean, and its differences from featdiff's own score, which itself has none."""
    for pair in pairs:
        found = pair["heads"][method]
        low, high = found["auroc_ci"]
        interval = "" if _has_spread(found) else f" [{100 * low:.1f}, {100 * high:.1f}]"
        yield f"{_measured(found, 'auroc', 1, is_own)}{interval} / {_measured(found, 'fpr95', 1, is_own)}"

    mean = means["heads"][method]
    yield f"{_measured(mean, 'auroc', 2, is_own)} / {_measured(mean, 'fpr95', 2, is_own)}"
    for metric in _DIFFERENCES:
        yield "" if is_own else _difference(mean, metric)


def _has_spread(found: Mapping[str, Any]) -> bool:
    return found["auroc_std"] is not None


def _measured(found: Mapping[str, Any], metric: str, digits: int, is_own: bool) -> str:
    """A number in percent with its mark, and with its spread over seeds."""
    spread = f" \u00b1{100 * found[f'{metric}_std']:.{digits}f}" if _has_spread(found) else ""
    mark = "" if is_own else _mark(found, metric)
    return f"{100 * found[metric]:.{digits}f}{mark}{spread}"


def _mark(found: Mapping[str, Any], metric: str) -> str:
    """Whether a method is within noise of featdiff's own score, or better."""
    low, high = sorted(_BETTER[metric] * end for end in found[f"{metric}_difference_ci"])
    if low > 0:
        return _BEYOND_NOISE
    return _WITHIN_NOISE if high >= 0 else ""


def _difference(found: Mapping[str, Any], metric: str) -> str:
    low, high = found[f"{metric}_difference_ci"]
    return f"{100 * found[f'{metric}_difference']:+.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def _costs(costs: Mapping[str, float], default_speed: float) -> Iterator[str]:
    speed = costs["images_per_second"]
    yield f"{speed:.4g}"
    yield f"{default_speed / speed:.3g}"
    yield f"{costs['training_seconds']:.1f}"
    yield f"{costs['megabytes']:.1f}"
    yield f"{100 * costs['accuracy']:.1f}" if "accuracy" in costs else ""


def _published_lines(numbers: list[dict[str, Any]], sets: list[str]) -> Iterator[list[str]]:
    """What papers report for these sets (or, without a set, for the mean), marked as published."""
    by_source: dict[tuple[str, str], dict[str, Any]] = {}
    for number in numbers:
        by_source.setdefault((number["method"], number["source"]), {})[number["ood"]] = number

    for (method, source), by_set in by_source.items():
        cells = [_number(by_set.get(name)) for name in (*sets, "")]
        if any(cells):
            yield [f"published: {method} ({source})", *cells, *[""] * len((*_DIFFERENCES, *COSTS))]


def _number(published: Mapping[str, Any] | None) -> str:
    if published is None:
        return ""
    fpr95 = "" if published["fpr95"] is None else f" / {100 * published['fpr95']:.1f}"
    return f"{100 * published['auroc']:.1f}{fpr95}"
