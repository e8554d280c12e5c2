"""Adding good images to a detector with a local score: whose places are looked at again, and what calibrates both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from defect_pictures import SIDE, plates
from PIL import Image
from safetensors.torch import load_file
from tiny_backbones import one_line

from featdiff import Detector
from featdiff.data.splits import make_plan
from featdiff.detectors.kept_images import CALIBRATION
from featdiff.detectors.local_fit import LocalFit
from featdiff.detectors.updating import Changes, update
from featdiff.exceptions import FeatdiffError, UsageError
from featdiff.scores import local
from featdiff.scores.joint import NAMES

pytestmark = pytest.mark.usefixtures("decided_locally")
OLD, NEW = 80, 40


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    recipe = {"epochs": 2, "min_steps": 50}
    cache = tmp_path_factory.mktemp("cache")
    return {"size": SIDE, "recipe": recipe, "calibration": 0.3, "fpr": 0.1, "cache": cache}


@pytest.fixture(scope="module")
def old() -> list[Image.Image]:
    return plates(OLD, seed=0)


@pytest.fixture(scope="module")
def new() -> list[Image.Image]:
    return plates(NEW, seed=20)


@pytest.fixture(scope="module")
def older(old: list[Image.Image], options: dict[str, Any]) -> Detector:
    """Do not change it."""
    return Detector(**options).fit(old)


@pytest.fixture(scope="module")
def updated(older: Detector, old: list[Image.Image], new: list[Image.Image]) -> tuple[Detector, Changes]:
    return update(older, new, old=old)


def of_contents(detector: Detector, images: list[Image.Image], wanted: list[bytes]) -> list[Image.Image]:
    """The images that hold these."""
    extraction, _ = detector._extract(images, None)
    return [images[position] for position in extraction.first_positions(wanted)]


# ---- what is learned ----


def test_what_was_never_seen_becomes_ordinary(older: Detector, old: list[Image.Image]) -> None:
    fresh = plates(30, seed=31, defect=True)
    assert older.score(fresh).is_ood.mean() > 0.9
    after, changes = update(older, plates(60, seed=30, defect=True), old=old, accept=True, groups="none")
    assert changes.local and changes.strange > 0.9
    found = after.score(fresh)
    assert found.is_ood.mean() < 0.4
    assert np.median(found.p_values["local"]) > 5 * np.median(older.score(fresh).p_values["local"])
    assert older.score(fresh).is_ood.mean() > 0.9  # the old one is as it was


def test_defects_are_found_still_and_good_plates_pass(older: Detector, updated: tuple[Detector, Changes]) -> None:
    after, _ = updated
    bad, good = after.score(plates(20, seed=2, defect=True)), after.score(plates(60, seed=1))
    assert bad.is_ood.mean() >= 0.9
    assert (bad.p_values["local"] <= 0.1).mean() >= 0.9
    assert good.is_ood.mean() <= 0.3
    explanation = after.explain(plates(1, seed=4, defect=True)[0])
    assert explanation.hottest is not None and np.hypot(explanation.hottest[0] - 101, explanation.hottest[1] - 102) < 30


def test_denoisers_of_places_train_on(older: Detector, updated: tuple[Detector, Changes]) -> None:
    assert older.local_ is not None and updated[0].local_ is not None
    before, after = (dict(each.local_.joint.local.named_parameters()) for each in (older, updated[0]))  # type: ignore[union-attr]
    moved = sum(float((after[name] - before[name]).norm()) for name in before)
    assert 0 < moved < 0.3 * sum(float(value.norm()) for value in before.values())
    was, now = (each.local_.joint.local for each in (older, updated[0]))  # type: ignore[union-attr]
    assert torch.equal(was.views[0].basis_0, now.views[0].basis_0)  # type: ignore[arg-type]
    assert not torch.equal(was.mean, now.mean)


# ---- what is held out ----


def test_no_image_changes_sides(older: Detector, updated: tuple[Detector, Changes]) -> None:
    after, changes = updated
    assert older.kept_ is not None and after.kept_ is not None
    side = dict(zip(after.kept_.contents, after.kept_.sides, strict=True))
    assert len(side) == OLD + NEW == after.n_images_
    assert all(side[digest] == was for digest, was in zip(older.kept_.contents, older.kept_.sides, strict=True))
    calibrating = {digest for digest in side if side[digest] == CALIBRATION}
    assert calibrating == set(after.calibration_digests_)
    assert changes.held_out == (24, 12) and len(calibrating) == 36


def test_held_out_images_calibrate_both_scores(
    updated: tuple[Detector, Changes], old: list[Image.Image], new: list[Image.Image]
) -> None:
    """What is calibrated with is what scoring these images afresh gives, image by image."""
    after, changes = updated
    assert after.local_ is not None
    held_out = of_contents(after, [*old, *new], after.calibration_digests_)
    fresh = after.score(held_out)
    np.testing.assert_allclose(np.sort(fresh.ood_score), after.calibration_.scores, atol=1e-4)
    assert after.calibration_.groups == 36

    rows = torch.cat(list(after.features(held_out)[1].chunks()))
    _, _, parts = after.measured(rows)
    for name in NAMES:
        np.testing.assert_allclose(np.sort(parts[name].numpy()), after.local_.calibrations[name].scores, atol=1e-4)
    flags = after.calibration_.flags(fresh.ood_score, 0.1)[1]
    assert changes.false_alarms["old"][1] == pytest.approx(flags[:24].mean())
    assert changes.false_alarms["new"][1] == pytest.approx(flags[24:].mean())


def test_what_calibrates_trains_no_place(older: Detector) -> None:
    images = 1000
    split = make_plan(images, 0.2, 0.05, 0).final
    fit = LocalFit(older.extractor_, lambda numbers: iter(()), [b""] * images, 0, Path())
    is_new = np.arange(images) >= 700
    part, known = fit._of_further(older.local_.joint.local, split, is_new)  # type: ignore[union-attr]
    assert np.array_equal(part.scored, split.calibration)
    for others in (part.training, part.compared):
        assert not np.intersect1d(part.scored, others).size
    assert not np.intersect1d(part.training, part.compared).size
    assert is_new[part.training].mean() == 0.5
    assert is_new[part.compared].all() and not is_new[known].any()  # what is normal for old ones is known
    assert not np.intersect1d(known, part.scored).size
    assert 4 * (len(part.training) + len(part.compared) + len(known)) < images


def test_the_global_score_is_that_of_an_update_without_places(
    older: Detector, updated: tuple[Detector, Changes], old: list[Image.Image], new: list[Image.Image]
) -> None:
    plain, changes = update(older.without_local(), new, old=old)
    assert plain.local_ is None and not changes.local
    images = plates(10, seed=7)
    expected = plain.score(images)
    assert np.allclose(updated[0].without_local().score(images).ood_score, expected.ood_score, atol=1e-5)
    assert np.allclose(updated[0].score(images).p_values["global"], expected.p_value)


def test_by_folds_it_is_fitted_anew(
    old: list[Image.Image], new: list[Image.Image], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "RECIPE", replace(local.RECIPE, min_steps=30, max_steps=30))
    folds = options | {"calibration": "auto", "recipe": {"epochs": 1, "min_steps": 10}, "hidden_max": 32}
    after, changes = update(Detector(**folds).fit(old[:40]), new[:20], old=old[:40])
    assert changes.anew and changes.local and changes.held_out == (40, 20)
    assert after.local_ is not None
    assert [len(each) for each in after.local_.calibrations.values()] == [60, 60, 60]
    good, bad = after.score(plates(20, seed=8)), after.score(plates(20, seed=9, defect=True))
    assert bad.is_ood.mean() >= 0.9 and good.is_ood.mean() <= 0.3


# ---- saved, and again ----


def test_saved_and_loaded_it_can_be_updated_again(
    updated: tuple[Detector, Changes], old: list[Image.Image], new: list[Image.Image], tmp_path: Path
) -> None:
    updated[0].save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model", cache=updated[0].settings.cache)
    images = plates(5, seed=11, defect=True)
    first, second = loaded.score(images), updated[0].score(images)
    assert np.array_equal(first.ood_score, second.ood_score)
    assert np.array_equal(first.p_values["local"], second.p_values["local"])

    third, changes = update(loaded, plates(20, seed=12), old=[*old, *new])
    assert (changes.old_images, third.n_images_, changes.held_out[0]) == (120, 140, 36)
    assert third.score(images).is_ood.mean() >= 0.8


def test_it_keeps_digests_and_no_features(updated: tuple[Detector, Changes], tmp_path: Path) -> None:
    updated[0].save_pretrained(tmp_path / "model")
    kept = {name: each for name, each in load_file(tmp_path / "model" / "model.safetensors").items() if "kept_" in name}
    assert len(kept["kept_digests"]) == OLD + NEW
    assert sum(each.nbytes for each in kept.values()) < 20 * (OLD + NEW) + 100

    loaded = Detector.from_pretrained(tmp_path / "model", cache=tmp_path / "empty")
    with pytest.raises(UsageError, match="gone from the cache, and it keeps none: .*old=IMAGES"):
        update(loaded.without_local(), plates(20, seed=12))


# ---- what is refused ----


def test_it_needs_its_images_and_such_that_can_be_read_again(
    older: Detector, old: list[Image.Image], new: list[Image.Image]
) -> None:
    with pytest.raises(UsageError) as error:
        update(older, new)
    assert "has a local score" in one_line(error) and "(old=IMAGES)" in one_line(error)
    assert error.value.argument == "old"

    batches = [older.extractor_.transform(image)[None] for image in new]
    for name, arguments in (("old", (new, iter(batches))), ("images", (iter(batches), old))):
        with pytest.raises(UsageError, match=f"^{name}: .*can be read again.*no loader or generator"):
            update(older, arguments[0], old=arguments[1])
    with pytest.raises(UsageError, match="5 of the 80 images that the model was fitted on are not among the old"):
        update(older, new, old=old[5:])
    with pytest.raises(UsageError, match=r"^(9\d|100)% of the 40 new images are out-of-distribution .*accept"):
        update(older, plates(40, seed=30, defect=True), old=old)


def test_an_old_image_that_changes_meanwhile_ends_the_update(older: Detector, tmp_path: Path) -> None:
    files = []
    for i, image in enumerate(plates(50, seed=8)):
        files.append(tmp_path / f"{i:02}.png")
        image.save(files[-1])
    settings = {name: getattr(older.settings, name) for name in ("size", "recipe", "calibration", "fpr")}
    detector = Detector(**settings, cache=tmp_path / "cache").fit(files)

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "training":
            for file in files:
                plates(1, seed=9)[0].save(file)

    with pytest.raises(FeatdiffError, match=r"\d\d\.png changed while it was learned: it holds something else"):
        update(detector, plates(20, seed=10), old=files, progress=progress)
