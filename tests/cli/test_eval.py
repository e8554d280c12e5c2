"""``featdiff eval``: the JSON contract, the table for people, and wrong requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from helpers import fails
from PIL import Image
from sklearn.datasets import load_sample_image
from sklearn.metrics import roc_auc_score

from featdiff import Detector

Cli = Callable[..., Result]
HEADS = [
    *("featdiff", "layerwise", "mse", "mfsim", "neighbors"),  # saved models have no lr
    *("layer_layer1", "layer_layer2", "layer_layer4"),
]


@pytest.fixture(scope="module")
def sets(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``id``: 16 tiles of 32 px; ``digits``: 12 of them; ``sharp``: 20 pictures of 128 px."""
    root = tmp_path_factory.mktemp("sets")
    for name, source, count in (("id", "test", 16), ("digits", "digits", 12)):
        (root / name).mkdir()
        for file in sorted(sample_folders[source].iterdir())[:count]:
            (root / name / file.name).write_bytes(file.read_bytes())
    (root / "sharp").mkdir()
    photograph = load_sample_image("china.jpg")
    for i in range(20):
        row, column = divmod(i, 5)
        cut = photograph[row * 96 : row * 96 + 128, column * 120 : column * 120 + 128]
        Image.fromarray(cut).save(root / "sharp" / f"{i:02d}.png")
    return {name: root / name for name in ("id", "digits", "sharp")}


@pytest.fixture
def evaluate(featdiff_cli: Cli, tiny_model: Path) -> Cli:
    return lambda *arguments: featdiff_cli("eval", "-m", tiny_model, *arguments)


def pair(document: dict[str, Any], ood: str, protocol: str) -> dict[str, Any]:
    (found,) = [p for p in document["pairs"] if (p["ood"], p["protocol"]) == (ood, protocol)]
    return found


