"""A detector that looks at places as well: small defects, two p-values, heat maps, and when it does without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from defect_pictures import SIDE, plates
from PIL import Image
from tiny_backbones import one_line

from featdiff import Detector, Guard
from featdiff.data.splits import make_plan
from featdiff.detectors.local_fit import LocalFit
from featdiff.evaluation.protocols import ScoredPair, evaluate_detector
from featdiff.exceptions import FeatdiffError, ModelError, UsageError
from featdiff.features.backbones import load_backbone
from featdiff.features.geometry import onto_picture, seen_box
from featdiff.files import model_folder
from featdiff.verdicts.calibration import Calibration

pytestmark = pytest.mark.usefixtures("decided_locally")
OPTIONS: dict[str, Any] = {"size": SIDE, "recipe": {"epochs": 2, "min_steps": 50}, "calibration": 0.3, "fpr": 0.1}


@pytest.fixture(scope="module")
def normal() -> list[Image.Image]:
    return plates(80, seed=0)


@pytest.fixture(scope="module")
def detector(normal: list[Image.Image]) -> Detector:
    return Detector(**OPTIONS).fit(normal)


@pytest.fixture(scope="module")
def saved(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "model"
    detector.save_pretrained(folder)
    return folder


def test_auto_looks_at_places_of_images_that_are_alike(detector: Detector) -> None:
    assert detector.local_ is not None
    assert detector.local_note_.startswith("local score: on, the images are alike (variety 0.")
    assert list(detector.extractor_.maps) == ["blocks.4", "blocks.5", "blocks.6"]
    assert detector.local_.nbytes < 2e6


def test_a_small_defect_is_found_by_its_place(detector: Detector) -> None:
    good, bad = detector.score(plates(40, seed=1)), detector.score(plates(20, seed=2, defect=True))
    assert list(good.p_values) == ["global", "local"]
    assert (bad.p_values["local"] <= 0.1).mean() >= 0.9
    assert bad.is_ood.mean() >= 0.9
    assert good.is_ood.mean() <= 0.3
    assert good.columns[5:8] == ["is_ood", "p_value_global", "p_value_local"]
    first = next(iter(bad.rows()))
    assert first["p_value_local"] == pytest.approx(bad.p_values["local"][0], rel=1e-6)
    assert bad[0].p_values == {name: values[0] for name, values in bad.p_values.items()}
    assert "p_value_local" in bad.to_pandas()


def test_verdict_and_parts_have_calibrations_of_their_own(detector: Detector) -> None:
    assert detector.local_ is not None
    count = len(detector.calibration_)
    for name, calibration in detector.local_.calibrations.items():
        assert len(calibration) == count, name
    scores = detector.score(plates(10, seed=3, defect=True))
    expected = detector.calibration_.p_values(scores.ood_score)
    assert np.array_equal(scores.p_value, expected)


def test_heat_is_highest_at_the_defect(detector: Detector) -> None:
    explanation = detector.explain(plates(1, seed=4, defect=True)[0])
    assert explanation.hottest is not None and explanation.heat_threshold is not None
    across, down = explanation.hottest
    assert abs(across - 101) <= 24 and abs(down - 102) <= 24
    assert explanation.heat is not None and np.nanmax(explanation.heat) > explanation.heat_threshold
    assert set(explanation.p_values) == {"global", "local"}
    assert json.loads(json.dumps(explanation.to_json()))["p_values"]["local"] <= 0.1
    assert any("lower right" in reason for reason in explanation.reasons)


def test_a_stricter_rate_has_a_higher_threshold_of_heat(detector: Detector) -> None:
    mild, strict = detector.heat_scale(0.3), detector.heat_scale(0.1)
    assert mild is not None and strict is not None
    assert mild[0] < strict[0] <= strict[1]
    assert mild[1] == strict[1]


def test_score_and_heat_of_an_explanation_come_from_one_pass(detector: Detector) -> None:
    image = plates(1, seed=4, defect=True)[0]
    expected = detector.score([image])
    assert detector.local_ is not None
    maps = detector.extractor_.maps_of(detector.extractor_.transform(image)[None])
    (heat,) = detector.local_.joint.local(maps)[1].numpy()

    passes: list[int] = []
    network = detector.extractor_.model
    stem = network.get_submodule("conv_stem")
    handle = stem.register_forward_hook(lambda module, pixels, output: passes.append(len(output)))
    found = detector.explain(image)
    handle.remove()

    assert passes == [1]
    assert (found.ood_score, found.p_value) == (expected.ood_score[0], expected.p_value[0])
    assert found.p_values == {name: values[0] for name, values in expected.p_values.items()}
    box = seen_box(detector.extractor_.backbone.data_config, SIDE, SIDE)
    assert found.heat is not None and np.array_equal(found.heat, onto_picture(heat, box, SIDE, SIDE))


def test_contributions_of_an_evaluation_add_up_to_the_global_score(detector: Detector) -> None:
    scored: list[ScoredPair] = []
    sets = {"scratched": plates(8, seed=2, defect=True)}
    evaluate_detector(detector, plates(10, seed=1), sets, ["as-published"], scored=scored)
    (pair,) = scored
    for parts, scores in ((pair.id_contributions, pair.id_scores), (pair.ood_contributions, pair.ood_scores)):
        np.testing.assert_allclose(sum(parts.values()), scores["global"], atol=1e-4)
        assert not np.allclose(scores["global"], scores["featdiff"], atol=1e-2)


def test_saved_and_loaded_it_gives_the_same_scores(detector: Detector, saved: Path) -> None:
    loaded = Detector.from_pretrained(saved)
    images = plates(6, seed=5, defect=True)
    before, after = detector.score(images), loaded.score(images)
    assert np.array_equal(before.ood_score, after.ood_score)
    assert np.array_equal(before.p_values["local"], after.p_values["local"])
    assert loaded.extractor_.key() == detector.extractor_.key()


def test_a_guard_gives_the_same_verdict_from_the_classifiers_own_pass(detector: Detector) -> None:
    classifier = load_backbone(size=SIDE).model
    guard = Guard(classifier, detector)
    images = plates(4, seed=6, defect=True)
    pixels = torch.stack([detector.extractor_.transform(image) for image in images])
    with torch.inference_mode():
        _, verdict = guard(pixels)
    scores = detector.score(images)
    assert verdict is not None
    assert np.allclose(verdict.ood_score.numpy(), scores.ood_score, atol=1e-3)
    assert np.allclose(verdict.p_values["local"].numpy(), scores.p_values["local"])


def test_without_the_local_score_nothing_else_changes(detector: Detector, normal: list[Image.Image]) -> None:
    images = plates(10, seed=7)
    plain = Detector(**OPTIONS, local=False).fit(normal)
    assert plain.local_ is None and plain.local_note_ == "local score: off, as asked"
    expected = plain.score(images)
    assert expected.p_values == {}
    assert np.allclose(detector.without_local().score(images).ood_score, expected.ood_score, atol=1e-5)
    assert np.allclose(detector.score(images).p_values["global"], expected.p_value)


def test_auto_does_without_where_images_differ_or_cannot_be_read_again(sample_folders: dict[str, Path]) -> None:
    different = sorted(sample_folders["train"].iterdir())[::10] + sorted(sample_folders["digits"].iterdir())[::10]
    detector = Detector(**OPTIONS).fit(different)
    assert detector.local_ is None
    assert detector.extractor_.maps == {}  # no pass reads what nobody looks at
    assert "the images show different things (variety " in detector.local_note_

    pixels = [detector.extractor_.transform(image)[None] for image in plates(50, seed=0)]
    detector.fit(iter(pixels))
    assert "can be read again" in detector.local_note_


@pytest.mark.parametrize(
    ("changes", "count", "reason"),
    [
        ({"head": "mse"}, 50, "it is joined with head='fused' only"),
        ({}, 30, "it needs at least 40 different images"),
    ],
)
def test_a_local_score_that_cannot_be_had_is_refused(changes: dict[str, Any], count: int, reason: str) -> None:
    with pytest.raises(UsageError) as error:
        Detector(**{**OPTIONS, **changes}, local=True).fit(plates(count, seed=0))
    assert reason in one_line(error) and error.value.argument == "local"


def test_a_wrong_value_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        Detector(local="on")
    assert one_line(error) == "local must be \"auto\", True or False, not 'on'"


def test_an_image_that_changes_while_it_is_learned_ends_the_fit(tmp_path: Path) -> None:
    files = []
    for i, image in enumerate(plates(50, seed=8)):
        files.append(tmp_path / f"{i:02}.png")
        image.save(files[-1])

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "training":
            plates(1, seed=9)[0].save(files[7])

    with pytest.raises(FeatdiffError, match=r"07\.png changed while it was learned: it holds something else"):
        Detector(**OPTIONS).fit(files, progress=progress)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config, tensors = model_folder.load(folder)
    for name in ("format", "format_version", model_folder.DIGEST):
        config.pop(name, None)
    change(config)
    model_folder.save(folder, config, tensors)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "tensors"),
        ({"blocks.4": 112}, "tensors"),
        ({"blocks.9": 112}, "gives no maps"),
        ({"blocks.4": "many"}, "local is not what it should be"),
    ],
)
def test_a_damaged_local_score_is_refused(saved: Path, tmp_path: Path, value: object, reason: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    edit_config(folder, lambda config: config.update(local=value))
    with pytest.raises(ModelError) as error:
        Detector.from_pretrained(folder)
    assert reason in one_line(error)


def test_with_folds_no_image_is_compared_with_itself(detector: Detector) -> None:
    plan = make_plan(60, "auto", 0.05, 0)
    fit = LocalFit(detector.extractor_, lambda numbers: iter(()), [b""] * 60, 0, Path())
    parts = fit._of_folds(plan)
    assert np.array_equal(np.concatenate([part.scored for part in parts]), plan.calibration)
    for part in parts[:-1]:
        for others in (part.training, part.compared):
            assert not np.intersect1d(part.scored, others).size
    assert len(parts[-1].training) == len(parts[-1].compared) == 60

    split = make_plan(1000, 0.2, 0.05, 0).final
    (only,) = fit._of_split(split)
    assert not np.intersect1d(only.training, only.compared).size
    assert not np.intersect1d(np.union1d(only.training, only.compared), only.scored).size
    assert len(np.union1d(only.training, only.compared)) == len(split.training) + len(split.validation)


def test_false_alarms_hold_with_two_scores(normal: list[Image.Image]) -> None:
    detector = Detector(**{**OPTIONS, "calibration": "auto"}).fit(normal)
    assert detector.local_ is not None
    scores = detector.score(plates(200, seed=10))
    # 0.1 is asked for: two standard deviations of the share that 80 calibration images may give, and of 200 draws
    assert 0.02 <= scores.is_ood.mean() <= 0.1 + 2 * np.sqrt(0.09 / 80 + 0.09 / 200)
    assert isinstance(detector.local_.calibrations["local"], Calibration)
