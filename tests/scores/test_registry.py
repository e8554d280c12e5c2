"""Scores that others add: how they are registered, found, joined, saved, and printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from helpers import FEATDIFF
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from featdiff import Detector
from featdiff.data.splits import split
from featdiff.evaluation.baselines import fit_baselines
from featdiff.exceptions import ModelError, UsageError
from featdiff.features.layout import FeatureLayout
from featdiff.scores import Context, Features, Score, register, registry
from featdiff.scores.registry import Options, baselines, heads, make_scores

LAYOUT = FeatureLayout.of_stages({"a": 4, "b": 6})
BUILT_IN_HEADS = ["mahalanobis", "mahalanobis_all", "pca", "energy", "msp", "vim", "neighbors"]
BUILT_IN_BASELINES = ["knn", "mahalanobis", "mahalanobis_all", "pca", "mahalanobis_stages"]


class Far(Score):
    """Distance of the last stage to its in-domain mean."""

    log_scale = True
    mean: Tensor

    def __init__(self, layout: FeatureLayout) -> None:
        super().__init__(layout)
        self.register_buffer("mean", torch.zeros(layout.last_stage.width))

    def fit(self, features: Features, context: Context | None = None) -> Self:
        self.mean.copy_(features[:][:, self.layout.last_stage.columns].mean(0))
        return self

    def forward(self, features: Tensor) -> Tensor:
        return (features[:, self.layout.last_stage.columns] - self.mean).norm(dim=1)


@pytest.fixture(autouse=True)
def _registrations() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(registry._entries)
    yield
    registry._entries.clear()
    registry._entries.update(before)
    Far.name = ""


# ---- registration ----


def test_built_in_scores() -> None:
    """Names are written into saved models and tables, which show baselines in this order."""
    assert heads() == BUILT_IN_HEADS
    assert baselines() == BUILT_IN_BASELINES


def test_a_class_is_built_from_a_layout() -> None:
    assert register("far", head=True)(Far) is Far
    (score,) = make_scores("far", LAYOUT, Options(rows=9))
    assert isinstance(score, Far)
    assert (score.name, score.layout) == ("far", LAYOUT)


def test_a_function_is_given_the_options_and_may_build_several() -> None:
    @register("each_stage", baseline=True)
    def each_stage(layout: FeatureLayout, options: Options) -> list[Score]:
        scores: list[Score] = []
        for part in layout.stages:
            score = Score(layout)
            score.name = f"{part.name}_{options.neighbors}"
            scores.append(score)
        return scores

    assert each_stage(LAYOUT, Options(1)) != []  # it is still what it was
    scores = make_scores("each_stage", LAYOUT, Options(rows=9, neighbors=3))
    assert [score.name for score in scores] == ["a_3", "b_3"]


def test_a_score_of_a_function_without_a_name_takes_the_registered_one() -> None:
    @register("far", head=True)
    def far(layout: FeatureLayout, options: Options) -> list[Score]:
        return [Far(layout)]

    assert [score.name for score in make_scores("far", LAYOUT, Options(9))] == ["far"]


@pytest.mark.parametrize(("head", "baseline"), [(True, False), (False, True), (True, True)])
def test_a_score_is_a_head_a_baseline_or_both(head: bool, baseline: bool) -> None:
    register("far", head=head, baseline=baseline)(Far)
    assert ("far" in heads(), "far" in baselines()) == (head, baseline)


def test_a_score_that_is_neither_is_refused() -> None:
    with pytest.raises(UsageError, match="the score 'far' must be a head, a baseline, or both"):
        register("far")
    with pytest.raises(UsageError, match="must be a head, a baseline, or both"):
        register("far", head=False, baseline=False)(Far)


def test_a_taken_name_is_refused() -> None:
    register("far", head=True)(Far)

    class Other(Score):
        pass

    with pytest.raises(UsageError, match=r"there is a score 'far' already \(.*test_registry\.Far\): choose another"):
        register("far", head=True)(Other)
    with pytest.raises(UsageError, match=r"there is a score 'mahalanobis' already \(featdiff\..*\): choose another"):
        register("mahalanobis", baseline=True)(Other)
    assert isinstance(make_scores("far", LAYOUT, Options(9))[0], Far)
    assert Other.name == ""


@pytest.mark.parametrize("name", ["featdiff", "fused", "layerwise", "mse", "mfsim", "lr"])
def test_a_name_that_detectors_use_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"detectors use the name '{name}' themselves: choose another name"):
        register(name, head=True)


def test_the_same_again_replaces_it() -> None:
    """A module that is loaded anew, a cell of a notebook that is run twice."""
    register("far", head=True)(Far)
    register("far", baseline=True)(Far)
    assert "far" in baselines() and "far" not in heads()


@pytest.mark.parametrize("name", ["mahalanobs", "Mahalanobis", "mahalanobis_al"])
def test_an_unknown_name_gets_a_hint(name: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown score '{name}'; did you mean .*mahalanobis.*known: knn, "):
        make_scores(name, LAYOUT, Options(9))


# ---- in a detector ----


@pytest.fixture
def train(sample_folders: dict[str, Path]) -> Path:
    return sample_folders["train"]


@pytest.fixture
def rows(tiny_detector: Detector, sample_folders: dict[str, Path]) -> Tensor:
    """Features of strangers and of fresh images."""
    parts = [tiny_detector.features(sample_folders[name])[1][:][:20] for name in ("digits", "test")]
    return torch.cat(parts)


def by_hand(detector: Detector, train: Path, rows: Tensor, names: list[str], weights: list[float]) -> np.ndarray:
    """The weighted sum of these scores, standardised by the validation images, then by those that calibrate."""
    table = detector.features(train)[1][:]
    assert len(table) == detector.n_images_
    parts = split(len(table), 0.2, 0.05, seed=0)

    def raw(x: Tensor) -> np.ndarray:
        scores = detector.heads_.all_scores(x)
        columns = [scores[name] if name == "layerwise" else scores[name].log() for name in names]
        return torch.stack(columns, 1).double().numpy()

    validation = raw(table[parts.validation])

    def fused(x: Tensor) -> np.ndarray:
        z = (raw(x) - validation.mean(0)) / np.maximum(validation.std(0), 0.05)
        return np.asarray(z @ (np.array(weights) / np.linalg.norm(weights)))

    calibration = fused(table[parts.calibration])
    np.testing.assert_allclose(
        np.sort((calibration - calibration.mean()) / calibration.std()),
        detector.calibration_.scores,
        rtol=1e-3,
        atol=1e-3,
    )
    return (fused(rows) - calibration.mean()) / calibration.std()


def test_fused_joins_a_score_of_the_user_s(train: Path, rows: Tensor, tiny_arguments: dict[str, Any]) -> None:
    register("far", head=True)(Far)
    detector = Detector(**tiny_arguments, extra_heads=["far"]).fit(train)
    assert list(detector.heads_.scores)[-2:] == ["neighbors", "far"]
    expected = by_hand(detector, train, rows, ["layerwise", "neighbors", "far"], [1, 4 / 3, 1])
    scores = detector.all_heads(rows)
    np.testing.assert_allclose(scores["featdiff"], expected, rtol=1e-3, atol=1e-3)

    last = detector.extractor_.layout.last_stage.columns
    bank = detector.feature_store().table([digest.tobytes() for digest in detector.bank_digests_])[:]
    distances = np.linalg.norm((rows - bank.mean(0))[:, last], axis=1)
    np.testing.assert_allclose(scores["far"], distances, rtol=1e-4)


def test_without_it_nothing_changes(
    train: Path, rows: Tensor, tiny_arguments: dict[str, Any], tiny_detector: Detector
) -> None:
    expected = by_hand(tiny_detector, train, rows, ["layerwise", "neighbors"], [1, 4 / 3])
    np.testing.assert_allclose(tiny_detector.score_features(rows), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("role", ["extra", "own"])
def test_it_is_saved_and_loaded_strictly(
    role: str, train: Path, rows: Tensor, tiny_arguments: dict[str, Any], tmp_path: Path
) -> None:
    register("far", head=True)(Far)
    further: dict[str, Any] = {"extra_heads": ["far"]} if role == "extra" else {"head": "far"}
    detector = Detector(**tiny_arguments, **further).fit(train)
    detector.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model")
    given, expected = loaded.all_heads(rows), detector.all_heads(rows)
    assert set(expected) - set(given) == {"lr"}  # the early network is saved only where it is the detector's own score
    for name, values in given.items():
        np.testing.assert_array_equal(expected[name], values)
    assert loaded.calibration_.scores.tolist() == detector.calibration_.scores.tolist()

    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("mean") and len(tensors[name]) == 96)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(ModelError):
        Detector.from_pretrained(tmp_path / "model")


def test_a_model_whose_score_is_not_there_says_so(train: Path, tiny_arguments: dict[str, Any], tmp_path: Path) -> None:
    register("far", head=True)(Far)
    Detector(**tiny_arguments, extra_heads=["far"]).fit(train).save_pretrained(tmp_path / "model")
    del registry._entries["far"]
    with pytest.raises(ModelError, match="unknown score 'far'"):
        Detector.from_pretrained(tmp_path / "model")


def test_it_can_be_the_detector_s_own(train: Path, rows: Tensor, tiny_arguments: dict[str, Any]) -> None:
    register("far", head=True)(Far)
    detector = Detector(**tiny_arguments, head="far").fit(train)
    assert detector.calibration_.scores.mean() == pytest.approx(0, abs=1e-4)
    assert detector.calibration_.scores.std() == pytest.approx(1, abs=1e-4)

    scores = detector.all_heads(rows)
    assert set(scores) == {
        *("featdiff", "layerwise", "mse", "mfsim", "lr"),
        *("layer_layer1", "layer_layer2", "layer_layer4"),
    }
    far = detector.heads_.scores["far"](rows).numpy()
    location, scale = (float(values[0]) for values in (detector.heads_.location, detector.heads_.scale))
    np.testing.assert_allclose(scores["featdiff"], (far - location) / scale, rtol=1e-4, atol=1e-4)


def test_any_registered_head_can_be_the_detector_s_own(
    train: Path, rows: Tensor, tiny_arguments: dict[str, Any], tiny_detector: Detector
) -> None:
    detector = Detector(**tiny_arguments, head="mahalanobis").fit(train)
    baseline = fit_baselines(tiny_detector)(rows)["baseline_mahalanobis"]
    order = np.argsort(baseline)
    assert (np.diff(detector.score_features(rows)[order]) >= -1e-4).all()


def test_logits_are_read_for_a_head_that_needs_them() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 5, 2)
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x)).mean((2, 3)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier().eval()
    images = torch.rand(80, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    recipe = {"epochs": 1, "min_steps": 5, "batch_size": 32}
    loader = DataLoader(TensorDataset(images), batch_size=40)
    detector = Detector(classifier, layers=["first"], head="energy", recipe=recipe, fpr=0.2).fit(loader)
    features = detector.extractor_(images[:5])
    energy = -classifier(images[:5]).logsumexp(1).detach()
    location, scale = detector.heads_.location[0], detector.heads_.scale[0]
    expected = (energy - location) / scale
    np.testing.assert_allclose(detector.score_features(features), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words", "argument"),
    [
        ({"extra_heads": ["mahalanobs"]}, "unknown score 'mahalanobs'; did you mean mahalanobis", "extra_heads"),
        ({"extra_heads": ["knn"]}, "unknown score 'knn'.*; known: .*mahalanobis", "extra_heads"),
        ({"extra_heads": ["neighbors"]}, "unknown score 'neighbors'", "extra_heads"),
        ({"extra_heads": ["pca", "pca"]}, "extra_heads must be a list of different names", "extra_heads"),
        ({"extra_heads": "pca"}, "extra_heads must be a list", "extra_heads"),
        ({"extra_heads": ["pca"], "head": "mse"}, "extra_heads are joined by head='fused' only", "extra_heads"),
        ({"extra_heads": ["energy"]}, "energy need logits: give a classifier", "extra_heads"),
        ({"head": "energy"}, "energy need logits: give a classifier", "head"),
        ({"head": "mahalanobs"}, "unknown head 'mahalanobs'; did you mean mahalanobis", "head"),
        ({"head": "neighbors"}, "unknown head 'neighbors'", "head"),
    ],
)
def test_wrong_names_are_refused_before_any_work(arguments: dict[str, Any], words: str, argument: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Detector(**arguments)
    assert caught.value.argument == argument


def test_a_score_that_is_a_baseline_only_cannot_be_joined() -> None:
    register("far", baseline=True)(Far)
    with pytest.raises(UsageError, match="unknown score 'far'"):
        Detector(extra_heads=["far"])


# ---- beside a detector ----


def test_a_baseline_of_the_user_s_stands_beside_the_others(tiny_detector: Detector, rows: Tensor) -> None:
    before = fit_baselines(tiny_detector)
    register("far", baseline=True)(Far)
    after = fit_baselines(tiny_detector)
    assert list(after.scores) == [*before.scores, "baseline_far"]
    assert set(after.seconds) == set(after.scores) and after.seconds["baseline_far"] > 0
    assert after.scores["baseline_far"].nbytes == 96 * 4

    bank = tiny_detector.feature_store().table([digest.tobytes() for digest in tiny_detector.bank_digests_])[:]
    last = tiny_detector.extractor_.layout.last_stage.columns
    expected = np.linalg.norm((rows - bank.mean(0))[:, last], axis=1)
    np.testing.assert_allclose(after(rows)["baseline_far"], expected, rtol=1e-4)


def evaluation(tiny_model: Path, sample_folders: dict[str, Path]) -> list[str]:
    """Arguments of ``featdiff eval`` on three images of each set."""
    sources = [sorted(sample_folders[name].iterdir())[:3] for name in ("test", "digits")]
    arguments = [part for file in sources[0] for part in ("--id", str(file))]
    arguments += ["--ood", f"digit={sources[1][0]}", "-m", str(tiny_model), "--protocol", "as-published"]
    return ["eval", *arguments, "--baselines", "--json", "-q"]


def test_the_command_prints_a_baseline_of_the_user_s(
    featdiff_cli: Any, tiny_model: Path, sample_folders: dict[str, Path]
) -> None:
    register("far", baseline=True)(Far)
    result = featdiff_cli(*evaluation(tiny_model, sample_folders))
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)["pairs"][0]["heads"])[-1] == "baseline_far"


# ---- in a package of their own ----

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "1.0"

[project.entry-points."featdiff.scores"]
scores = "{module}"

[tool.setuptools]
py-modules = ["{module}"]
"""
GOOD = """
import torch
from featdiff.scores import Score, register


@register("largest_value", head=True, baseline=True)
class LargestValue(Score):
    def __init__(self, layout):
        super().__init__(layout)
        self.register_buffer("mean", torch.zeros(()))

    def fit(self, features, context=None):
        self.mean.copy_(features[:].amax(1).mean())
        return self

    def forward(self, features):
        return (features.amax(1) - self.mean).abs()
"""
BROKEN = 'raise RuntimeError("no licence was found\\nsee the manual")'


def installed(folder: Path, name: str, module: str, code: str) -> dict[str, str]:
    """Install a package of one module into a folder of its own; the environment in which Python finds it."""
    project = folder / "project"
    project.mkdir(parents=True)
    (project / "pyproject.toml").write_text(PROJECT.format(name=name, module=module))
    (project / f"{module}.py").write_text(code)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", folder / "packages", project], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = [str(folder / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def test_scores_of_an_installed_package_are_found(
    tiny_model: Path, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    environment = installed(tmp_path, "featdiff-largest", "featdiff_largest", GOOD)
    command = [FEATDIFF, *evaluation(tiny_model, sample_folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "baseline_largest_value" in json.loads(done.stdout)["pairs"][0]["heads"]

    code = "from featdiff import Detector; print(Detector(extra_heads=['largest_value']).settings.extra_heads)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.stderr) == ("['largest_value']", "")


def test_a_package_that_cannot_be_loaded_is_named(
    tiny_model: Path, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    environment = installed(tmp_path, "featdiff-broken", "featdiff_broken", BROKEN)
    command = [FEATDIFF, *evaluation(tiny_model, sample_folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "Error: the scores of the package featdiff-broken (featdiff_broken) cannot be loaded: no licence was found\n"
    )
