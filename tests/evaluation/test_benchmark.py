"""A whole benchmark on a tiny backbone: what is measured, against separate computations, and what is left out."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from helpers import fails

from featdiff import Detector
from featdiff.evaluation.baselines import fit_baselines
from featdiff.evaluation.benchmark import run_suite
from featdiff.evaluation.protocols import evaluate_detector
from featdiff.evaluation.suites import load_suite
from featdiff.exceptions import UsageError
from featdiff.report.tables import COLUMNS, explanations, grids, long_rows, to_csv, to_markdown

SUITE = """
title = "tiles"

[sources.train]
path = "train"

[sources.test]
path = ["nowhere", "test"]

[sources.digits]
path = "digits"

[sources.absent]
path = ["absent.zip", "absent"]

[[tasks]]
name = "far"
train = "train"
test = "test"
ood = ["digits", "absent"]
protocols = ["matched", "as-published"]

[detectors.other]
joint = true
hidden_max = 32
blocks = 1
head = "mse"
recipe = { epochs = 2, min_steps = 20 }

[detectors.wider]
layers = ["layer2"]
neighbors = 3
recipe = { epochs = 2, min_steps = 20 }

[[published]]
method = "a paper's"
task = "far"
ood = "digits"
protocol = "as-published"
auroc = 87.5
fpr95 = 40.0
source = "Someone 2020, table 1"

