"""Adding good images to a fitted detector: what is learned, held out and refused, and what it goes on from."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_mutations import reseal
from safetensors.torch import load_file, save_file

from featdiff import Detector
from featdiff.data.splits import split
from featdiff.detectors import kept_images
from featdiff.detectors.kept_images import CALIBRATION, TRAINING, KeptImages
from featdiff.detectors.new_images import sides_of
from featdiff.detectors.old_images import OldImages
from featdiff.detectors.updating import update
from featdiff.diffusion.training import Recipe
from featdiff.exceptions import ModelError, UsageError
from featdiff.features.layout import FeatureLayout
from featdiff.features.store import Joined, Rows

OLD, NEW = 300, 90


@pytest.fixture(scope="module")
def tiles(sample_folders: dict[str, Path]) -> list[str]:
    """390 tiles, in random order."""
    files = sorted(map(str, sample_folders["train"].iterdir()))
    return [files[i] for i in np.random.default_rng(0).permutation(len(files))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def arguments(tiny_arguments: dict[str, Any], cache: Path) -> dict[str, Any]:
    return {**tiny_arguments, "size": 32, "cache": cache}


@pytest.fixture(scope="module")
def older(tiles: list[str], arguments: dict[str, Any]) -> Detector:
    """Fitted on 300 tiles; do not change it."""
    return Detector(**arguments).fit(tiles[:OLD])


@pytest.fixture(scope="module")
def newer(older: Detector, tiles: list[str]) -> tuple[Detector, Any]:
    """The same with 90 further tiles."""
    return update(older, tiles[OLD:])


def stripes(count: int, seed: int) -> np.ndarray:
    """Pictures (count, 32, 32, 3) that no tile resembles: stripes of one width in noise."""
    rng = np.random.default_rng(seed)
    bright = 200.0 * (np.arange(32) % 4 < 2)[None, :, None, None]
    return np.clip(bright + rng.normal(20, 15, (count, 32, 32, 3)), 0, 255).astype(np.uint8)


# ---- what is learned ----


def test_new_images_become_ordinary(older: Detector) -> None:
    fresh = stripes(40, seed=2)
    assert older.score(fresh).is_ood.mean() > 0.9

    updated, changes = update(older, stripes(80, seed=1), accept=True, groups="none")
    assert changes.strange > 0.9
    after = updated.score(fresh)
    assert after.is_ood.mean() < 0.3
    assert np.median(after.p_value) > 10 * np.median(older.score(fresh).p_value)
    assert older.score(fresh).is_ood.mean() > 0.9  # the old one is as it was


def test_false_alarms_hold(newer: tuple[Detector, Any], sample_folders: dict[str, Path]) -> None:
    updated, changes = newer
    rate = updated.score(sample_folders["test"], fpr=0.2).is_ood.mean()
    assert 0.08 < rate < 0.34  # 130 images, behind 78 held-out ones
    assert changes.false_alarms["old"][0] == pytest.approx(0.05, abs=0.02)
    joint = np.average([now for _, now in changes.false_alarms.values()], weights=changes.held_out)
    assert 0.02 <= joint <= 0.05


def test_the_bank_is_extended(older: Detector, newer: tuple[Detector, Any], tiles: list[str]) -> None:
    updated, _ = newer
    assert len(older.bank_digests_) < len(updated.bank_digests_) == (older.score(tiles[:OLD]).known.sum()) + 67
    known = updated.score(tiles[OLD:]).known
    assert known.sum() == 67  # 18 of 90 calibrate, 5 validate
    assert not older.score(tiles[OLD:]).known.any()
    names = {updated.bank_images_.paths[i] for i in range(len(older.bank_digests_), len(updated.bank_digests_))}
    assert names == {path for path, row in zip(tiles[OLD:], known, strict=True) if row}

    # the older vectors as they were, and the others in the same space
    before, after = older.heads_.members[0], updated.heads_.members[0]
    count = len(older.bank_digests_)
    features = updated.training_store().table([digest.tobytes() for digest in updated.bank_digests_])
    assert torch.equal(after.vectors[:count], before.vectors)
    ours = after.vectors[count:].float() * after.scales[count:]
    torch.testing.assert_close(ours, before.view(features[count:]), rtol=0, atol=0.6 * float(after.scales.max()))


def test_a_full_bank_makes_room(older: Detector, tiles: list[str], arguments: dict[str, Any]) -> None:
    small = Detector(**arguments, bank_size=50).fit(tiles[:OLD])
    updated, _ = update(small, tiles[OLD:])
    known = updated.score(tiles)
    assert len(updated.bank_digests_) == 50 == known.known.sum()
    assert 5 < known.known[OLD:].sum() < 45


def test_denoisers_train_on(older: Detector, newer: tuple[Detector, Any]) -> None:
    before, after = (dict(each.heads_.diffusion.denoiser.named_parameters()) for each in (older, newer[0]))
    moved = sum(float((after[name] - before[name]).norm()) for name in before)
    size = sum(float(before[name].norm()) for name in before)
    assert 0 < moved < 0.2 * size
    assert newer[0].training_seconds_ > older.training_seconds_


def test_other_scores_are_fitted_on_old_and_new_rows(
    tiles: list[str], arguments: dict[str, Any], tmp_path: Path
) -> None:
    joined = Detector(**arguments, extra_heads=["mahalanobis"]).fit(tiles[:OLD])
    updated, _ = update(joined, tiles[OLD:])
    before, after = (each.heads_.scores["mahalanobis"].state_dict() for each in (joined, updated))
    features = updated.training_store().table([digest.tobytes() for digest in updated.bank_digests_])
    expected = updated._make_heads(len(features)).scores["mahalanobis"].fit(features).state_dict()
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert any(not torch.equal(after[name], before[name]) for name in expected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_images, "MOST_BYTES", 10_000)
        joined.fit(tiles[:OLD])
    joined.save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match=r"'mahalanobis' is fitted on all rows.*old=IMAGES"):
        update(Detector.from_pretrained(tmp_path / "model", cache=tmp_path / "empty"), tiles[OLD:])


# ---- what is held out ----


def test_no_image_changes_sides(older: Detector, newer: tuple[Detector, Any]) -> None:
    updated, changes = newer
    kept = updated.kept_
    assert kept is not None and older.kept_ is not None
    side = dict(zip(kept.contents, kept.sides, strict=True))
    assert len(side) == OLD + NEW == updated.n_images_
    assert all(side[digest] == was for digest, was in zip(older.kept_.contents, older.kept_.sides, strict=True))

    calibrating = {digest for digest in side if side[digest] == CALIBRATION}
    assert calibrating == set(updated.calibration_digests_)
    assert not calibrating & {digest.tobytes() for digest in updated.bank_digests_}
    assert changes.held_out == (60, 18) and len(updated.calibration_) == 78


def test_images_of_one_group_stay_together(older: Detector, tiles: list[str]) -> None:
    labels = [i // 3 for i in range(NEW)]
    updated, _ = update(older, tiles[OLD:], groups=labels)
    kept = updated.kept_
    assert kept is not None and kept.groups is not None
    groups, sides = kept.groups, kept.sides
    assert len(np.unique(groups)) == OLD + NEW / 3
    assert all(len(set(sides[groups == group])) == 1 for group in np.unique(groups))
    assert updated.calibration_.groups == 60 + 6
    assert len(updated.calibration_) == 60 + 18


def test_near_copies_of_old_images_stay_on_their_side() -> None:
    """Image 2 i of 40 new ones belongs to old image i."""
    old = 30
    sides = np.repeat([TRAINING, CALIBRATION], [20, 10])
    past = OldImages(
        [b"%016d" % i for i in range(old)], sides, None, False, np.arange(old), Rows(torch.ones(old, 2)), ""
    )
    numbers = np.concatenate([np.arange(old), np.array([i // 2 if i % 2 == 0 else 100 + i for i in range(80)])])
    found = sides_of(past, numbers, 0.2, 0.05, seed=0)
    assert (found[::2][:20] == TRAINING).all() and (found[::2][20:30] == CALIBRATION).all()
    free = np.concatenate([found[::2][30:], found[1::2]])
    assert (free == CALIBRATION).sum() == 10  # a fifth of them


def test_another_update_goes_on_from_there(newer: tuple[Detector, Any], tmp_path: Path) -> None:
    newer[0].save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model", cache=newer[0].settings.cache)
    pictures = stripes(40, seed=3)
    assert np.array_equal(loaded.score(pictures).p_value, newer[0].score(pictures).p_value)

    third, changes = update(loaded, pictures, accept=True, groups="none")
    assert (changes.source, changes.old_images, third.n_images_) == ("cache", OLD + NEW, OLD + NEW + 40)
    assert third.score(stripes(20, seed=4)).is_ood.mean() < loaded.score(stripes(20, seed=4)).is_ood.mean()


# ---- what is refused ----


def test_mostly_strange_images_are_refused(older: Detector) -> None:
    with pytest.raises(UsageError, match=r"^(9\d|100)% of the 60 new images are out-of-distribution .*accept"):
        update(older, stripes(60, seed=1))


def test_images_that_it_knows_do_not_count(older: Detector, tiles: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 20 new images that can be read, not 0, besides 300"):
        update(older, tiles[:OLD])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    copied = shutil.copy(tiles[-1], tmp_path / "copy.png")
    updated, changes = update(older, [*tiles[OLD - 10 :], copied, str(broken)])
    assert (changes.added, changes.known, updated.n_duplicates_) == (NEW, 10, 1)
    assert [path for path, _ in changes.unreadable] == [str(broken)]
    assert older.unreadable_ == []


def test_detectors_that_cannot_be_updated(older: Detector, tiles: list[str]) -> None:
    elsewhere = copy.copy(older)
    elsewhere.recalibrations_ = ({"images": 40},)
    with pytest.raises(UsageError, match="recalibrated.*update the one it was made of, then recalibrate that"):
        update(elsewhere, tiles[OLD:])


def test_too_few_held_out_images_at_hand(tiles: list[str], arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_images, "MOST_BYTES", 6_000)
        few = Detector(**arguments, hidden_max=32, blocks=1).fit(tiles[:OLD])
    assert few.kept_ is not None and len(few.kept_.chosen) < 30
    few.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model", cache=tmp_path / "empty")
    with pytest.raises(
        UsageError, match=r"fpr 0.05 needs more held-out images than the \d+ that are at hand.*old=IMAGES"
    ):
        update(loaded, tiles[OLD:])


# ---- what it goes on from ----


@pytest.fixture(scope="module")
def sampled(tiles: list[str], arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that keeps features of 100 of its 300 images."""
    with pytest.MonkeyPatch.context() as patch:
        detector = Detector(**arguments)
        detector.read(tiles[:1])
        layout = detector.extractor_.layout
        patch.setattr(kept_images, "MOST_BYTES", 100 * (layout.width + 4 * len(layout.parts)))
        detector.fit(tiles[:OLD])
    assert detector.kept_ is not None and len(detector.kept_.chosen) == 100
    folder = tmp_path_factory.mktemp("sampled") / "model"
    detector.save_pretrained(folder)
    return folder