def test_json_contract(evaluate: Cli, sets: dict[str, Path], tiny_detector: Detector) -> None:
    result = evaluate("--id", sets["id"], "--ood", f"d={sets['digits']}", "--ood", f"s={sets['sharp']}", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert list(document) == ["id", "model", "pairs"]
    assert (document["id"], document["model"]) == (str(sets["id"]), "test_resnet.r160_in1k")
    order = [(p["ood"], p["protocol"]) for p in document["pairs"]]
    assert order == [(name, protocol) for name in "ds" for protocol in ("matched", "as-published")]
    for p in document["pairs"]:
        assert list(p) == ["ood", "protocol", "n_id", "n_ood", "heads"]
        assert (p["n_id"], p["n_ood"]) == (16, {"d": 12, "s": 20}[p["ood"]])
        assert list(p["heads"]) == HEADS
        for metrics in p["heads"].values():
            assert set(metrics) == {"auroc", "aupr_in", "aupr_out", "fpr95", "auroc_ci"}
            low, high = metrics.pop("auroc_ci")
            assert 0 <= low <= metrics["auroc"] <= high <= 1
            assert all(isinstance(value, float) and 0 <= value <= 1 for value in metrics.values())
    assert pair(document, "s", "matched")["heads"] != pair(document, "s", "as-published")["heads"]
    assert pair(document, "d", "matched")["heads"] == pair(document, "d", "as-published")["heads"]
    scores = [tiny_detector.score(sets[name]).ood_score for name in ("id", "sharp")]
    expected = roc_auc_score([0] * 16 + [1] * 20, [*scores[0], *scores[1]])
    assert pair(document, "s", "as-published")["heads"]["featdiff"]["auroc"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("protocol", ["matched", "as-published"])
def test_one_protocol_can_be_asked_for(evaluate: Cli, sets: dict[str, Path], protocol: str) -> None:
    result = evaluate("--id", sets["id"], "--ood", f"digits={sets['digits']}", "--json", "-q", "--protocol", protocol)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [p["protocol"] for p in json.loads(result.stdout)["pairs"]] == [protocol]


def test_several_in_domain_sources(evaluate: Cli, sets: dict[str, Path]) -> None:
    first, *others = sorted(sets["id"].iterdir())
    arguments = [part for file in others for part in ("--id", file)]
    result = evaluate("--id", first, *arguments, "--ood", f"digits={sets['digits']}", "--json", "--protocol", "matched")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["pairs"][0]["n_id"] == 16


def test_verdict_comes_first_and_counts_what_score_counts(
    evaluate: Cli, sets: dict[str, Path], tiny_detector: Detector
) -> None:
    result = evaluate("--id", sets["id"], "--ood", f"digits={sets['digits']}", "--protocol", "as-published")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    found = int(tiny_detector.score(sets["digits"]).is_ood.sum())
    alarms = int(tiny_detector.score(sets["id"]).is_ood.sum())
    assert f"digits, as-published: featdiff finds {found / 0.12:.1f} % of the OOD images ({found} of 12)" in text
    assert f"{alarms / 0.16:.1f} % of the in-domain images are flagged ({alarms} of 16), where 5 % were asked" in text
    first, second = result.stdout.split("\n\n")[:2]
    assert first.startswith("digits, as-published: featdiff finds")
    assert second.startswith("backbone test_resnet")


def test_table_has_featdiff_and_the_best_baseline(evaluate: Cli, sets: dict[str, Path]) -> None:
    command = ("--id", sets["id"], "--ood", f"digits={sets['digits']}", "--protocol", "matched")
    result = evaluate(*command)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 120

    heads = json.loads(evaluate(*command, "--json", "--baselines").stdout)["pairs"][0]["heads"]
    baselines = {name: metrics for name, metrics in heads.items() if name.startswith("baseline_")}
    best = max(baselines, key=lambda name: baselines[name]["auroc"])
    lines = result.stdout.split("digits (12 images), matched\n")[1].split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == ["featdiff", best]
    for line, name in zip(lines, ("featdiff", best), strict=True):
        low, high = heads[name]["auroc_ci"]
        numbers = [f"{100 * heads[name]['auroc']:.1f}", f"{100 * low:.1f}", "-", f"{100 * high:.1f}"]
        numbers += [f"{100 * heads[name][key]:.1f}" for key in ("fpr95", "aupr_in", "aupr_out")]
        assert line.split()[1:] == numbers
    assert f"the best of {len(baselines)} baselines" in " ".join(result.stdout.split())

    everything = evaluate(*command, "--all").stdout.split("digits (12 images), matched\n")[1].split("\n\n")[0]
    assert [line.split()[0] for line in everything.splitlines()] == list(heads)


def test_baselines_can_be_left_out(evaluate: Cli, sets: dict[str, Path], tmp_path: Path) -> None:
    """Unasked, they are measured for the table where the cache has what they need."""
    command = ("--id", sets["id"], "--ood", f"digits={sets['digits']}", "--protocol", "matched", "--all")
    without = evaluate(*command, "--no-baselines")
    assert without.exit_code == 0, without.output
    assert "baseline" not in without.output

    uncached = evaluate(*command, "--cache", tmp_path)
    assert uncached.exit_code == 0, uncached.output
    assert "baseline" not in uncached.stdout
    assert "no baselines: " in uncached.stderr and "292 of their 292 features" in uncached.stderr


def test_brackets_in_a_name_are_printed(evaluate: Cli, sets: dict[str, Path]) -> None:
    """They are text, not the table's markup."""
    result = evaluate("--id", sets["id"], "--ood", f"digits [/b]={sets['digits']}", "--protocol", "matched")
    assert result.exit_code == 0, result.output
    assert "[/b]" in result.stdout


def test_plots_are_beside_the_table(evaluate: Cli, sets: dict[str, Path], tmp_path: Path) -> None:
    command = ("--id", sets["id"], "--ood", f"digits={sets['digits']}", "--plots", tmp_path / "figures")
    result = evaluate(*command)
    assert result.exit_code == 0, result.output
    names = [
        f"{name}-{protocol}"
        for name in ("roc", "histograms", "contributions")
        for protocol in ("matched", "as-published")
    ]
    files = [f"{name}.{format}" for name in names for format in ("svg", "png")]
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == sorted(files)
    assert f"written: 12 pictures in {tmp_path / 'figures'}" in result.stderr
    assert "featdiff finds" in result.stdout

    (tmp_path / "file").write_text("")
    fails(evaluate(*command[:-1], tmp_path / "file"), 2, "--plots", "is a file")


def test_plots_of_several_models(featdiff_cli: Cli, tiny_model: Path, sets: dict[str, Path], tmp_path: Path) -> None:
    models = ("-m", tiny_model, "-m", tiny_model)
    sources = ("--id", sets["id"], "--ood", f"digits={sets['digits']}", "--protocol", "matched", "--json")
    result = featdiff_cli("eval", *models, *sources, "--plots", tmp_path)
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)) == 2
    names = {file.name for file in tmp_path.iterdir()}
    assert len(names) == 12
    assert {f"1-{tiny_model.name}-roc-matched.svg", f"2-{tiny_model.name}-roc-matched.svg"} <= names