[[published]]
method = "a leaderboard's"
task = "far"
protocol = "matched"
auroc = 90.0
source = "a leaderboard"
"""
DIFFUSION = ("layerwise", "mse", "mfsim", "lr")


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("suites") / "tiles.toml"
    file.write_text(SUITE)
    return file


@pytest.fixture(scope="module")
def data(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tiles to train on, 24 to test, and 16 digits."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train").symlink_to(sample_folders["train"])
    for name, count in (("test", 24), ("digits", 16)):
        (folder / name).mkdir()
        for file in sorted(sample_folders[name].iterdir())[:count]:
            shutil.copy(file, folder / name)
    return folder


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(suite_file: Path, data: Path, tiny_arguments: dict[str, Any], told: list[str]) -> dict[str, Any]:
    return run_suite(load_suite(suite_file), data, tiny_arguments, tell=told.append)


def test_contract(result: dict[str, Any], told: list[str]) -> None:
    assert list(result) == ["suite", "backbone", "seeds", "tasks", "published", "left_out", "unreadable"]
    assert (result["suite"], result["backbone"], result["seeds"]) == ("tiles", "test_resnet.r160_in1k", [0])
    (task,) = result["tasks"]
    assert (task["name"], task["n_train"], task["n_bank"]) == ("far", 390, 292)
    assert [(pair["ood"], pair["protocol"]) for pair in task["pairs"]] == [
        ("digits", "matched"),
        ("digits", "as-published"),
    ]
    assert list(result["left_out"]) == ["absent"]
    assert any("left out: absent" in line for line in told)
    assert json.loads(json.dumps(result)) == result


def test_numbers_are_those_of_separate_evaluations(
    result: dict[str, Any], tiny_detector: Detector, tiny_arguments: dict[str, Any], data: Path
) -> None:
    found = result["tasks"][0]["pairs"][0]["heads"]
    sets = (data / "test", {"digits": data / "digits"}, ["matched"])
    own = evaluate_detector(tiny_detector, *sets, baselines=fit_baselines(tiny_detector))["pairs"][0]["heads"]
    assert {name: as_measured(found[name]) for name in own} == own
    short = {"epochs": 2, "min_steps": 20}
    joint = Detector(**{**tiny_arguments, "recipe": short}, joint=True, hidden_max=32, blocks=1, head="mse").fit(
        data / "train"
    )
    other = evaluate_detector(joint, *sets)["pairs"][0]["heads"]
    assert as_measured(found["other_mse"]) == other["featdiff"]
    assert as_measured(found["other_mfsim"]) == other["mfsim"]
    assert set(found) - set(own) == {f"other_{head}" for head in DIFFUSION} | {"wider_fused", "wider_neighbors"} | {
        f"wider_{head}" for head in DIFFUSION
    }


def as_measured(head: dict[str, Any]) -> dict[str, Any]:
    """Without what a comparison adds."""
    return {key: value for key, value in head.items() if not key.endswith(("_std", "_difference", "_difference_ci"))}


def test_every_method_is_compared_with_featdiff(result: dict[str, Any]) -> None:
    for means, *pairs in zip(result["tasks"][0]["means"], result["tasks"][0]["pairs"], strict=True):
        (pair,) = pairs
        assert (means["protocol"], means["ood"]) == (pair["protocol"], ["digits"])
        assert list(means["heads"]) == list(pair["heads"])
        own = pair["heads"]["featdiff"]
        for head in pair["heads"].values():
            for metric in ("auroc", "fpr95"):
                assert head[f"{metric}_difference"] == pytest.approx(head[metric] - own[metric], abs=1e-12)
                low, high = head[f"{metric}_difference_ci"]
                assert low <= head[f"{metric}_difference"] <= high or metric == "fpr95"  # which jumps
        assert (own["auroc_difference"], own["auroc_difference_ci"]) == (0, [0, 0])


def test_seeds_are_runs_of_their_own(
    result: dict[str, Any], suite_file: Path, data: Path, tiny_arguments: dict[str, Any]
) -> None:
    """Means and spreads of two seeds are those of a run with either, whose networks are trained no second time."""
    suite = load_suite(suite_file)
    second = run_suite(suite, data, tiny_arguments | {"seed": 1})
    assert second["seeds"] == [1]
    stages: set[str] = set()
    both = run_suite(suite, data, tiny_arguments, progress=lambda stage, *_: stages.add(stage), seeds=2)
    assert both["seeds"] == [0, 1] and "training" not in stages

    tasks = [each["tasks"][0] for each in (result, second, both)]
    assert set(tasks[2]["methods"]) == set(tasks[0]["methods"])
    spreads = []
    for first_pair, second_pair, pair in zip(*(task["pairs"] for task in tasks), strict=True):
        assert list(pair["heads"]) == list(first_pair["heads"])
        for name, head in pair["heads"].items():
            for metric in ("auroc", "fpr95"):
                values = [each["heads"][name][metric] for each in (first_pair, second_pair)]
                assert head[metric] == pytest.approx(np.mean(values), abs=1e-12)
                assert head[f"{metric}_std"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
                spreads.append(head[f"{metric}_std"])
    assert max(spreads) > 0
    with pytest.raises(UsageError, match="seeds must be 1 or more, not 0"):
        run_suite(suite, data, tiny_arguments, progress=no_work, seeds=0)


def test_costs(result: dict[str, Any], tiny_detector: Detector) -> None:
    """Sizes by hand, and times that can be."""
    task = result["tasks"][0]
    methods = task["methods"]
    assert set(methods) == {name for name in task["pairs"][0]["heads"] if not name.startswith("layer_")}
    rows, width = len(tiny_detector.bank_digests_), 96
    assert methods["baseline_knn"]["megabytes"] == rows * width * 4 / 1e6
    assert methods["baseline_mahalanobis"]["megabytes"] == (width * width + width) * 4 / 1e6
    assert [score.name for score in tiny_detector.heads_.members] == ["neighbors"]
    layer4 = sum(part.width for part in tiny_detector.extractor_.layout.parts if part.layer == "layer4")
    space = layer4 * (4 + 64) + 4 * (64 + 1)  # mean and directions, their steps, and one number to stretch it by
    assert methods["neighbors"]["megabytes"] == (rows * (layer4 + 4) + space) / 1e6
    assert methods["lr"]["megabytes"] > methods["mse"]["megabytes"] > 0
    whole = sum(tensor.nbytes for tensor in tiny_detector.heads_.state_dict().values()) / 1e6
    assert methods["featdiff"]["megabytes"] == whole  # without what only lr needs
    assert methods["featdiff"]["training_seconds"] == tiny_detector.training_seconds_ > 0
    assert methods["other_mse"]["training_seconds"] > 0
    assert methods["neighbors"]["training_seconds"] == 0
    assert all(methods[name]["training_seconds"] > 0 for name in methods if name.startswith("baseline"))
    speeds = {name: costs["images_per_second"] for name, costs in methods.items()}
    assert all(0 < speed < 1e5 for speed in speeds.values())
    assert speeds["featdiff"] < speeds["baseline_mahalanobis"]


def test_second_run_repeats_no_training(
    result: dict[str, Any], suite_file: Path, data: Path, tiny_arguments: dict[str, Any]
) -> None:
    stages: set[str] = set()
    again = run_suite(
        load_suite(suite_file),
        data,
        tiny_arguments,
        progress=lambda stage, done, total: stages.add(stage),
    )
    assert "training" not in stages
    assert again["tasks"][0]["pairs"] == result["tasks"][0]["pairs"]
    costs = [r["tasks"][0]["methods"]["featdiff"]["training_seconds"] for r in (result, again)]
    assert costs[0] == costs[1]  # what it took when it was trained


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('path = "digits"', 'path = "gone"', r"none of the OOD sets is below .*not below"),
        ('path = "train"', 'path = "gone"', r"not below .*: gone"),
        ("blocks = 1", "block = 1", r"the suite's detector 'other' cannot be built: .*'block'"),
        ("blocks = 1", "blocks = 0", r"detector 'other' cannot be built: blocks must be a whole number above 0"),
    ],
)
def test_wrong_requests(
    tmp_path: Path,
    data: Path,
    tiny_arguments: dict[str, Any],
    old: str,
    new: str,
    words: str,
) -> None:
    file = tmp_path / "suite.toml"
    file.write_text(SUITE.replace(old, new))
    with pytest.raises(UsageError, match=words):
        run_suite(load_suite(file), data, tiny_arguments, progress=no_work)


def no_work(stage: str, done: int, total: int) -> None:
    raise AssertionError("a wrong request is refused before any work")


@pytest.mark.usefixtures("result")
def test_what_is_missing_or_damaged_does_not_end_a_run(
    data: Path, tiny_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """A set without a picture, a task without a set, and a picture among good ones."""
    for name in ("train", "test"):
        (tmp_path / name).symlink_to(data / name)
    (tmp_path / "digits").mkdir()
    for file in (data / "digits").iterdir():
        shutil.copy(file, tmp_path / "digits")
    for folder in ("digits", "absent"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "bad.png").write_text("not a picture")
    file = tmp_path / "suite.toml"
    second = """
