"""Detectors whose backbone runs in another engine: scores and verdicts are PyTorch's, and models need no engine."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from defect_pictures import SIDE, plates
from tiny_backbones import one_line
from torch import nn

from featdiff import Detector, PixelDetector
from featdiff.detectors import feature_scoring
from featdiff.evaluation.baselines import fit_baselines
from featdiff.exceptions import OtherEngine, UsageError
from featdiff.export.export import Rows
from featdiff.features import engines
from featdiff.features.conversions import OPENVINO, has_bfloat16
from featdiff.files import model_folder
from featdiff.outliers.synthesis import self_check

LIMIT = 1e-4


@pytest.fixture(scope="module")
def arguments(tiny_arguments: dict[str, Any]) -> dict[str, Any]:
    return tiny_arguments


@pytest.fixture(scope="module")
def by_torch(arguments: dict[str, Any], sample_folders: dict[str, Path]) -> Detector:
    return Detector(**arguments, engine="torch").fit(sample_folders["train"])


@pytest.fixture(scope="module")
def by_openvino(arguments: dict[str, Any], sample_folders: dict[str, Path]) -> Detector:
    return Detector(**arguments, engine="openvino").fit(sample_folders["train"])


def test_scores_and_verdicts_are_those_of_torch(
    by_openvino: Detector, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert by_openvino.engine_note_.startswith("openvino 2") and by_openvino.extractor_.engine.startswith("openvino 2")
    by_openvino.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model", engine="torch")
    for name in ("test", "digits"):
        given, expected = by_openvino.score(sample_folders[name]), loaded.score(sample_folders[name])
        assert 0 < np.abs(given.ood_score - expected.ood_score).max() < LIMIT
        assert np.array_equal(given.is_ood, expected.is_ood)
    assert loaded.extractor_.engine == "torch" and loaded.engine_note_ == "torch, as asked"


def test_a_model_names_its_engine_and_another_may_load_it(
    by_openvino: Detector, by_torch: Detector, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, detector in (("torch", by_torch), ("openvino", by_openvino)):
        detector.save_pretrained(tmp_path / name)
        config, _ = model_folder.load(tmp_path / name)
        assert config["backbone"]["engine"].split()[0] == name
        assert "engine" not in config["settings"]

    by_onnx = Detector.from_pretrained(tmp_path / "torch", engine="onnxruntime")
    given, expected = by_onnx.score(sample_folders["digits"]), by_torch.score(sample_folders["digits"])
    assert by_onnx.engine_note_.startswith("onnxruntime 1")
    assert np.abs(given.ood_score - expected.ood_score).max() < LIMIT


def test_training_features_are_found_whatever_engine_runs_now(
    by_openvino: Detector, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    by_openvino.save_pretrained(tmp_path / "model")
    for engine in ("torch", "onnxruntime"):
        loaded = Detector.from_pretrained(tmp_path / "model", engine=engine)
        assert set(fit_baselines(loaded).scores) == set(fit_baselines(by_openvino).scores)
        loaded.score(sorted(sample_folders["test"].iterdir())[:3])
        assert loaded.extractor_.engine.startswith(engine)
        fit_baselines(loaded)
    assert self_check(by_openvino) >= 0


def test_a_request_that_is_refused_builds_no_engine(
    by_torch: Detector, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    by_torch.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model", engine="openvino")
    with pytest.raises(UsageError, match="fpr 1e-06 needs"):
        loaded.score(sample_folders["test"], fpr=1e-6)
    assert loaded.engine_note_ == ""


def test_scores_do_not_depend_on_the_batch(by_openvino: Detector, sample_folders: dict[str, Path]) -> None:
    files = sorted(sample_folders["digits"].iterdir())[:20]
    together = by_openvino.score(files).ood_score
    alone = [by_openvino.score(file).ood_score[0] for file in files]
    turned = by_openvino.score(files[::-1]).ood_score[::-1]
    assert np.allclose(together, alone, atol=1e-5) and np.allclose(together, turned, atol=1e-5)


def test_auto_waits_for_enough_images(
    arguments: dict[str, Any], sample_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(sample_folders["train"].iterdir())
    monkeypatch.setattr(feature_scoring, "WORTH_AN_ENGINE", 100)
    detector = Detector(**arguments).fit(files[:99])
    assert detector.extractor_.engine == "torch" and detector.engine_note_ == ""

    before = detector.score(files).ood_score  # enough to look for one now
    assert detector.engine_note_
    detector.extractor_.choose_engine("torch", detector.extractor_.probe())
    assert np.abs(detector.score(files[:50]).ood_score - before[:50]).max() < LIMIT


def test_an_engine_that_changes_scores_is_left(
    arguments: dict[str, Any], sample_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_scoring, "_MOST_CHANGE", 0.0)  # not even rounding
    detector = Detector(**arguments, engine="openvino", fpr=0.1).fit(sorted(sample_folders["train"].iterdir())[:60])
    assert detector.extractor_.engine == "torch"
    note = detector.engine_note_
    assert note.startswith("torch, for openvino 2") and note.endswith("changes scores")


def test_a_module_of_ones_own_is_traced_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_scoring, "WORTH_AN_ENGINE", 1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU())
    pixels = torch.rand(60, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"layers": ["1", "3"], "recipe": {"epochs": 1, "min_steps": 5}, "calibration": 0.4}
    plain = Detector(network, **options).fit(iter([pixels]))
    asked = Detector(network, **options, engine="openvino").fit(iter([pixels]))
    assert plain.extractor_.engine == "torch"
    assert asked.extractor_.engine.startswith("openvino")
    fresh = torch.rand(30, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    by_engine = asked.score(iter([fresh])).ood_score
    # another fit, where a digit of what is kept may be rounded otherwise
    assert np.abs(plain.score(iter([fresh])).ood_score - by_engine).max() < 0.01
    asked.extractor_.choose_engine("torch", fresh)
    assert asked.extractor_.engine == "torch"
    assert np.abs(asked.score(iter([fresh])).ood_score - by_engine).max() < LIMIT


def test_an_export_is_made_of_torch(by_openvino: Detector) -> None:
    pixels = by_openvino.extractor_.probe()
    (given,) = Rows(by_openvino.extractor_)(pixels)
    assert torch.equal(given, by_openvino.extractor_.in_torch()(pixels))


@pytest.mark.usefixtures("decided_locally")
def test_the_local_score_takes_its_maps_from_the_engine() -> None:
    options: dict[str, Any] = {"size": SIDE, "recipe": {"epochs": 1, "min_steps": 20}, "calibration": 0.4, "fpr": 0.1}
    detector = Detector(**options, engine="openvino").fit(plates(50, seed=0))
    assert detector.local_ is not None and detector.extractor_.engine.startswith("openvino")
    assert self_check(detector) >= 0  # it looks up the features of fit by the global score alone
    assert detector.without_local().extractor_.engine == detector.extractor_.engine

    images = [*plates(5, seed=1), *plates(5, seed=2, defect=True)]
    given = detector.score(images)
    heat = detector.explain(images[-1]).heat
    detector.extractor_.choose_engine("torch", detector.extractor_.probe())
    expected = detector.score(images)
    assert np.abs(given.ood_score - expected.ood_score).max() < 10 * LIMIT * np.abs(expected.ood_score).max()
    assert np.array_equal(given.p_values["local"], expected.p_values["local"])
    again = detector.explain(images[-1]).heat
    assert heat is not None and again is not None
    assert np.allclose(heat, again, atol=0.01)


@pytest.mark.parametrize("value", ["onnx", "", 3])
def test_an_unknown_engine_is_refused(value: object) -> None:
    with pytest.raises(UsageError) as error:
        Detector(engine=value)
    assert error.value.argument == "engine" and "openvino" in one_line(error)


def test_the_pixel_mode_has_no_engines() -> None:
    with pytest.raises(UsageError, match="the pixel mode runs in PyTorch alone"):
        PixelDetector(engine="openvino")
    PixelDetector(engine="torch")


def test_bfloat16_fits_calibrates_and_scores(
    arguments: dict[str, Any], by_torch: Detector, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    files = sorted(sample_folders["train"].iterdir())
    detector = Detector(**arguments, precision="bf16").fit(files)
    assert detector.precision_ == "bfloat16 autocast"
    detector.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model")
    assert loaded.settings.precision == "bf16" and loaded.extractor_.precision == "bfloat16 autocast"

    scores = loaded.score(sample_folders["digits"])
    assert np.array_equal(scores.ood_score, detector.score(sample_folders["digits"]).ood_score)
    change = np.abs(scores.ood_score - by_torch.score(sample_folders["digits"]).ood_score)
    assert 0 < change.max() < 0.5

    digests = set(detector.calibration_digests_)
    paths, _ = loaded.features(files)
    held_out = [path for path in paths if hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest() in digests]
    assert held_out
    assert set(loaded.score(held_out).ood_score) <= set(detector.calibration_.scores)


@pytest.fixture(scope="module")
def in_bfloat16(arguments: dict[str, Any], sample_folders: dict[str, Path]) -> Detector:
    """Fitted by OpenVINO in bfloat16."""
    if not has_bfloat16(OPENVINO):
        pytest.skip("this processor has no bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_scoring, "WORTH_AN_ENGINE", 100)
        patch.setattr(engines, "_gains", lambda before, after, pixels: [2.0] * len(after))
        return Detector(**arguments, precision="bf16").fit(sample_folders["train"])


def test_an_engine_in_bfloat16_is_as_near_as_pytorch(
    in_bfloat16: Detector, by_torch: Detector, sample_folders: dict[str, Path]
) -> None:
    assert re.fullmatch(r"openvino \S+, 2.0 x as fast as torch", in_bfloat16.engine_note_)
    given, expected = (each.score(sample_folders["digits"]).ood_score for each in (in_bfloat16, by_torch))
    assert 1e-3 < np.abs(given - expected).max() < 0.5


def test_in_bfloat16_a_few_images_meet_the_engine_of_the_fit(
    in_bfloat16: Detector, sample_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calibration images were seen through it, and each engine rounds in its own way."""
    files = sorted(sample_folders["digits"].iterdir())[:5]
    expected = in_bfloat16.score(files).ood_score
    in_bfloat16.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model")
    assert np.allclose(loaded.score(files).ood_score, expected, atol=1e-5)
    assert loaded.extractor_.engine == in_bfloat16.engine_

    monkeypatch.setitem(engines._PACKAGES, OPENVINO, ("no_such_package_at_all",))
    without = Detector.from_pretrained(tmp_path / "model")
    with pytest.warns(OtherEngine, match="fitted in bfloat16 by openvino, and PyTorch rounds otherwise: install"):
        moved = without.score(files).ood_score
    assert without.engine_note_ == "torch, for openvino is not installed"
    assert 1e-4 < np.abs(moved - expected).max() < 0.5


def test_in_bfloat16_an_engine_far_from_float32_is_left(
    in_bfloat16: Detector, sample_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_bfloat16.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model")
    monkeypatch.setattr(feature_scoring, "_MOST_ERROR", -1.0)
    loaded.score(sorted(sample_folders["digits"].iterdir())[:5])
    assert loaded.extractor_.engine == "torch" and loaded.engine_note_.endswith("changes scores")


def test_in_bfloat16_what_pytorch_fitted_stays_with_it(
    arguments: dict[str, Any], sample_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector(**arguments, precision="bf16").fit(sample_folders["train"])
    monkeypatch.setattr(feature_scoring, "WORTH_AN_ENGINE", 1)
    detector.score(sample_folders["digits"])
    assert detector.extractor_.engine == "torch" and detector.engine_note_ == ""


def test_a_module_runs_in_its_own_precision() -> None:
    with pytest.raises(UsageError, match="a module runs in the precision that it has") as error:
        Detector(nn.Conv2d(3, 8, 3), precision="bf16")
    assert error.value.argument == "precision"