def test_without_the_cache_a_few_rows_stand_for_all(
    sampled: Path, tiles: list[str], tmp_path: Path, sample_folders: dict[str, Path]
) -> None:
    loaded = Detector.from_pretrained(sampled, cache=tmp_path / "empty")
    updated, changes = update(loaded, tiles[OLD:])
    assert (changes.source, changes.at_hand, changes.old_images) == ("model", 100, OLD)
    # of old and new images, an equal share is held out
    assert changes.held_out == (50, 15)
    assert updated.n_images_ == OLD + NEW and len(updated.kept_.digests) == OLD + NEW  # type: ignore[union-attr]
    assert 0.05 < updated.score(sample_folders["test"], fpr=0.2).is_ood.mean() < 0.38
    # those that were not at hand are known still
    with pytest.raises(UsageError, match=f"besides {OLD + NEW}"):
        update(updated, tiles)


def test_old_images_that_are_given_again(sampled: Path, tiles: list[str], tmp_path: Path) -> None:
    loaded = Detector.from_pretrained(sampled, cache=tmp_path / "empty")
    _, changes = update(loaded, tiles[OLD:], old=tiles[:OLD])
    assert (changes.source, changes.at_hand, changes.held_out) == ("given", OLD, (60, 18))
    with pytest.raises(UsageError, match="10 of the 300 images that the model was fitted on are not among the old"):
        update(loaded, tiles[OLD:], old=tiles[10:OLD])