[[tasks]]
name = "nothing"
train = "train"
test = "test"
ood = "absent"
"""
    file.write_text(SUITE.partition("[detectors.")[0] + second)
    found = run_suite(load_suite(file), tmp_path, tiny_arguments)
    assert [task["name"] for task in found["tasks"]] == ["far"]
    assert found["left_out"] == {"absent": "none of its images can be read"}
    (bad,) = found["unreadable"]
    assert bad == str(tmp_path / "digits" / "bad.png")
    assert found["tasks"][0]["pairs"][0]["n_ood"] == 16


# ---- rows and tables ----


def test_rows(result: dict[str, Any]) -> None:
    rows = long_rows(result)
    heads = result["tasks"][0]["pairs"][0]["heads"]
    assert len(rows) == 2 * len(heads) + 2
    assert all(tuple(row) == COLUMNS for row in rows)
    (row,) = [row for row in rows if row["method"] == "baseline_pca" and row["protocol"] == "matched"]
    assert (row["task"], row["ood"], row["n_id"], row["n_ood"]) == ("far", "digits", 24, 16)
    assert (row["auroc"], row["fpr95"]) == (heads["baseline_pca"]["auroc"], heads["baseline_pca"]["fpr95"])
    assert [row["auroc_low"], row["auroc_high"]] == heads["baseline_pca"]["auroc_ci"]
    assert [row["auroc_difference_low"], row["auroc_difference_high"]] == heads["baseline_pca"]["auroc_difference_ci"]
    assert row["fpr95_difference"] == heads["baseline_pca"]["fpr95_difference"]
    assert (row["published_in"], row["auroc_std"]) == (None, None)
    paper, board = rows[-2:]
    assert (paper["auroc"], paper["fpr95"], paper["published_in"]) == (0.875, 0.4, "Someone 2020, table 1")
    assert (board["auroc"], board["fpr95"], board["ood"]) == (0.9, None, "")


def test_csv_can_be_read_again(result: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(result))))
    for row, expected in zip(rows, long_rows(result), strict=True):
        assert row == {name: "" if value is None else str(value) for name, value in expected.items()}


def test_grids(result: dict[str, Any]) -> None:
    matched, published = grids(result)
    assert matched.title == "far, matched (390 images to train, 292 of them for baselines, 24 to test)"
    differences = ["AUROC difference", "FPR95 difference"]
    assert matched.header == ["method", "digits", "mean", *differences, "images/s", "x time", "train", "MB"]
    lines = {line[0]: line[1:] for line in matched.lines}
    m = result["tasks"][0]["pairs"][0]["heads"]["featdiff"]
    low, high = m["auroc_ci"]
    assert lines["featdiff"][:4] == [
        f"{100 * m['auroc']:.1f} [{100 * low:.1f}, {100 * high:.1f}] / {100 * m['fpr95']:.1f}",
        f"{100 * m['auroc']:.2f} / {100 * m['fpr95']:.2f}",
        "",
        "",
    ]
    assert not any(name.startswith("layer_") or name.startswith("baseline_mahalanobis_layer") for name in lines)
    assert lines["published: a leaderboard's (a leaderboard)"] == ["", "90.0", *[""] * 6]
    others = {line[0]: line[1:] for line in published.lines}
    assert others["published: a paper's (Someone 2020, table 1)"] == ["87.5 / 40.0", *[""] * 7]


def head(
    auroc: float,
    fpr95: float,
    differences: tuple[list[float], list[float]] = ([0.0, 0.0], [0.0, 0.0]),
    spreads: tuple[float | None, float | None] = (None, None),
) -> dict[str, Any]:
    """Numbers of a method; its differences are in the middle of their intervals."""
    found: dict[str, Any] = {
        "auroc": auroc,
        "fpr95": fpr95,
        "aupr_in": 1.0,
        "aupr_out": 1.0,
        "auroc_ci": [auroc, auroc],
    }
    for metric, interval, spread in zip(("auroc", "fpr95"), differences, spreads, strict=True):
        found[f"{metric}_std"] = spread
        found[f"{metric}_difference"] = sum(interval) / 2
        found[f"{metric}_difference_ci"] = interval
    return found


def table(pairs: list[tuple[str, str, dict[str, Any]]], means: dict[str, dict[str, Any]], seeds: int = 1) -> Any:
    """A result of one task, by (set, protocol, heads) and the means of each protocol."""
    costs = {"images_per_second": 1.0, "training_seconds": 2.0, "megabytes": 3.0}
    task = {
        "name": "t",
        "n_train": 4,
        "n_bank": 3,
        "methods": dict.fromkeys(pairs[0][2], costs),
        "pairs": [
            {"ood": ood, "protocol": protocol, "n_id": 1, "n_ood": 1, "heads": heads} for ood, protocol, heads in pairs
        ],
        "means": [{"protocol": protocol, "heads": heads} for protocol, heads in means.items()],
    }
    return {"suite": "s", "backbone": "b", "seeds": [*range(seeds)], "tasks": [task], "published": [], "left_out": {}}


def test_the_mean_is_that_of_the_task_and_protocol() -> None:
    pairs = [
        ("a", "matched", {"featdiff": head(0.5, 0.25)}),
        ("b", "matched", {"featdiff": head(0.7, 0.35)}),
        ("a", "as-published", {"featdiff": head(1.0, 0.5)}),
    ]
    means = {"matched": {"featdiff": head(0.6, 0.3)}, "as-published": {"featdiff": head(1.0, 0.5)}}
    first, second = grids(table(pairs, means))
    cells = ["50.0 [50.0, 50.0] / 25.0", "70.0 [70.0, 70.0] / 35.0", "60.00 / 30.00"]
    assert first.lines == [["featdiff", *cells, "", "", "1", "1", "2.0", "3.0"]]
    assert second.lines[0][2] == "100.00 / 50.00"


@pytest.mark.parametrize(
    ("auroc", "fpr95", "marks"),
    [
        ([-0.01, 0.02], [-0.02, 0.01], "~~"),
        ([0.0, 0.0], [0.0, 0.0], "~~"),
        ([0.01, 0.02], [-0.02, -0.01], "++"),
        ([-0.02, -0.01], [0.01, 0.02], "  "),
        ([0.01, 0.02], [0.01, 0.02], "+ "),
        ([-0.02, -0.01], [0.0, 0.02], " ~"),
    ],
)
def test_marks_say_what_is_within_noise_and_what_is_better(auroc: list[float], fpr95: list[float], marks: str) -> None:
    other = head(0.8, 0.4, (auroc, fpr95))
    heads = {"featdiff": head(0.8, 0.4), "other": other}
    (grid,) = grids(table([("a", "matched", heads)], {"matched": heads}))
    first, second = (mark.strip() for mark in marks)
    own, line = grid.lines
    assert own[1:5] == ["80.0 [80.0, 80.0] / 40.0", "80.00 / 40.00", "", ""]
    assert line[1] == f"80.0{first} [80.0, 80.0] / 40.0{second}"
    assert line[2] == f"80.00{first} / 40.00{second}"
    between = [f"{100 * sum(ends) / 2:+.2f} [{100 * ends[0]:.2f}, {100 * ends[1]:.2f}]" for ends in (auroc, fpr95)]
    assert line[3:5] == between


def test_tables_of_several_seeds_show_spreads() -> None:
    heads = {
        "featdiff": head(0.8, 0.4, spreads=(0.0012, 0.02)),
        "other": head(0.9, 0.3, ([0.05, 0.15], [-0.3, 0.1]), (0.001, 0.0)),
    }
    result = table([("a", "matched", heads)], {"matched": heads}, seeds=5)
    (grid,) = grids(result)
    assert grid.lines[0][1:3] == ["80.0 \u00b10.1 / 40.0 \u00b12.0", "80.00 \u00b10.12 / 40.00 \u00b12.00"]
    assert grid.lines[1][1] == "90.0+ \u00b10.1 / 30.0~ \u00b10.0"
    for text in (*explanations(result), to_markdown(result)):
        assert "seeds" in text
    assert "seeds" not in to_markdown(table([("a", "matched", heads)], {"matched": heads}))


def test_markdown(result: dict[str, Any]) -> None:
    text = to_markdown(result)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {10}
    assert "Left out: absent: not below" in text
    assert "test_resnet.r160_in1k" in text


# ---- the command ----

Cli = Callable[..., Result]


@pytest.fixture
def bench(featdiff_cli: Cli, suite_file: Path, data: Path, seeded_backbone: Path) -> Cli:
    """The same suite by the command, with the default recipe."""
    fixed = ("--data", data, "--backbone", "test_resnet", "--weights", seeded_backbone, "--layers", "layer1")
    return lambda *arguments, suite=suite_file: featdiff_cli("bench", suite, *fixed, *arguments)


def test_command_prints_tables_and_writes_files(bench: Cli, tmp_path: Path) -> None:
    table = bench()
    assert table.exit_code == 0, table.output
    for words in (
        "far, matched",
        "baseline_mahalanobis_all",
        "other_mfsim",
        "published: a paper's",
        "left out: absent",
        "~ within noise",
    ):
        assert words in " ".join(table.stdout.split())
    assert "trained in" in table.stderr
    done = bench("-o", tmp_path / "x.csv", "-q")
    assert (done.exit_code, done.stdout) == (0, "")
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert {row["protocol"] for row in rows} == {"matched", "as-published"}
    assert len({row["method"] for row in rows if row["images_per_second"]}) == 21
    assert all(row["auroc_difference"] and not row["auroc_std"] for row in rows if not row["published_in"])

    file = tmp_path / "alone.toml"
    quick = "[detectors.featdiff]\nrecipe = { epochs = 2, min_steps = 20 }\n"
    file.write_text(SUITE.partition("[detectors.")[0] + quick)
    done = bench("--seeds", 2, "-o", tmp_path / "two.csv", suite=file)
    assert done.exit_code == 0, done.output
    assert "far, seed 0: 390 images" in done.stderr and "far, seed 1: 390 images" in done.stderr
    rows = list(csv.DictReader((tmp_path / "two.csv").open()))
    assert rows and all(row["auroc_std"] and row["fpr95_difference_low"] for row in rows)


@pytest.mark.parametrize(
    ("name", "format", "start"),
    [
        ("x.json", None, "{"),
        ("x.md", None, "# tiles"),
        ("x", None, "# tiles"),
        ("x.csv", None, "task,ood,"),
        ("x", "json", "{"),
    ],
)
def test_format_follows_the_file_or_the_option(
    result: dict[str, Any],
    featdiff_cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    format: str | None,
    start: str,
) -> None:
    monkeypatch.setattr(
        "featdiff.evaluation.benchmark.run_suite", lambda *arguments: result
    )  # one real run is enough for all formats
    chosen = ("--format", format) if format else ()
    done = featdiff_cli("bench", "folders", "--data", tmp_path, "-o", tmp_path / name, *chosen)
    assert done.exit_code == 0, done.output
    assert (tmp_path / name).read_text().startswith(start)


def test_wrong_requests_of_the_command(bench: Cli, featdiff_cli: Cli, tmp_path: Path) -> None:
    fails(bench(suite="cifar-10"), 2, "no suite or file 'cifar-10'; did you mean cifar10", "folders")
    fails(featdiff_cli("bench", "folders", "--data", tmp_path / "none"), 2, "does not exist")
    fails(featdiff_cli("bench", "folders", "--data", tmp_path), 2, "train or train.zip", str(tmp_path))
    fails(bench("-o", tmp_path / "no" / "x.md"), 2, "no folder", "x.md")  # said before the work, not after
    fails(bench("-o", tmp_path), 2, "is a folder")
    fails(bench("--seeds", 0), 2, "--seeds", "0 is not in the range x>=1")
