"""The pixel mode end to end at tiny size: fitting, resuming, scoring, saving, drawing, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_mutations import reseal
from PIL import Image
from small_pixels import PIXEL, RECIPE

from featdiff import Detector, PixelDetector, load_detector
from featdiff.detectors.pixel import flip_half, least_and_most
from featdiff.diffusion.masks import make_masks
from featdiff.evaluation.protocols import evaluate_detector
from featdiff.exceptions import DamagedCache, FeatdiffError, ModelError, NotFittedError, UsageError
from featdiff.report.figures import save_inpaintings


@pytest.fixture(scope="module")
def fitted(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> PixelDetector:
    """Do not change it."""
    return PixelDetector(**PIXEL, cache=tmp_path_factory.mktemp("cache")).fit(folders["train"])


@pytest.fixture(scope="module")
def model(fitted: PixelDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "lmd"
    fitted.save_pretrained(folder)
    return folder


# ---- fit and score ----


def test_repr_is_one_line(fitted: PixelDetector) -> None:
    assert repr(PixelDetector(fpr=0.2)) == "PixelDetector(not fitted, fpr=0.2)"
    images = "fitted on 120 images, 36 for calibration"
    assert repr(fitted) == f"PixelDetector(U-Net at 16 px, {images}, fpr=0.1, device={fitted.device})"


def test_scores_of_the_calibration_images_have_mean_0_and_std_1(
    fitted: PixelDetector, folders: dict[str, Path]
) -> None:
    """So has every other distance; a fresh in-domain image is about there."""
    scores = fitted.calibration_.scores
    assert abs(scores.mean()) < 1e-3 and abs(scores.std() - 1) < 1e-3
    held_out = fitted.feature_store().table(fitted.calibration_digests_)[:]
    for values in fitted.all_heads(held_out).values():
        assert abs(values.mean()) < 1e-3 and abs(values.std() - 1) < 1e-3
    fresh = fitted.score(folders["test"]).ood_score
    assert abs(fresh.mean()) < 1 and 0.4 < fresh.std() < 2.5  # 30 tiles, in the order of the photograph


def test_images_like_those_of_training_get_valid_p_values(fitted: PixelDetector, folders: dict[str, Path]) -> None:
    assert (fitted.n_images_, len(fitted.calibration_)) == (120, 36)
    assert np.isfinite(fitted.calibration_.scores).all() and (np.diff(fitted.calibration_.scores) >= 0).all()
    scores = fitted.score(folders["test"])
    assert scores.status == ["ok"] * 30 and not scores.layers
    assert np.array_equal(scores.p_value, fitted.calibration_.p_values(scores.ood_score))
    assert np.array_equal(scores.is_ood, scores.p_value <= 0.1)
    assert 0.15 < scores.p_value.mean() < 0.85


def test_training_lowers_the_loss_and_leaves_loss_and_samples(fitted: PixelDetector) -> None:
    with (fitted.training_log_ / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows]
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) == 3 * (78 // 16)
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:2])
    assert min(float(row["val_loss"]) for row in rows if row["val_loss"]) == pytest.approx(
        fitted.validation_loss_, rel=1e-4
    )
    (grid,) = fitted.training_log_.glob("samples-*.png")
    assert Image.open(grid).size == (4 * 16, 4 * 16)


def test_a_score_depends_on_no_other_image(fitted: PixelDetector, folders: dict[str, Path]) -> None:
    files = sorted(folders["test"].iterdir())[:9]
    together = fitted.score(files).ood_score
    alone = np.concatenate([fitted.score(file).ood_score for file in files])
    backwards = fitted.score(files[::-1]).ood_score[::-1]
    np.testing.assert_allclose(alone, together, atol=1e-3)
    np.testing.assert_allclose(backwards, together, atol=1e-3)


def test_scores_at_hand_are_those_of_a_stream(fitted: PixelDetector, folders: dict[str, Path]) -> None:
    batch = next(fitted.batches(folders["digits"])[0])
    (stack,) = batch.stacks
    rows = fitted.extractor_(stack.pixels)
    heads = fitted.all_heads(rows)
    assert list(heads) == ["featdiff", "mse", "ssim"]
    assert np.array_equal(heads["featdiff"], heads["mse"])
    np.testing.assert_allclose(fitted.score_features(rows), heads["mse"], atol=1e-6)
    np.testing.assert_allclose(fitted.score(folders["digits"]).ood_score[: len(rows)], heads["mse"], atol=1e-3)


def test_the_score_is_the_standardised_log_of_the_median_distance(
    fitted: PixelDetector, folders: dict[str, Path]
) -> None:
    """By hand, from inpaintings."""
    batch = next(fitted.batches(folders["test"])[0])
    (stack,) = batch.stacks
    x, inpainted = fitted.heads_.inpainted(fitted.extractor_(stack.pixels))
    assert torch.equal(x, stack.pixels)
    masks = make_masks("checkerboard_alt", 16, 2, blocks=4)
    for repetition, mask in enumerate(masks):
        assert torch.equal(inpainted[:, repetition, :, mask], x[:, :, mask])
    distances = (inpainted - x[:, None]).square().mean((2, 3, 4)).median(1).values  # of two: the lower
    mean = (inpainted - x[:, None]).square().mean((2, 3, 4)).mean(1)  # the median of two is their mean
    expected = (mean.log() - fitted.heads_.mean[0]) / fitted.heads_.deviation[0]
    found = fitted.score(folders["test"]).ood_score[: len(x)]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)
    assert (distances <= mean).all()


@pytest.mark.parametrize("aggregate", ["median", "mean", "min", "max"])
def test_aggregates(aggregate: str, fitted: PixelDetector) -> None:
    detector = PixelDetector(**PIXEL | {"aggregate": aggregate, "repetitions": 3})
    heads = detector.prepare().heads_
    values = torch.tensor([[3.0, 1.0, 8.0], [2.0, 2.0, 5.0]])
    expected = {"median": [3.0, 2.0], "mean": [4.0, 3.0], "min": [1.0, 2.0], "max": [8.0, 5.0]}[aggregate]
    assert heads._aggregated(values).tolist() == expected


def test_a_bad_file_ends_no_run(fitted: PixelDetector, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(next(folders["test"].iterdir()), tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    scores = fitted.score(tmp_path)
    assert scores.status == ["ok", "unreadable"]


def test_a_loader_of_tensors_is_taken_and_a_bad_row_is_named(fitted: PixelDetector) -> None:
    batch = torch.rand(4, 3, 16, 16) * 2 - 1
    batch[2, 0, 0, 0] = float("nan")
    scores = fitted.score(iter([batch]))
    assert scores.status == ["ok", "ok", "unreadable", "ok"]
    assert "NaN" in scores.reason[2]
    with pytest.raises(UsageError, match=r"shape \(3, 8, 8\).*takes \(3, 16, 16\)"):
        fitted.score(iter([torch.zeros(2, 3, 8, 8)]))


def test_evaluation_prints_every_distance(fitted: PixelDetector, folders: dict[str, Path]) -> None:
    result = evaluate_detector(fitted, folders["test"], {"digits": folders["digits"]})
    assert [pair["protocol"] for pair in result["pairs"]] == ["matched", "as-published"]
    assert list(result["pairs"][0]["heads"]) == ["featdiff", "mse", "ssim"]
    assert result["pairs"][1]["n_ood"] == 20


# ---- nothing computed is lost ----


def test_an_interrupt_while_inpainting_does_not_inpaint_again(
    model: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, batches = PixelDetector.from_pretrained(model), []

    def interrupted(rows: torch.Tensor, names: object) -> None:
        batches.append(len(rows))
        if len(batches) > 1:
            raise KeyboardInterrupt
        return real(rows, names)  # type: ignore[no-any-return]

    real = detector.heads_.forward
    monkeypatch.setattr(detector.heads_, "forward", interrupted)
    done = []
    with pytest.raises(KeyboardInterrupt):
        for part in detector.iter_scores(folders["test"]):
            done.append(len(part))
    assert (batches, done) == ([8, 8], [8])


def test_a_second_fit_computes_nothing_again(
    fitted: PixelDetector, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = PixelDetector(**PIXEL, cache=fitted.settings.cache)
    monkeypatch.setattr("featdiff.scores.inpainting.inpaint", None)  # not to be called
    again.fit(folders["train"])
    assert np.array_equal(again.calibration_.scores, fitted.calibration_.scores)
    assert again.training_seconds_ == fitted.training_seconds_


class Killed(BaseException):
    pass


def test_a_killed_training_goes_on_to_the_same_loss_curve(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fitted: PixelDetector
) -> None:
    monkeypatch.setattr("featdiff.runtime.checkpoints.CHECKPOINT_SECONDS", 0)

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == 7:  # in the second epoch
            raise Killed

    broken = PixelDetector(**PIXEL, cache=tmp_path)
    with pytest.raises(Killed):
        broken.fit(folders["train"], kill)
    steps: list[int] = []

    def note(stage: str, done: int, total: int) -> None:
        steps.extend([done] if stage == "training" else [])

    broken.fit(folders["train"], note)
    assert steps[0] == 5
    curve, whole = ((d.training_log_ / "loss.csv").read_text() for d in (broken, fitted))
    assert curve == whole
    assert np.array_equal(broken.calibration_.scores, fitted.calibration_.scores)


def test_a_checkpoint_of_another_config_is_not_used(
    folders: dict[str, Path], fitted: PixelDetector, tmp_path: Path
) -> None:
    """Another network has a file of its own; the file of another network in its place is removed."""
    wider = PixelDetector(**PIXEL | {"width": 16}, cache=tmp_path).fit(folders["train"])
    assert wider.training_log_.name != fitted.training_log_.name
    taken = wider.training_log_.with_name(fitted.training_log_.name).with_suffix(".pt")
    shutil.copy(wider.training_log_.with_suffix(".pt"), taken)
    with pytest.warns(DamagedCache, match=taken.name):
        again = PixelDetector(**PIXEL, cache=tmp_path).fit(folders["train"])
    assert np.array_equal(again.calibration_.scores, fitted.calibration_.scores)
    assert wider.training_log_.with_suffix(".pt").exists()


def test_a_diverging_loss_is_one_clear_line(folders: dict[str, Path], tmp_path: Path) -> None:
    detector = PixelDetector(**PIXEL | {"recipe": RECIPE | {"learning_rate": 1e12}}, cache=tmp_path)
    with pytest.raises(FeatdiffError, match=r"training diverged at step \d+ .*lower learning_rate"):
        detector.fit(folders["train"])
    with pytest.raises(NotFittedError):
        detector.score(folders["test"])
    assert len(detector.feature_store()) == 120  # what was read stays


# ---- save and load ----


def test_a_saved_detector_scores_the_same_without_its_sources(
    model: Path, fitted: PixelDetector, folders: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load_detector(model, cache=tmp_path)
    assert isinstance(loaded, PixelDetector)
    assert np.array_equal(loaded.score(folders["digits"]).ood_score, fitted.score(folders["digits"]).ood_score)
    assert np.array_equal(loaded.calibration_.scores, fitted.calibration_.scores)
    assert loaded.config() == fitted.config()
    assert not list(tmp_path.iterdir())  # scoring keeps nothing
    assert loaded._distance_store.folder.name == fitted._distance_store.folder.name


def test_each_mode_refuses_the_other(model: Path, tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="of mode pixel, not feature: featdiff.load_detector"):
        Detector.from_pretrained(model)
    with pytest.raises(ModelError, match="of mode feature, not pixel"):
        PixelDetector.from_pretrained(tiny_model)


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["unet"].update(block_out_channels=[16, 32]), "tensor"),
        (lambda c: c["unet"].update(sample_size=32), "tensor"),
        (lambda c: c["settings"].update(repetitions=3), "tensor masks"),
        (lambda c: c["settings"].update(distances=["mse"]), "tensor"),
        (lambda c: c["settings"].update(sampler="none"), "unknown sampler"),
        (lambda c: c["settings"].update(colour="red"), "colour"),
        (lambda c: c.pop("unet"), "config.json lacks unet"),
        (lambda c: c.update(mode="sound"), "unknown mode 'sound'"),
        (lambda c: c["images"].update(calibration=7), "calibration"),
        (lambda c: c["unet"].update(mid_block_scale_factor="leading"), "mid_block_scale_factor"),
        (lambda c: c["unet"].update(block_out_channels=7), "block_out_channels"),
        (lambda c: c["scheduler"].update(clip_sample_range="wide"), "clip_sample_range"),
        (lambda c: c["scheduler"].update(clip_sample=1), "clip_sample"),
        (lambda c: c["scheduler"].update(prediction_type="weather"), "prediction_type"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_refused(copied: Path, change: Any, words: str) -> None:
    config = json.loads((copied / "config.json").read_text())
    change(config)
    (copied / "config.json").write_text(json.dumps(config))
    reseal(copied)
    with pytest.raises(ModelError) as error:
        load_detector(copied)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# ---- the rest ----


def test_the_distance_of_features_needs_its_backbone(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default backbone's real weights; a model remembers which they were."""
    arguments = PIXEL | {"distances": ["features", "mse"], "repetitions": 1, "steps": 1, "calibration": 0.1}
    detector = PixelDetector(**arguments | {"recipe": RECIPE | {"epochs": 1}}).fit(folders["train"])
    detector.save_pretrained(tmp_path / "model")
    expected = detector.score(folders["digits"]).ood_score
    np.testing.assert_allclose(
        load_detector(tmp_path / "model").score(folders["digits"]).ood_score, expected, atol=1e-4
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert len(config["features"]) == 64
    config["features"] = "0" * 64
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    reseal(tmp_path / "model")
    with pytest.raises(ModelError, match="other weights"):
        load_detector(tmp_path / "model")


def test_grey_images_and_a_picture_as_mask(folders: dict[str, Path], tmp_path: Path) -> None:
    Image.fromarray(np.tri(16, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    detector = PixelDetector(**PIXEL | {"channels": 1, "mask": str(tmp_path / "mask.png")}, flip=True)
    detector.fit(folders["train"])
    detector.save_pretrained(tmp_path / "model")
    (tmp_path / "mask.png").unlink()  # masks are part of the model
    loaded = load_detector(tmp_path / "model")
    assert np.array_equal(loaded.score(folders["digits"]).ood_score, detector.score(folders["digits"]).ood_score)
    assert torch.equal(detector.heads_.masks[1, 0], torch.ones(16, 16).tril().bool())


def test_a_picture_shows_the_least_and_the_most_strange(fitted: PixelDetector, tmp_path: Path) -> None:
    save_inpaintings(tmp_path / "held-out.png", *fitted.inpaintings())
    assert len(fitted.examples_) == 8
    scores = fitted.score_features(fitted.examples_)
    np.testing.assert_allclose(scores[:4], fitted.calibration_.scores[:4], atol=1e-3)
    np.testing.assert_allclose(scores[-4:], fitted.calibration_.scores[-4:], atol=1e-3)
    drawn = np.asarray(Image.open(tmp_path / "held-out.png").convert("RGB"))
    assert drawn.shape[0] > drawn.shape[1] and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 500


def test_a_picture_of_given_images(
    fitted: PixelDetector, model: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    files = sorted(folders["digits"].iterdir())[:3]
    loaded = PixelDetector.from_pretrained(model)
    x, masked, inpainted, scores = loaded.inpaintings(files)
    known = masked == x
    assert np.array_equal(inpainted[known], x[known]) and 0.4 < known.mean() < 0.9
    np.testing.assert_allclose(scores, fitted.score(files).ood_score, atol=1e-3)
    save_inpaintings(tmp_path / "digits.svg", x, masked, inpainted, scores)
    assert "<svg" in (tmp_path / "digits.svg").read_text()
    with pytest.raises(UsageError, match="was loaded"):
        loaded.inpaintings()
    (tmp_path / "bad.png").write_text("bad")
    with pytest.raises(UsageError, match="none of the images to inpaint"):
        fitted.inpaintings([tmp_path / "bad.png"])


def test_least_and_most() -> None:
    scores = np.array([5.0, np.nan, 1.0, 3.0, 9.0, 7.0])
    assert least_and_most(scores, 2).tolist() == [2, 3, 5, 4]
    assert least_and_most(scores, 3).tolist() == [2, 3, 0, 5, 4]


def test_half_of_the_images_are_mirrored() -> None:
    x = torch.rand(400, 1, 2, 3)
    found = flip_half(x, torch.Generator().manual_seed(0))
    mirrored = (found == x.flip(-1)).all(-1).all(-1).all(-1)
    kept = (found == x).all(-1).all(-1).all(-1)
    assert (mirrored ^ kept).all()
    assert 0.4 < mirrored.float().mean() < 0.6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mask_blocks": 5}, "mask_blocks 5 does not divide an image of 16 pixels"),
        ({"mask": "checker"}, "no mask 'checker'"),
        ({"size": 15}, "15 pixels cannot be halved"),
        ({"size": 0}, "size must be a whole number above 0"),
        ({"channels": 2}, "channels must be 3, or 1"),
        ({"attention": [5]}, "attention at 5 pixels: the levels have 16, 8"),
        ({"multipliers": []}, "multipliers"),
        ({"multipliers": "12"}, "multipliers"),
        ({"dropout": 1.5}, "dropout"),
        ({"flip": 1}, "flip must be true or false"),
        ({"distances": []}, "distances"),
        ({"distances": ["mse", "mse"]}, "distances"),
        ({"distances": ["lpip"]}, "did you mean lpips"),
        ({"distances": ["lpips"], "trunk": "alexx"}, "did you mean alex"),
        ({"distances": [["mse"]]}, "distances must be a list"),
        ({"size": 8, "mask_blocks": 2}, "the distance ssim needs images of at least 11 pixels, not 8"),
        ({"mask_ratio": "0.5"}, "mask_ratio must be a number"),
        ({"steps": 600}, "steps must divide the 1000 times"),
        ({"aggregate": "mode"}, "unknown aggregate 'mode'"),
        ({"sampler": "dim"}, "did you mean ddim"),
        ({"steps": 2000}, "must divide the 1000 times"),
        ({"sampler": "dpm++", "resamplings": 2}, "cannot resample"),
        ({"repetitions": 0}, "repetitions must be a whole number above 0"),
        ({"mixed_precision": "int8"}, "unknown mixed_precision 'int8'"),
        ({"pretrained": True}, "pretrained must be text"),
        ({"recipe": {"epoch": 3}}, "did you mean epoch"),
        ({"fpr": 0.001}, "fpr 0.001 needs about 3,330 images, and there are 120"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_any_work(
    folders: dict[str, Path], arguments: dict[str, Any], words: str
) -> None:
    def no_training(stage: str, done: int, total: int) -> None:
        assert stage == "features"

    with pytest.raises(UsageError) as error:
        PixelDetector(**PIXEL | arguments).fit(folders["train"], no_training)
    assert words in str(error.value)


@pytest.fixture
def _restored() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_restored")
def test_bf16_training_is_near_full_precision(folders: dict[str, Path], fitted: PixelDetector) -> None:
    half = PixelDetector(**PIXEL, mixed_precision="bf16").fit(folders["train"])
    again = PixelDetector(**PIXEL, mixed_precision="bf16", seed=1).fit(
        folders["train"]
    )  # accelerate's state is no obstacle
    assert again.validation_loss_ != half.validation_loss_
    assert half.validation_loss_ == pytest.approx(fitted.validation_loss_, rel=0.05)
    assert half.validation_loss_ != fitted.validation_loss_
    assert all(value.dtype == torch.float32 for value in half.heads_.denoiser.parameters())
