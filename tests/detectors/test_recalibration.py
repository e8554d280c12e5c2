"""A detector with a calibration from elsewhere: rates that hold there, scores that stay, and what is refused."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from defect_pictures import SIDE, plates
from PIL import Image, ImageEnhance
from small_detectors import pictures
from small_pixels import PIXEL

from featdiff import Detector, PixelDetector
from featdiff.detectors.recalibration import recalibrate
from featdiff.exceptions import LargeShift, ModelError, NearCopiesFound, UsageError
from featdiff.files import model_folder
from featdiff.verdicts.shares import interval_of_share, range_of_rate


def brighter(images: list[Image.Image], factor: float) -> list[Image.Image]:
    return [ImageEnhance.Brightness(image).enhance(factor) for image in images]


@pytest.fixture(scope="module")
def elsewhere(sample_folders: dict[str, Path]) -> list[Image.Image]:
    """130 tiles that no detector was fitted on, by a camera that sees them darker; in no order."""
    tiles = pictures(sorted(map(str, sample_folders["test"].iterdir())))
    return [brighter(tiles, 0.6)[i] for i in np.random.default_rng(0).permutation(len(tiles))]


# ---- what it is for ----


def test_the_rate_holds_elsewhere(tiny_detector: Detector, elsewhere: list[Image.Image]) -> None:
    """Images that took no part are flagged at about the rate; before, far more of them were."""
    rate = 0.1
    changed = recalibrate(tiny_detector, elsewhere[:65], fpr=rate, groups="none")
    before, after = (detector.score(elsewhere[65:], fpr=rate) for detector in (tiny_detector, changed.detector))
    assert before.flagged >= 12
    assert after.flagged <= 14  # 6.5 are expected; more than 14 are rarer than one in a thousand
    assert np.array_equal(after.ood_score, before.ood_score)

    assert changed.share is not None
    share, low, high = changed.share
    assert changed.flagged == tiny_detector.score(elsewhere[:65], fpr=rate).flagged
    assert share == changed.flagged / 65 > 0.2
    assert (low, high) == interval_of_share(share, 65)
    assert low > rate  # so many are no chance
    assert changed.expected == range_of_rate(rate, 65)


def test_p_values_count_the_new_images(tiny_detector: Detector, elsewhere: list[Image.Image]) -> None:
    new = recalibrate(tiny_detector, elsewhere[:40], groups="none").detector
    held_out = tiny_detector.score(elsewhere[:40]).ood_score
    scores = new.score(elsewhere[60:80])
    counted = [(1 + int((held_out >= score).sum())) / 41 for score in scores.ood_score]
    assert scores.p_value == pytest.approx(counted, abs=1e-12)
    assert len(new.calibration_) == new.calibration_.groups == 40
    layers = {name: np.sort(column) for name, column in tiny_detector.score(elsewhere[:40]).layers.items()}
    found = {name: calibration.scores for name, calibration in new.calibration_.layers.items()}
    assert found == {name: pytest.approx(column, abs=1e-5) for name, column in layers.items()}
    assert new.fpr == tiny_detector.fpr


def test_the_old_detector_stays_as_it_is(tiny_detector: Detector, elsewhere: list[Image.Image]) -> None:
    before = {name: values.clone() for name, values in tiny_detector.tensors().items()}
    config = copy.deepcopy(tiny_detector.config())
    new = recalibrate(tiny_detector, elsewhere[:30], fpr=0.2, groups="none").detector
    assert tiny_detector.config() == config
    after, others = tiny_detector.tensors(), new.tensors()
    for name, values in before.items():
        assert torch.equal(after[name], values), name
        assert torch.equal(others[name], values) == (name not in ("calibration", "calibration_of_layers")), name


def test_images_of_the_same_content_count_once(tiny_detector: Detector, elsewhere: list[Image.Image]) -> None:
    twice = recalibrate(tiny_detector, elsewhere[:25] + elsewhere[:5], groups="none")
    assert (len(twice.detector.calibration_), twice.n_duplicates) == (25, 5)


# ---- saved ----


def test_saved_and_loaded(tiny_detector: Detector, elsewhere: list[Image.Image], tmp_path: Path) -> None:
    """The verdicts and the record come back, also after a second time."""
    first = recalibrate(tiny_detector, elsewhere[:40], fpr=0.1, groups="none")
    first.detector.save_pretrained(tmp_path / "first")
    loaded = Detector.from_pretrained(tmp_path / "first")
    assert loaded.fpr == 0.1
    assert np.array_equal(loaded.score(elsewhere[60:70]).p_value, first.detector.score(elsewhere[60:70]).p_value)

    recalibrate(loaded, elsewhere[40:80], groups="none").detector.save_pretrained(tmp_path / "second")
    records = json.loads((tmp_path / "second" / "config.json").read_text())["recalibrations"]
    assert records[0] == first.facts()
    assert (records[0]["images"], records[0]["old_flagged"]) == (40, first.flagged)
    assert records[0]["old_threshold"] == tiny_detector.calibration_.threshold(0.1)
    assert records[1]["old_threshold"] == records[0]["threshold"] == first.detector.calibration_.threshold(0.1)
    assert Detector.from_pretrained(tmp_path / "second").recalibrations_ == tuple(records)


@pytest.mark.parametrize("record", ["often", {"images": 3}, [3]])
def test_a_damaged_record_is_refused(tiny_model: Path, tmp_path: Path, record: object) -> None:
    config, tensors = model_folder.load(tiny_model)
    model_folder.write_pair(tmp_path, config | {"recalibrations": record}, tensors)
    with pytest.raises(ModelError, match="recalibrations are not what they should be"):
        Detector.from_pretrained(tmp_path)


# ---- what belongs together ----


@pytest.fixture(scope="module")
def bursts(elsewhere: list[Image.Image]) -> list[Image.Image]:
    """24 tiles of elsewhere, each five times with a little noise."""
    rng = np.random.default_rng(0)
    tiles = np.repeat(np.stack([np.asarray(image) for image in elsewhere[:24]]), 5, axis=0).astype(int)
    return [
        Image.fromarray(tile) for tile in np.clip(tiles + rng.integers(-3, 4, tiles.shape), 0, 255).astype(np.uint8)
    ]


def test_bursts_are_found_and_count_as_one(tiny_detector: Detector, bursts: list[Image.Image]) -> None:
    with pytest.warns(NearCopiesFound, match="no independent evidence, so near-copies count together"):
        changed = recalibrate(tiny_detector, bursts, fpr=0.1)
    calibration = changed.detector.calibration_
    groups = calibration.groups
    assert len(calibration) == 120
    assert 22 <= groups <= 24  # tiles may be alike
    assert changed.expected == range_of_rate(0.1, groups)
    strange = tiny_detector.calibration_.scores[-1] + 100
    assert calibration.p_values(np.array([strange])).tolist() == [1 / (groups + 1)]

    given = recalibrate(tiny_detector, bursts, fpr=0.1, groups=[i // 5 for i in range(120)])
    assert given.detector.calibration_.groups == 24
    assert changed.share is not None
    assert given.share is not None
    assert given.share[0] == changed.share[0]
    alone = recalibrate(tiny_detector, bursts, fpr=0.1, groups="none")
    assert alone.detector.calibration_.groups == 120
    assert alone.share is not None
    assert alone.share[2] - alone.share[1] < given.share[2] - given.share[1]  # 24 say less than 120


# ---- refused, and warned of ----


def test_training_images_are_refused(
    tiny_detector: Detector, elsewhere: list[Image.Image], sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    for i, image in enumerate(elsewhere[:30]):
        image.save(tmp_path / f"new_{i:02d}.png")
    known = sorted(sample_folders["train"].iterdir())
    rows = tiny_detector.rows_in_bank([])
    assert rows is not None
    with pytest.raises(UsageError, match=r"of the 420 images were in training.*leave them out: .*train"):
        recalibrate(tiny_detector, [tmp_path, *known], groups="none")


def test_too_few_are_refused(tiny_detector: Detector, elsewhere: list[Image.Image]) -> None:
    with pytest.raises(UsageError, match=r"fpr 0.05 needs at least 19 images, and there are 12: give more, or ask for"):
        recalibrate(tiny_detector, elsewhere[:12], fpr=0.05)
    groups = [i // 3 for i in range(30)]
    with pytest.raises(UsageError, match="at least 19 groups of images that belong together, and there are 10: give"):
        recalibrate(tiny_detector, elsewhere[:30], fpr=0.05, groups=groups)


def test_a_rate_that_the_old_calibration_did_not_support(
    small: dict[str, Any], files: list[str], elsewhere: list[Image.Image]
) -> None:
    changed = recalibrate(Detector(**small).fit(files), elsewhere[:30], fpr=0.05, groups="none")  # 8 calibrate it
    assert changed.flagged is changed.share is changed.thresholds[0] is None
    assert changed.facts()["old_flagged"] is None


def test_a_large_shift_is_warned_of(tiny_detector: Detector, sample_folders: dict[str, Path]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    with pytest.warns(LargeShift, match="100% of these images are strange to the old calibration"):
        recalibrate(tiny_detector, noise, groups="none")


def test_a_small_one_is_not(tiny_detector: Detector, elsewhere: list[Image.Image]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LargeShift)
        changed = recalibrate(tiny_detector, brighter(elsewhere[:60], 1.3), groups="none")
    assert changed.share is not None
    assert changed.share[0] < 0.5


# ---- other detectors ----


@pytest.mark.usefixtures("decided_locally")
def test_with_a_local_score(tmp_path: Path) -> None:
    """Verdict, both parts and the scale of heat maps are calibrated by the new images."""
    options: dict[str, Any] = {"size": SIDE, "recipe": {"epochs": 2, "min_steps": 50}, "calibration": 0.3, "fpr": 0.1}
    detector = Detector(**options).fit(plates(60, seed=0))
    assert detector.local_ is not None
    new_site = brighter(plates(60, seed=1), 1.15)
    new = recalibrate(detector, new_site[:30], groups="none").detector
    assert new.local_ is not None

    scores = detector.score(new_site[:30])
    assert new.calibration_.scores == pytest.approx(np.sort(scores.ood_score), rel=1e-5)
    batches, _ = detector.batches(new_site[:30])
    passes = [detector.extractor_.with_heat(stack.pixels) for batch in batches for stack in batch.stacks]
    hottest = np.sort([float(heat.max()) for _, maps in passes if maps is not None for heat in maps])
    assert new.local_.calibrations["heat"].scores == pytest.approx(hottest, rel=1e-5)
    for name in ("global", "local"):
        rows = torch.cat([rows for rows, _ in passes])
        parts = np.sort(detector.measured(rows)[2][name].double().numpy())
        assert new.local_.calibrations[name].scores == pytest.approx(parts, rel=1e-4, abs=1e-5), name
        assert len(detector.local_.calibrations[name]) == 18

    before, after = (each.score(new_site[30:]) for each in (detector, new))
    assert before.flagged > after.flagged
    assert after.flagged <= 9  # 3 are expected
    assert new.score(plates(20, seed=2, defect=True)).flagged > 10
    new.save_pretrained(tmp_path)
    loaded = Detector.from_pretrained(tmp_path)
    assert loaded.score(new_site[30:]).p_values["local"] == pytest.approx(after.p_values["local"])
    assert loaded.explain(new_site[30]).heat_threshold == new.explain(new_site[30]).heat_threshold


def test_of_the_pixel_mode(folders: dict[str, Path], elsewhere: list[Image.Image], tmp_path: Path) -> None:
    detector = PixelDetector(**PIXEL).fit(folders["train"])
    new = recalibrate(detector, elsewhere[:30]).detector
    assert isinstance(new, PixelDetector)
    assert new.calibration_.scores == pytest.approx(np.sort(detector.score(elsewhere[:30]).ood_score), rel=1e-5)
    new.save_pretrained(tmp_path)
    assert len(PixelDetector.from_pretrained(tmp_path).calibration_) == 30
    with pytest.raises(UsageError, match="groups='auto' needs the feature mode|looks at features"):
        recalibrate(detector, elsewhere[:30], groups="auto")
