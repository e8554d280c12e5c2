"""Images that belong together at fit, given or found, in every kind of detector; what is said where they are few."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import OWN_LAYERS, RECIPE, own_code, some_images
from small_pixels import PIXEL

from featdiff import Detector, FeatureDiffusion, Guard, PixelDetector
from featdiff.data.splits import make_plan, split
from featdiff.detectors import grouping
from featdiff.detectors.grouping import make_checked_plan, needed_in_all
from featdiff.exceptions import NearCopiesFound, TooFewRows, UsageError


@pytest.fixture
def by_folds(small: dict[str, Any]) -> dict[str, Any]:
    return {**small, "calibration": "auto"}


@pytest.fixture(scope="session")
def shots(files: list[str]) -> np.ndarray:
    """24 tiles, each photographed five times in a row with a little noise (120, 32, 32, 3)."""
    from PIL import Image

    rng = np.random.default_rng(0)
    tiles = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files[:24]]).astype(int)
    noisy = np.repeat(tiles, 5, axis=0) + rng.integers(-3, 4, (120, 32, 32, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


BURST = np.repeat(np.arange(24), 5)


# ---- groups that are given ----


GIVEN: dict[str, tuple[Callable[[list[str]], Any], str]] = {
    "list": (lambda files: [i // 4 for i in range(40)], "labels"),
    "array": (lambda files: np.arange(40) // 4, "labels"),
    "tensor": (lambda files: torch.arange(40) // 4, "labels"),
    "mapping": (lambda files: {file: f"g{i // 4}" for i, file in enumerate(files)}, "labels"),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_labels_are_groups(by_folds: dict[str, Any], files: list[str], kind: str) -> None:
    make, how = GIVEN[kind]
    detector = Detector(**by_folds).fit(files, groups=make(files))
    assert detector.grouping_.how == how
    assert detector.grouping_.count == detector.calibration_.groups == 10
    assert len(detector.calibration_) == 40
    assert detector.calibration_.smallest_fpr == 1 / 11


def test_files_in_folders_of_groups(by_folds: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    """By folder, pattern, gap and table: all of them name the same groups, and give the same detector."""
    lines = ["path,group"]
    for i, file in enumerate(files):
        target = tmp_path / f"part{i // 8}" / f"shot_{100 * (i // 8) + i % 8}.png"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
        lines.append(f"{target.relative_to(tmp_path)},{i // 8}")
    (tmp_path / "groups.csv").write_text("\n".join(lines))

    scores = []
    for groups in ("folder", r"part(\d)/", "gap:50", tmp_path / "groups.csv"):
        detector = Detector(**by_folds).fit(tmp_path, groups=groups)
        assert detector.calibration_.groups == 5
        assert detector.grouping_.how == (groups if isinstance(groups, str) else "labels")
        scores.append(detector.calibration_.scores)
    for other in scores[1:]:
        np.testing.assert_array_equal(other, scores[0])


def test_labels_count_images_that_cannot_be_read(by_folds: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    given = [*files[:10], str(broken), *files[10:]]
    labels = [0] * 10 + [99] + [1 + i // 5 for i in range(30)]
    detector = Detector(**by_folds).fit(given, groups=labels)
    assert detector.grouping_.count == 7
    with pytest.raises(UsageError, match="groups give 40 labels, and there are 41 images"):
        Detector(**by_folds).fit(given, groups=[0] * 40)


def test_copies_join_groups(by_folds: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    """An image that lies in two groups makes them one."""
    labels = [i // 4 for i in range(40)]
    copy = shutil.copy(files[0], tmp_path / "copy.png")
    detector = Detector(**by_folds).fit([*files, str(copy)], groups=[*labels, 9])
    assert detector.n_duplicates_ == 1
    assert detector.grouping_.count == 9
    numbers = detector.grouping_.numbers
    assert numbers is not None
    assert len(set(numbers[[0, 1, 2, 3, 36, 37, 38, 39]].tolist())) == 1


def test_groups_of_one_image_are_no_groups(by_folds: dict[str, Any], files: list[str]) -> None:
    plain = Detector(**by_folds).fit(files, groups="none")
    alone = Detector(**by_folds).fit(files, groups=list(range(40)))
    assert plain.grouping_.how == "none"
    assert plain.grouping_.count is None
    np.testing.assert_array_equal(plain.calibration_.scores, alone.calibration_.scores)
    assert plain.calibration_.groups == alone.calibration_.groups == 40


def test_a_share_that_calibrates_is_one_of_groups(small: dict[str, Any], files: list[str]) -> None:
    detector = Detector(**{**small, "calibration": 0.4}).fit(files, groups=[i // 4 for i in range(40)])
    assert (len(detector.calibration_), detector.calibration_.groups) == (16, 4)


def test_saved_models_keep_their_groups(
    by_folds: dict[str, Any], files: list[str], fresh: list[str], tmp_path: Path
) -> None:
    detector = Detector(**by_folds).fit(files, groups=[i // 4 for i in range(40)])
    detector.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model")
    assert loaded.calibration_.groups == 10
    assert loaded.calibration_.smallest_fpr == 1 / 11
    ours, theirs = detector.score(fresh), loaded.score(fresh)
    np.testing.assert_array_equal(theirs.p_value, ours.p_value)
    assert ours.p_value.min() >= 1 / 11
    with pytest.raises(UsageError, match="needs at least 19 held-out groups of images .* there are 10"):
        loaded.score(fresh, fpr=0.05)


def test_wrong_groups_are_refused_before_any_work(by_folds: dict[str, Any], files: list[str]) -> None:
    def no_work(*_: object) -> None:
        pytest.fail("nothing should be read")

    for groups in ("no brackets", "gap:x", "(", 5):
        for detector in (Detector(**by_folds), PixelDetector(**PIXEL)):
            with pytest.raises(UsageError, match=r"^groups ") as caught:
                detector.fit(files, no_work, groups=groups)  # type: ignore[arg-type]
            assert caught.value.argument == "groups"


def test_a_split_and_groups_contradict_each_other(small: dict[str, Any], files: list[str]) -> None:
    with pytest.raises(UsageError, match="drop groups") as caught:
        Detector(**small).fit(files, split=split(40, 0.2, 0.1, 0), groups="none")
    assert caught.value.argument == "groups"


# ---- near-copies ----


def test_near_copies_are_found_and_said(by_folds: dict[str, Any], shots: np.ndarray) -> None:
    with pytest.warns(NearCopiesFound) as caught:
        detector = Detector(**by_folds).fit(shots)
    (warning,) = [item for item in caught if item.category is NearCopiesFound]
    message = str(warning.message)
    assert "100% of the images have near-copies among the others" in message
    assert "groups=auto" in message and "groups=none" in message
    assert "\n" not in message
    assert Path(warning.filename).name == Path(__file__).name  # the line that called fit

    assert detector.grouping_.how == "auto"
    assert detector.grouping_.numbers is not None
    for burst in range(24):
        assert len(set(detector.grouping_.numbers[burst == BURST].tolist())) == 1
    assert detector.grouping_.count == detector.calibration_.groups
    assert 20 <= detector.calibration_.groups <= 24
    assert detector.grouping_.false_alarms is not None
    assert detector.grouping_.false_alarms > 0.3


def test_groups_that_are_asked_for_or_refused_are_not_said(by_folds: dict[str, Any], shots: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NearCopiesFound)
        auto = Detector(**by_folds).fit(shots, groups="auto")
        none = Detector(**by_folds).fit(shots, groups="none")
    assert auto.grouping_.how == "auto"
    assert 20 <= auto.calibration_.groups <= 24
    assert none.grouping_.count is None
    assert none.calibration_.groups == 120


def test_ordinary_images_are_not_grouped(by_folds: dict[str, Any], files: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NearCopiesFound)
        detector = Detector(**by_folds).fit(files)
    assert detector.grouping_.how == "none"
    assert detector.grouping_.copied is not None
    assert detector.grouping_.copied < 0.3


def test_too_few_images_are_not_looked_at(by_folds: dict[str, Any], shots: np.ndarray) -> None:
    detector = Detector(**by_folds).fit(shots[:19])
    assert detector.grouping_.copied is None
    assert detector.calibration_.groups == 19


def test_of_very_many_images_stretches_are_looked_at_first(
    by_folds: dict[str, Any], shots: np.ndarray, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "_MANY", 30)
    monkeypatch.setattr(grouping, "_STRETCHES", 3)
    monkeypatch.setattr(grouping, "_STRETCH", 25)
    with pytest.warns(NearCopiesFound):
        assert Detector(**by_folds).fit(shots).grouping_.how == "auto"
    plain = Detector(**by_folds).fit(files)
    assert plain.grouping_.how == "none"
    assert plain.grouping_.copied is None  # not all of them were compared


# ---- other detectors ----


def test_a_guard_by_folds_and_groups(tmp_path: Path) -> None:
    images = some_images(60, seed=1)
    labels = np.arange(60) // 3
    guard = Guard(own_code(), layers=OWN_LAYERS, recipe=RECIPE, fpr=0.1).fit(images, groups=labels)
    calibration = guard.detector.calibration_
    assert (len(calibration), calibration.groups) == (60, 20)

    fresh = some_images(20, seed=2)
    with torch.inference_mode():
        _, verdict = guard(fresh)
        guard.save_pretrained(tmp_path / "guard")
        loaded = Guard.from_pretrained(tmp_path / "guard", own_code())
        _, again = loaded(fresh)
    assert verdict is not None and again is not None
    assert loaded.detector.calibration_.groups == 20
    torch.testing.assert_close(again.p_value, verdict.p_value)
    assert verdict.p_value.min() >= 1 / 21 - 1e-6


def rows_in_bursts(count: int, size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count, 12))
    return (np.repeat(centres, size, axis=0) + 0.05 * rng.normal(size=(count * size, 12))).astype(np.float32)


ESTIMATOR: dict[str, Any] = {"hidden_max": 16, "blocks": 1, "neighbors": 3, "recipe": {"epochs": 2, "min_steps": 10}}


def test_rows_by_folds_and_groups(tmp_path: Path) -> None:
    rows = rows_in_bursts(30, 4, seed=0)
    model = FeatureDiffusion(**ESTIMATOR, fpr=0.1).fit(rows, groups=np.repeat(np.arange(30), 4))
    assert (len(model.calibration_), model.calibration_.groups) == (120, 30)
    assert model.grouping_.how == "labels"
    model.save_pretrained(tmp_path / "model")
    loaded = FeatureDiffusion.from_pretrained(tmp_path / "model")
    assert loaded.calibration_.groups == 30
    fresh = rows_in_bursts(10, 1, seed=1)
    np.testing.assert_array_equal(loaded.p_values(fresh), model.p_values(fresh))


def test_near_copies_among_rows() -> None:
    rows = rows_in_bursts(40, 5, seed=0)
    fresh = rows_in_bursts(400, 1, seed=1)
    with pytest.warns(NearCopiesFound, match=r"100% of the images have near-copies") as caught:
        model = FeatureDiffusion(**ESTIMATOR, fpr=0.1).fit(rows)
    assert Path(caught[0].filename).name == Path(__file__).name
    assert model.grouping_.how == "auto"
    assert 38 <= model.calibration_.groups <= 40
    assert (model.predict(fresh) == -1).mean() < 0.25

    by_chance = FeatureDiffusion(**ESTIMATOR, fpr=0.1).fit(rows, groups="none")
    assert by_chance.calibration_.groups == 200
    assert (by_chance.predict(fresh) == -1).mean() > 0.9


def test_rows_have_no_folders() -> None:
    for groups in ("folder", "gap:3", r"(\d)"):
        with pytest.raises(UsageError, match="groups of rows are 'auto', 'none', or a label for each row") as caught:
            FeatureDiffusion(**ESTIMATOR).fit(rows_in_bursts(10, 3, 0), groups=groups)
        assert caught.value.argument == "groups"
    with pytest.raises(UsageError, match="groups give 3 labels, and there are 30 images"):
        FeatureDiffusion(**ESTIMATOR).fit(rows_in_bursts(10, 3, 0), groups=[1, 2, 3])


def test_few_groups_of_rows_get_a_larger_rate() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    with pytest.warns(
        TooFewRows, match=r"fpr 0\.05 needs about 19 different rows or groups.*ask for fpr 0\.091 or more"
    ):
        model = FeatureDiffusion(**ESTIMATOR).fit(rows, groups=np.arange(60) // 6)
    assert model.fpr_ == 1 / 11


def test_pixel_mode_keeps_folders_together(folders: dict[str, Path], tmp_path: Path) -> None:
    for i, file in enumerate(sorted(folders["train"].iterdir())[:60]):
        target = tmp_path / f"{i // 2}" / file.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    detector = PixelDetector(**PIXEL | {"fpr": 0.2}).fit(tmp_path, groups="folder")
    assert detector.grouping_.count == 30
    assert (len(detector.calibration_), detector.calibration_.groups) == (18, 9)
    assert detector.calibration_.smallest_fpr == 1 / 10

    detector.save_pretrained(tmp_path / "model")
    assert PixelDetector.from_pretrained(tmp_path / "model").calibration_.groups == 9


def test_pixel_mode_cannot_look_for_near_copies(folders: dict[str, Path]) -> None:
    def no_work(*_: object) -> None:
        pytest.fail("nothing should be read")

    with pytest.raises(UsageError, match="groups='auto' needs the feature mode") as caught:
        PixelDetector(**PIXEL).fit(folders["train"], no_work, groups="auto")
    assert caught.value.argument == "groups"


# ---- what is said where there are too few ----


@pytest.mark.parametrize(
    ("n", "fpr", "message"),
    [
        (18, 0.05, "fpr 0.05 needs about 19 images, and there are 18: give more, or ask for fpr 0.053 or more"),
        (60, 0.01, "fpr 0.01 needs about 99 images, and there are 60: give more, or ask for fpr 0.017 or more"),
        (600, 0.001, "fpr 0.001 needs about 4,995 images, and there are 600: give more, or ask for fpr 0.0083 or more"),
    ],
)
def test_too_few_images_are_told_how_many_would_do(n: int, fpr: float, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_checked_plan(n, "auto", 0.05, 0, None, fpr)
    assert str(caught.value) == message
    assert caught.value.argument == "fpr"


def test_too_few_groups_are_told_how_many_would_do() -> None:
    groups = np.arange(300) // 30
    with pytest.raises(UsageError) as caught:
        make_checked_plan(300, "auto", 0.05, 0, groups, 0.05)
    assert str(caught.value) == (
        "fpr 0.05 needs about 19 groups of images that belong together, and there are 10: give more, or ask for fpr "
        "0.091 or more; groups=none takes each image for a group, but then false alarms will not hold"
    )


@pytest.mark.parametrize("calibration", ["auto", 0.2, 0.35])
@pytest.mark.parametrize("fpr", [0.5, 0.2, 0.05, 0.01, 0.002, 0.0015])
@pytest.mark.parametrize("grouped", [False, True])
def test_as_many_as_are_said_to_do_will_do(calibration: float | str, fpr: float, grouped: bool) -> None:
    def plan(count: int) -> None:
        groups = np.repeat(np.arange(count), 2) if grouped else None
        make_checked_plan(2 * count if grouped else count, calibration, 0.05, 0, groups, fpr)

    needed = max(3, needed_in_all(fpr, calibration))
    plan(needed + 1)  # shares are rounded: "about"
    if needed > 40:
        with pytest.raises(UsageError, match=f"needs about {needed:,} "):
            plan(int(0.9 * needed))


@pytest.mark.parametrize("n", [18, 60])
def test_the_rate_that_is_offered_works(n: int) -> None:
    with pytest.raises(UsageError) as caught:
        make_checked_plan(n, "auto", 0.05, 0, None, 0.001)
    offered = float(str(caught.value).rsplit("fpr ", 1)[1].split()[0])
    assert make_checked_plan(n, "auto", 0.05, 0, None, offered).groups == make_plan(n).groups == n


def test_few_images_are_enough_for_the_default_rate(by_folds: dict[str, Any], files: list[str]) -> None:
    arguments = {**by_folds, "fpr": 0.05}
    calls: list[str] = []
    with pytest.raises(UsageError, match="^fpr 0.05 needs about 19 images, and there are 18"):
        Detector(**arguments).fit(files[:18], lambda stage, *_: calls.append(stage))
    assert "training" not in calls
    assert Detector(**arguments).fit(files[:19]).calibration_.groups == 19
