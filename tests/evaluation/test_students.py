"""The students of a suite: trained in order, measured beside everything else, and what is refused before any work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import copy_labelled

from featdiff.evaluation.benchmark import run_suite
from featdiff.evaluation.students import check_students
from featdiff.evaluation.suites import load_suite
from featdiff.exceptions import UsageError
from featdiff.report.tables import grids, long_rows

SUITE = """
[sources]
train.path = "train"
test.path = "test"
digits.path = "digits"

[[tasks]]
name = "tiles"
train = "train"
test = "test"
ood = ["digits"]

[students.plain]
student = "test_resnet"
weights = "{weights}"
epochs = 2
batch_size = 32
guard.recipe = {{ epochs = 2, min_steps = 20, batch_size = 64 }}

[students.taught]
student = "test_resnet"
weights = "{weights}"
teacher = "plain"
outliers = "diffusion"
energy = 0.1
epochs = 1
batch_size = 32
guard.recipe = {{ epochs = 2, min_steps = 20, batch_size = 64 }}
"""


@pytest.fixture(scope="module")
def result(
    sample_folders: dict[str, Path],
    tiny_arguments: dict[str, Any],
    seeded_backbone: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    data = tmp_path_factory.mktemp("data")
    copy_labelled(sample_folders, data, train=70)
    (data / "suite.toml").write_text(SUITE.format(weights=seeded_backbone))
    told: list[str] = []
    found = run_suite(load_suite(data / "suite.toml"), data, tiny_arguments, tell=told.append)
    assert [line.split(":")[0] for line in told[-2:]] == ["  plain", "  taught"]
    return found


def test_students_stand_beside_the_detectors(result: dict[str, Any]) -> None:
    (task,) = result["tasks"]
    names = ["plain_energy", "plain_guard", "taught_energy", "taught_guard"]
    assert [*task["pairs"][0]["heads"]][-4:] == names
    for name in names:
        cost = task["methods"][name]
        assert cost["accuracy"] >= 0.9 and cost["images_per_second"] > 0
    costs = task["methods"]
    assert costs["plain_guard"]["megabytes"] > costs["plain_energy"]["megabytes"] > 1  # 0.5 M weights, and the heads
    assert task["pairs"][0]["heads"]["plain_guard"]["auroc"] >= 0.85  # 105 images train it


def test_accuracy_is_in_rows_and_tables(result: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in long_rows(result)}
    assert rows["taught_guard"]["accuracy"] >= 0.9 and rows["featdiff"]["accuracy"] is None
    (grid,) = grids(result)
    assert grid.header[-1] == "ID accuracy" and {len(line) for line in grid.lines} == {len(grid.header)}
    by_name = {line[0]: line[-1] for line in grid.lines}
    assert by_name["featdiff"] == "" and float(by_name["plain_energy"]) >= 90


def test_students_are_trained_with_every_seed(
    sample_folders: dict[str, Path], tiny_arguments: dict[str, Any], seeded_backbone: Path, tmp_path: Path
) -> None:
    copy_labelled(sample_folders, tmp_path, train=70)
    short = SUITE.format(weights=seeded_backbone).partition("[students.taught]")[0].replace("epochs = 2", "epochs = 1")
    (tmp_path / "suite.toml").write_text(short)
    told: list[str] = []
    result = run_suite(load_suite(tmp_path / "suite.toml"), tmp_path, tiny_arguments, tell=told.append, seeds=2)
    steps = [line.split(":")[0].strip() for line in told]
    assert steps == ["tiles, seed 0", "featdiff", "plain", "tiles, seed 1", "featdiff", "plain"]
    (task,) = result["tasks"]
    assert task["methods"]["plain_guard"]["images_per_second"] > 0
    assert 0 < task["methods"]["plain_guard"]["accuracy"] <= 1
    heads = task["pairs"][0]["heads"]
    assert heads["plain_energy"]["auroc_std"] > 0 and heads["plain_guard"]["auroc_std"] > 0


@pytest.mark.parametrize(
    ("part", "classes", "words"),
    [
        ("train", ["china"], "tiles: students need two classes, and all images to train lie in 'china'"),
        ("test", ["china", "flower", "temple"], "tiles: no image to train is of the test images' class 'temple'"),
    ],
)
def test_classes_are_compared_before_any_work(
    part: str, classes: list[str], words: str, sample_folders: dict[str, Path], seeded_backbone: Path, tmp_path: Path
) -> None:
    copy_labelled(sample_folders, tmp_path, train=3)
    for name in {"china", "flower", "temple"} - {*classes}:
        shutil.rmtree(tmp_path / part / name, ignore_errors=True)
    for name in classes:
        if not (tmp_path / part / name).is_dir():
            shutil.copytree(tmp_path / part / "china", tmp_path / part / name)
    (tmp_path / "suite.toml").write_text(SUITE.format(weights=seeded_backbone))
    with pytest.raises(UsageError, match=words):
        run_suite(load_suite(tmp_path / "suite.toml"), tmp_path, tell=lambda text: pytest.fail(text))


@pytest.mark.parametrize(
    ("students", "words"),
    [
        ({"a": {"student": "resnet18", "epoch": 3}}, "unknown key 'epoch'; did you mean epochs"),
        ({"a": {"teacher": "resnet50"}}, "'a' lacks student"),
        ({"a": {"student": "resnet18", "outliers": "noise"}}, "must be one of diffusion, boundary, not 'noise'"),
        ({"a": {"student": "x", "guard": {"fpr": 0.1}}}, "'a': fpr stands beside student, not in guard"),
        ({"a": {"student": "resnet1800"}}, "unknown backbone 'resnet1800'; did you mean"),
        ({"a": {"student": "x", "epochs": 0}}, "'a': epochs must be above 0"),
        ({"a": {"student": "x", "teacher": "b"}, "b": {"student": "x"}}, "teacher 'b' must stand before it"),
        ({"a": {"student": "resnet18", "teacher": "techer"}}, "'a': unknown backbone 'techer'"),
        ({"a": {"student": "resnet18"}, "b": {"student": "a"}}, "'b': unknown backbone 'a'"),
        ({"a": {"student": "resnet18", "guard": {"weights": "w"}}}, "its guard: unknown key 'weights'"),
        (
            {"a": {"student": "resnet18", "guard": {"recip": {}}}},
            "'a', its guard: unknown key 'recip'; did you mean rec",
        ),
        ({"a": {"student": "resnet18", "micl": 0.5}}, "'a': micl needs outliers"),
        ({"a": {"student": "resnet18", "distillation": 2.0}}, "'a': .* needs a teacher"),
        ({"a": {"student": "resnet18", "margin": 2.0}}, "'a': margin belongs to energy"),
    ],
)
def test_students_that_make_no_sense(students: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_students(students)