def test_baselines_are_rows_of_their_own(evaluate: Cli, sets: dict[str, Path]) -> None:
    command = ("--id", sets["id"], "--ood", f"digits={sets['digits']}", "--protocol", "matched", "--json", "-q")
    result = evaluate(*command, "--baselines")
    assert result.exit_code == 0, result.output
    heads = json.loads(result.stdout)["pairs"][0]["heads"]
    assert [name for name in heads if name.startswith("baseline_")] == [
        *("baseline_knn", "baseline_mahalanobis", "baseline_mahalanobis_all", "baseline_pca"),
        *("baseline_mahalanobis_layer1", "baseline_mahalanobis_layer2", "baseline_mahalanobis_layer4"),
    ]
    assert list(heads)[: len(HEADS)] == HEADS
    assert all(heads[name]["auroc"] > 0.9 for name in ("baseline_knn", "baseline_mahalanobis_all"))


def test_baselines_need_the_features_of_training(evaluate: Cli, sets: dict[str, Path], tmp_path: Path) -> None:
    command = ("--id", sets["id"], "--ood", f"digits={sets['digits']}", "--cache", tmp_path)
    fails(evaluate(*command, "--baselines"), 2, "292 of their 292 features", str(tmp_path), "train once more")


def test_name_may_hold_anything_but_an_equals_sign(evaluate: Cli, sets: dict[str, Path], tmp_path: Path) -> None:
    """Only the first = separates: paths may hold more of them."""
    odd = tmp_path / "a=b"
    odd.mkdir()
    for file in sets["digits"].iterdir():
        (odd / file.name).write_bytes(file.read_bytes())
    result = evaluate("--id", sets["id"], "--ood", f"hand-written digits={odd}", "--json", "--protocol", "matched")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["pairs"][0]["ood"] == "hand-written digits"


def test_unreadable_images_are_left_out_said_and_give_code_3(
    evaluate: Cli, sets: dict[str, Path], tmp_path: Path
) -> None:
    for file in sets["digits"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "a_empty.png").write_bytes(b"")
    result = evaluate("--id", sets["id"], "--ood", f"digits={tmp_path}", "--json")
    document = json.loads(result.stdout)
    assert {(p["n_id"], p["n_ood"]) for p in document["pairs"]} == {(16, 12)}
    assert "unreadable" in result.stderr and "a_empty.png" in result.stderr
    assert result.exit_code == 3


@pytest.mark.parametrize("ood", ["digits", "=digits", "digits=", "="])
def test_wrong_ood_syntax(evaluate: Cli, sets: dict[str, Path], ood: str) -> None:
    fails(evaluate("--id", sets["id"], "--ood", ood), 2, "--ood takes NAME=IMAGES", repr(ood))


def test_name_given_twice_is_refused(evaluate: Cli, sets: dict[str, Path]) -> None:
    """Else the first of the two sets would be dropped without a word."""
    result = evaluate("--id", sets["id"], "--ood", f"a={sets['digits']}", "--ood", f"a={sets['sharp']}")
    fails(result, 2, "'a'")


def test_both_sides_are_needed(evaluate: Cli, sets: dict[str, Path]) -> None:
    fails(evaluate("--id", sets["id"]), 2, "--ood")
    fails(evaluate("--ood", f"a={sets['id']}"), 2, "--id")


def test_sets_that_cannot_be_read(evaluate: Cli, sets: dict[str, Path], tmp_path: Path) -> None:
    fails(evaluate("--id", sets["id"], "--ood", f"a={tmp_path}"), 2, str(tmp_path), "no images in this folder")
    fails(evaluate("--id", sets["id"], "--ood", "a=/gone"), 2, "/gone", "no such file or folder")
    (tmp_path / "bad.png").write_text("hello")
    fails(evaluate("--id", sets["id"], "--ood", f"broken={tmp_path}"), 2, "'broken'")


def test_wrong_options(featdiff_cli: Cli, evaluate: Cli, sets: dict[str, Path]) -> None:
    both = ("--id", sets["id"], "--ood", f"digits={sets['digits']}")
    fails(evaluate(*both, "--protocol", "match"), 2, "--protocol", "matched", "as-published")
    fails(featdiff_cli("eval", *both, "-m", "gone"), 1, "no featdiff model at gone")