def test_what_is_calibrated_by_folds_is_fitted_anew(
    tiles: list[str], arguments: dict[str, Any], tmp_path: Path
) -> None:
    small = arguments | {"calibration": "auto", "hidden_max": 32, "blocks": 1}
    folds = Detector(**small).fit(tiles[:60])
    updated, changes = update(folds, tiles[60:100])
    assert changes.anew and changes.held_out == (60, 40)
    assert len(updated.calibration_) == updated.n_images_ == len(updated.bank_digests_) == 100
    assert set(updated.bank_images_.paths) == set(tiles[:100])
    anew = Detector(**small).fit(tiles[:100])
    scores = [each.score(tiles[100:200]).ood_score for each in (updated, anew)]
    assert np.corrcoef(scores)[0, 1] > 0.95


# ---- what a model keeps ----


def test_rows_are_kept_within_a_hundredth() -> None:
    layout = FeatureLayout.of_stages({"a": 30, "b": 50})
    rows = torch.randn(20, 80, generator=torch.Generator().manual_seed(0))
    rows[:, 30:] = 100 * rows[:, 30:].relu()
    digests = [b"%016d" % i for i in range(20)]
    kept = KeptImages.of_split(digests, Rows(rows), split(20, 0.2, 0.1, 0), None, layout)
    order = [digests.index(digest) for digest in kept.contents]
    assert np.array_equal(kept.sides, np.repeat([0, 1, 2], [kept.training, kept.validation, 4]))
    for columns in (slice(0, 30), slice(30, 80)):
        part = rows[order][:, columns]
        error = (kept.rows(layout)[:, columns] - part).abs().amax(1) / part.abs().amax(1)
        assert 0 < error.max() < 0.01


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("kept_digests", lambda value: value[:, :8].contiguous()),
        ("kept_counts", lambda value: -value),
        ("kept_counts", lambda value: 1000 * value),
        ("kept_chosen", lambda value: value.flip(0).contiguous()),
        ("kept_chosen", lambda value: value + 300),
        ("kept_codes", lambda value: value.float()),
        ("kept_scales", lambda value: value[1:].contiguous()),
        ("kept_scales", lambda value: None),
    ],
)
def test_what_cannot_have_been_kept_is_refused(sampled: Path, tmp_path: Path, name: str, change: Any) -> None:
    tensors = load_file(sampled / "model.safetensors")
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sampled / "config.json").read_bytes())
    reseal(tmp_path)
    with pytest.raises(ModelError, match="what it keeps of its images"):
        Detector.from_pretrained(tmp_path)


def test_rows_of_several_sets_keep_their_order() -> None:
    rows = torch.arange(20.0).reshape(10, 2)
    joined = Joined([Rows(rows[:3]), Rows(rows[:0]), Rows(rows[3:])])
    assert len(joined) == 10
    assert torch.equal(joined[:], rows)
    order = np.array([9, 0, 3, 2, 9, 4])
    assert torch.equal(joined[order], rows[order])
    assert torch.equal(joined.select(order)[np.array([1, 4])], rows[[0, 9]])


def test_training_on_takes_an_eighth_of_the_steps() -> None:
    from featdiff.detectors.fitting import further

    recipe = Recipe()
    for count in (500, 6_000, 200_000):
        epochs, per_epoch = recipe.plan(count)
        further_epochs, further_per_epoch = further(recipe, count).plan(count)
        assert 0.09 < further_epochs * further_per_epoch / (epochs * per_epoch) <= 0.13
        assert further_epochs >= 2
