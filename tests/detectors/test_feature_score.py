"""Scores of the default mode: what they tell, rates that cannot be held, and what must never change a score."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_detectors import COLUMNS, loader, pictures
from torch import Tensor

from featdiff import Detector
from featdiff.exceptions import UsageError
from featdiff.verdicts.calibration import Calibration

# ---- what it tells ----


def test_scrambled_features_are_flagged_and_fresh_tiles_are_not(
    tiny_detector: Detector, sample_folders: dict[str, Path]
) -> None:
    """With the channels of each layer shuffled, the features keep every value but are no longer in-domain."""
    pixels = torch.stack(
        [
            tiny_detector.extractor_.transform(picture)
            for picture in pictures(sorted(map(str, sample_folders["test"].iterdir()))[::4])
        ]
    )
    features = tiny_detector.extractor_(pixels)
    rng = torch.Generator().manual_seed(0)
    parts = [features[:, part.columns] for part in tiny_detector.extractor_.layout.parts]
    scrambled = torch.cat([part[:, torch.randperm(part.shape[1], generator=rng)] for part in parts], 1)
    limit = np.quantile(tiny_detector.calibration_.scores, 0.95)
    assert (tiny_detector.score_features(features) > limit).mean() < 0.2
    assert (tiny_detector.score_features(scrambled) > limit).mean() > 0.9


def test_false_alarms_over_200_random_splits_stay_below_the_rate(
    tiny_detector: Detector, sample_folders: dict[str, Path]
) -> None:
    """Real scores of 130 fresh tiles: 100 calibrate, 30 are tested, 200 times over."""
    scores = tiny_detector.score(sample_folders["test"]).ood_score
    rng, rates = np.random.default_rng(0), (0.01, 0.05, 0.1)
    alarms = np.empty((200, 3))
    for row in alarms:
        order = rng.permutation(scores)
        calibration = Calibration(order[:100])
        row[:] = [calibration.flags(order[100:], rate)[1].mean() for rate in rates]
    error = alarms.std(0) / np.sqrt(200)
    assert (alarms.mean(0) <= rates + 3 * error).all()
    assert (alarms.mean(0) >= np.array(rates) - 1 / 101 - 3 * error).all()  # and is not merely never flagging


def test_p_values_and_verdicts_follow_from_the_calibration_scores(fitted: Detector, fresh: list[str]) -> None:
    scores = fitted.score(fresh, fpr=0.25)
    expected = [(1 + np.sum(fitted.calibration_.scores >= score)) / 9 for score in scores.ood_score]
    np.testing.assert_allclose(scores.p_value, expected, rtol=1e-12)
    np.testing.assert_array_equal(scores.is_ood, scores.p_value <= 0.25)
    assert len(fitted.calibration_) == 8
    assert (np.diff(fitted.calibration_.scores) >= 0).all()


def test_calibration_scores_are_scores_of_held_out_images(fitted: Detector, files: list[str]) -> None:
    """Each of the 8 is the score of one of the images that were given, and no image gives two."""
    scores = fitted.score(files).ood_score
    nearest = [int(np.argmin(abs(scores - value))) for value in fitted.calibration_.scores]
    np.testing.assert_allclose(scores[nearest], fitted.calibration_.scores, rtol=1e-4, atol=1e-4)
    assert len(set(nearest)) == 8


def test_rate_can_be_changed_when_scoring(fitted: Detector, fresh: list[str]) -> None:
    few, many = fitted.score(fresh, fpr=0.12), fitted.score(fresh, fpr=0.9)
    np.testing.assert_array_equal(few.ood_score, many.ood_score)
    assert (many.is_ood >= few.is_ood).all()
    assert many.is_ood.sum() > few.is_ood.sum()
    np.testing.assert_array_equal(fitted.score(fresh).is_ood, fitted.score(fresh, fpr=0.2).is_ood)


def test_scores_of_the_calibration_images_have_mean_0_and_std_1(
    tiny_detector: Detector, sample_folders: dict[str, Path]
) -> None:
    """So has the score of each layer; fresh in-domain images are about there."""
    scores = tiny_detector.calibration_.scores
    assert abs(scores.mean()) < 1e-3 and abs(scores.std() - 1) < 1e-3
    held_out = tiny_detector.feature_store().table(tiny_detector.calibration_digests_)[:]
    own, layers = tiny_detector.layer_scores(held_out)
    np.testing.assert_allclose(np.sort(own), scores, atol=1e-4)
    np.testing.assert_allclose(layers.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(layers.std(0), 1, atol=1e-3)

    by_layer = tiny_detector.calibration_.layers
    assert list(by_layer) == tiny_detector.layers
    for column, calibration in zip(layers.T, by_layer.values(), strict=True):
        np.testing.assert_allclose(np.sort(column), calibration.scores, atol=1e-4)
        assert calibration.groups == tiny_detector.calibration_.groups

    fresh = tiny_detector.score(sample_folders["test"])
    for values in (fresh.ood_score, *fresh.layers.values()):
        assert abs(values.mean()) < 0.5
        assert 0.5 < values.std() < 2


def test_rescaling_changes_no_p_value(tiny_detector: Detector, sample_folders: dict[str, Path]) -> None:
    def unscaled(features: Tensor) -> np.ndarray:
        return tiny_detector.heads_.unscaled(features)[:, 0].numpy()

    held_out = tiny_detector.feature_store().table(tiny_detector.calibration_digests_)[:]
    _, fresh = tiny_detector.features(sample_folders["test"])
    calibration = Calibration(unscaled(held_out))
    p_values = calibration.p_values(unscaled(fresh[:]))
    np.testing.assert_allclose(tiny_detector.score(sample_folders["test"]).p_value, p_values, rtol=1e-6)


def test_repr_is_one_line(fitted: Detector) -> None:
    assert repr(Detector(fpr=0.2)) == "Detector(not fitted, fpr=0.2)"
    images = "fitted on 40 images, 8 for calibration"
    assert repr(fitted) == f"Detector({fitted.name}, {images}, fpr=0.2, device={fitted.device})"
    assert fitted.name == "test_resnet.r160_in1k"


def test_columns_and_rows(fitted: Detector, fresh: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    scores = fitted.score([fresh[0], tmp_path / "bad.png", fresh[1]])
    assert scores.columns == [*COLUMNS, "layer_layer1", "layer_layer2"]
    good, bad, last = rows = list(scores.rows())
    assert all(list(row) == scores.columns for row in rows)
    assert [row["path"] for row in rows] == [fresh[0], str(tmp_path / "bad.png"), fresh[1]]
    assert [row["status"] for row in rows] == ["ok", "unreadable", "ok"]
    assert (good["reason"], last["reason"]) == ("", "")
    assert "not an image" in str(bad["reason"])
    assert all(bad[name] is None for name in scores.columns[3:])
    assert good["ood_score"] == pytest.approx(scores.ood_score[0], rel=1e-6)
    assert good["p_value"] == pytest.approx(scores.p_value[0], rel=1e-6)
    assert good["is_ood"] is bool(scores.is_ood[0])
    assert good["layer_layer2"] == pytest.approx(scores.layers["layer2"][0], rel=1e-6)
    assert np.isnan(scores.ood_score[1]) and np.isnan(scores.p_value[1]) and not scores.is_ood[1]


def test_unreadable_image_changes_no_other_row(fitted: Detector, fresh: list[str], tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(Path(fresh[0]).read_bytes()[:200])
    (tmp_path / "empty.png").write_bytes(b"")
    mixed = fitted.score([tmp_path / "cut.png", *fresh[:3], tmp_path / "empty.png", *fresh[3:]])
    good = [i for i, status in enumerate(mixed.status) if status == "ok"]
    assert len(mixed) == 22
    np.testing.assert_allclose(mixed.ood_score[good], fitted.score(fresh).ood_score, rtol=1e-5, atol=1e-6)


def test_stream_is_the_same_as_all_at_once(small: dict[str, Any], files: list[str], fresh: list[str]) -> None:
    detector = Detector(**small, image_batch=2).fit(files)
    parts = list(detector.iter_scores(fresh))
    assert [len(part) for part in parts] == [8, 8, 4]
    whole = detector.score(fresh)
    assert [path for part in parts for path in part.path] == whole.path == fresh
    np.testing.assert_array_equal(np.concatenate([part.ood_score for part in parts]), whole.ood_score)


def test_heads_agree_with_rows(fitted: Detector, fresh: list[str]) -> None:
    pixels = torch.stack([fitted.extractor_.transform(picture) for picture in pictures(fresh)])
    heads = fitted.all_heads(fitted.extractor_(pixels))
    scores = fitted.score(fresh)
    assert list(heads) == [
        *("featdiff", "layerwise", "mse", "mfsim", "lr", "neighbors", "layer_layer1", "layer_layer2")
    ]
    np.testing.assert_allclose(heads["featdiff"], scores.ood_score, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(heads["layer_layer2"], scores.layers["layer2"], rtol=1e-5, atol=1e-5)


def test_progress_counts_up_to_the_total(small: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    detector = Detector(**small, cache=tmp_path).fit(files, lambda *step: calls.append(step))
    detector.score(files[:5], progress=lambda *step: calls.append(step))
    assert [stage for stage in dict.fromkeys(call[0] for call in calls)] == [
        "features",
        "training",
        "scoring",
    ]
    for stage, total in (("features", 40), ("training", 4), ("scoring", 5)):
        done = [call[1:] for call in calls if call[0] == stage]
        assert done[-1] == (total, total)
        assert [d for d, _ in done] == sorted(d for d, _ in done)


# ---- rates that cannot be held ----


def test_rate_that_needs_more_images_is_refused_when_fitting(small: dict[str, Any], files: list[str]) -> None:
    calls: list[str] = []
    words = "^fpr 0.01 needs about 495 images, and there are 40: give more, or ask for fpr 0.12 or more$"
    with pytest.raises(UsageError, match=words) as caught:
        Detector(**{**small, "fpr": 0.01}).fit(files, lambda stage, *_: calls.append(stage))
    assert "training" not in calls
    assert caught.value.argument == "fpr"


def test_rate_that_needs_more_images_is_refused_when_scoring(fitted: Detector, fresh: list[str]) -> None:
    with pytest.raises(UsageError, match="0.001 needs at least 999 .* there are 8"):
        fitted.score(fresh, fpr=0.001)
    assert fitted.score(fresh, fpr=1 / 9).p_value.min() >= 1 / 9 - 1e-12  # the smallest rate that 8 support


@pytest.mark.parametrize("fpr", [0, 1, -0.1, 2, float("nan"), "often", None])
def test_rate_that_is_none_is_refused(fitted: Detector, fresh: list[str], fpr: Any) -> None:
    with pytest.raises(UsageError, match="fpr, the false-alarm rate") as caught:
        Detector(fpr=fpr)
    assert caught.value.argument == "fpr"
    if fpr is not None:
        with pytest.raises(UsageError, match="fpr, the false-alarm rate"):
            fitted.iter_scores(fresh, fpr=fpr)  # at once, before the first row is asked for


# ---- what must not change a score ----


def test_scores_do_not_depend_on_batch_or_order(
    tiny_detector: Detector, tiny_model: Path, sample_folders: dict[str, Path]
) -> None:
    files = sorted(map(str, sample_folders["test"].iterdir()))[::3]
    reference = dict(zip(files, tiny_detector.score(files).ood_score, strict=True))
    spread = np.std(list(reference.values()))
    shuffled = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    for size, workers in ((1, 1), (7, 3), (64, 8)):
        detector = Detector.from_pretrained(tiny_model, image_batch=size, workers=workers)
        scores = detector.score(shuffled)
        assert scores.path == shuffled
        rows = zip(scores.path, scores.ood_score, strict=True)
        assert max(abs(score - reference[file]) for file, score in rows) < 1e-4 * spread


def test_score_does_not_depend_on_the_other_images(fitted: Detector, fresh: list[str]) -> None:
    alone = fitted.score(fresh[:1]).ood_score[0]
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (90, 60, 3), dtype=np.uint8)) for _ in range(9)]
    black = [Image.new("RGB", (32, 32))] * 3
    spread = np.std(fitted.calibration_.scores)
    for others in (noise, black, pictures(fresh[1:])):
        scores = fitted.score([*others, fresh[0]])
        assert abs(scores.ood_score[-1] - alone) < 1e-4 * spread


def test_scoring_twice_gives_the_same_bits(fitted: Detector, fresh: list[str]) -> None:
    np.testing.assert_array_equal(fitted.score(fresh).ood_score, fitted.score(fresh).ood_score)


def test_fit_does_not_depend_on_batch_workers_or_global_seed(
    fitted: Detector, small: dict[str, Any], files: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(12345)
    np.random.seed(54321)  # noqa: NPY002
    detector = Detector(**small, image_batch=7, workers=3, cache=tmp_path).fit(files)
    spread = np.std(fitted.calibration_.scores)
    assert abs(detector.calibration_.scores - fitted.calibration_.scores).max() < 1e-3 * spread


def test_other_seed_gives_other_scores(
    fitted: Detector, small: dict[str, Any], files: list[str], fresh: list[str]
) -> None:
    other = Detector(**small, seed=1).fit(files)
    assert not np.allclose(other.score(fresh).ood_score, fitted.score(fresh).ood_score, rtol=1e-2)
    assert not torch.equal(other.heads_.diffusion.noise, fitted.heads_.diffusion.noise)


PROGRAM = """
import json, sys
import torch
from featdiff import Detector
torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(99)
arguments = json.loads(sys.argv[1])
files, fresh = arguments.pop("files"), arguments.pop("fresh")
print(json.dumps(Detector(**arguments).fit(files).score(fresh).ood_score.tolist()))
"""


def test_same_seed_gives_the_same_scores_in_a_new_process(
    fitted: Detector, small: dict[str, Any], files: list[str], fresh: list[str], tmp_path: Path
) -> None:
    import json

    arguments = {
        **small,
        "weights": str(small["weights"]),
        "files": files,
        "fresh": fresh,
        "cache": str(tmp_path),
    }
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", PROGRAM, json.dumps(arguments), threads]
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": "7"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    np.testing.assert_allclose(json.loads(run.stdout), fitted.score(fresh).ood_score, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pretrained", [True, False])
def test_global_random_state_is_left_alone(
    small: dict[str, Any], files: list[str], tmp_path: Path, pretrained: bool
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    weights = small["weights"] if pretrained else None
    detector = Detector(**{**small, "pretrained": pretrained, "weights": weights}, cache=tmp_path).fit(files)
    detector.score(files[:3])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]


def test_random_backbone_follows_the_seed(small: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    """Else a model made with ``pretrained=False`` could never be loaded again."""
    Detector(**{**small, "pretrained": False, "weights": None}).fit(files).save_pretrained(tmp_path / "model")
    torch.manual_seed(77)
    assert Detector.from_pretrained(tmp_path / "model").n_images_ == 40


def test_global_settings_of_torch_are_left_alone(fitted: Detector, fresh: list[str]) -> None:
    assert torch.is_grad_enabled()
    next(fitted.iter_scores(fresh))  # a generator that is dropped half-way
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.get_default_dtype() == torch.float32


# ---- arguments ----


def test_rows_are_lazy(fitted: Detector, fresh: list[str]) -> None:
    """The first rows come before the last image is read."""

    def batches() -> Iterator[Tensor]:
        yield next(iter(loader(fresh, fitted, labels=False)))[0][:2]
        raise AssertionError("read ahead")

    assert len(next(fitted.iter_scores(batches()))) == 2


# ---- pictures of several shapes ----

SHAPES = [(96, 32), (32, 64), (40, 30), (32, 32), (30, 40), (60, 40), (40, 60), (64, 32), (30, 90)]


def reshaped(files: list[str]) -> list[Image.Image]:
    """The files as pictures of nine shapes, in turn."""
    return [Image.open(file).convert("RGB").resize(SHAPES[i % 9]) for i, file in enumerate(files)]


@pytest.fixture(scope="module")
def mixed(small: dict[str, Any], files: list[str]) -> Detector:
    """Fitted on pictures of nine shapes."""
    return Detector(**small | {"transform": None, "size": 96}).fit(reshaped(files))


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_shapes_order_and_batches_leave_the_score_alone(mixed: Detector, fresh: list[str], batch: int) -> None:
    shown = reshaped(fresh)
    order = np.random.default_rng(batch).permutation(len(shown))
    expected = mixed.score(shown).ood_score
    assert np.ptp(expected) > 0.5

    other = copy.copy(mixed)
    other.settings = mixed.settings.with_(image_batch=batch)
    found = other.score([shown[i] for i in order])
    np.testing.assert_allclose(found.ood_score, expected[order], rtol=1e-4, atol=1e-4)


def test_a_picture_of_another_shape_alone_gives_the_same_score(mixed: Detector, fresh: list[str]) -> None:
    shown = reshaped(fresh)
    alone = [mixed.score([picture]).ood_score[0] for picture in shown]
    np.testing.assert_allclose(alone, mixed.score(shown).ood_score, rtol=1e-4, atol=1e-4)


def test_a_saved_detector_sees_the_same(mixed: Detector, fresh: list[str], tmp_path: Path) -> None:
    mixed.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model", device="cpu")
    assert (loaded.settings.view, loaded.settings.size) == ("rectangle", 96)
    picture = reshaped(fresh)[0]
    assert torch.equal(loaded.extractor_.transform(picture), mixed.extractor_.transform(picture))
    assert loaded.extractor_.key() == mixed.extractor_.key()
    np.testing.assert_array_equal(loaded.score(reshaped(fresh)).ood_score, mixed.score(reshaped(fresh)).ood_score)
