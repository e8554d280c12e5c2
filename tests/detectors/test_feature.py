"""The joining room: fit, score, verdict, and what must never change a score."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from featdiff import Detector
from featdiff.exceptions import FeatdiffError, ModelError, NotFittedError, UsageError, WeightsError
from featdiff.features.layout import block_normalise
from featdiff.features.store import FeatureStore
from featdiff.files.model_folder import load
from featdiff.runtime import checkpoints
from featdiff.verdicts.calibration import flagged, p_values

COLUMNS = ["path", "status", "reason", "ood_score", "p_value", "is_ood"]


@pytest.fixture(scope="module")
def small(tiny_arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a detector that fits in a quarter of a second: two layers at 32 px."""
    return {
        **tiny_arguments,
        "layers": "layer1,layer2",
        "transform": {"input_size": (3, 32, 32), "crop_pct": 1.0},
        "hidden_max": 64,
        "blocks": 1,
        "fpr": 0.2,
        "recipe": {"epochs": 4, "min_steps": 1, "batch_size": 16},
    }


@pytest.fixture(scope="module")
def files(sample_folders: dict[str, Path]) -> list[str]:
    """40 tiles to fit on; 8 of them calibrate."""
    return sorted(map(str, sample_folders["train"].iterdir()))[::9][:40]


@pytest.fixture(scope="module")
def fresh(sample_folders: dict[str, Path]) -> list[str]:
    """20 tiles to score."""
    return sorted(map(str, sample_folders["test"].iterdir()))[::6][:20]


@pytest.fixture(scope="module")
def fitted(small: dict[str, Any], files: list[str]) -> Detector:
    """A small detector fitted on ``files``; do not change it."""
    return Detector(**small).fit(files)


def pictures(files: list[str]) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in files]


def stack(files: list[str]) -> np.ndarray:
    """(N, 32, 32, 3) uint8."""
    return np.stack([np.asarray(picture) for picture in pictures(files)])


class TinyNet(nn.Module):
    """Somebody's own network."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 5, stride=2)
        self.act = activation or nn.ReLU()
        self.body = nn.Conv2d(12, 24, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.act(self.stem(x)))


def tiny_net(activation: nn.Module | None = None) -> TinyNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return TinyNet(activation)


def to_tensor(picture: Image.Image) -> Tensor:
    """The preprocessing that goes with ``TinyNet``."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 - 0.5


MODULE: dict[str, Any] = {
    "layers": ["stem", "body"],
    "transform": to_tensor,
    "hidden_max": 32,
    "blocks": 1,
    "fpr": 0.2,
    "recipe": {"epochs": 2, "min_steps": 1, "batch_size": 16},
}


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
    parts = [features[:, columns] for columns in tiny_detector.extractor_.columns.values()]
    scrambled = torch.cat([part[:, torch.randperm(part.shape[1], generator=rng)] for part in parts], 1)
    limit = np.quantile(tiny_detector.calibration_, 0.95)
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
        p = p_values(order[100:], np.sort(order[:100]))
        row[:] = [flagged(p, rate).mean() for rate in rates]
    error = alarms.std(0) / np.sqrt(200)
    assert (alarms.mean(0) <= rates + 3 * error).all()
    assert (alarms.mean(0) >= np.array(rates) - 1 / 101 - 3 * error).all()  # and is not merely never flagging


def test_p_values_and_verdicts_follow_from_the_calibration_scores(fitted: Detector, fresh: list[str]) -> None:
    scores = fitted.score(fresh, fpr=0.25)
    expected = [(1 + np.sum(fitted.calibration_ >= score)) / 9 for score in scores.ood_score]
    np.testing.assert_allclose(scores.p_value, expected, rtol=1e-12)
    np.testing.assert_array_equal(scores.is_ood, scores.p_value <= 0.25)
    assert len(fitted.calibration_) == 8
    assert (np.diff(fitted.calibration_) >= 0).all()


def test_calibration_scores_are_scores_of_held_out_images(fitted: Detector, files: list[str]) -> None:
    """Each of the 8 is the score of one of the images that were given, and no image gives two."""
    scores = fitted.score(files).ood_score
    nearest = [int(np.argmin(abs(scores - value))) for value in fitted.calibration_]
    np.testing.assert_allclose(scores[nearest], fitted.calibration_, rtol=1e-4, atol=1e-4)
    assert len(set(nearest)) == 8


def test_rate_can_be_changed_when_scoring(fitted: Detector, fresh: list[str]) -> None:
    few, many = fitted.score(fresh, fpr=0.12), fitted.score(fresh, fpr=0.9)
    np.testing.assert_array_equal(few.ood_score, many.ood_score)
    assert (many.is_ood >= few.is_ood).all()
    assert many.is_ood.sum() > few.is_ood.sum()
    np.testing.assert_array_equal(fitted.score(fresh).is_ood, fitted.score(fresh, fpr=0.2).is_ood)


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
        *("featdiff", "layerwise", "mse", "mfsim", "lr", "knn_layer2", "layer_layer1", "layer_layer2")
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


# ---- what may be fitted on ----


def loader(files: list[str], detector: Detector, labels: bool) -> DataLoader[Any]:
    pixels = torch.stack([detector.extractor_.transform(picture) for picture in pictures(files)])
    parts = [pixels, torch.arange(len(pixels))] if labels else [pixels]
    return DataLoader(TensorDataset(*parts), batch_size=16)


def as_folder(files: list[str], folder: Path) -> Path:
    for file in files:
        (folder / Path(file).name).write_bytes(Path(file).read_bytes())
    return folder


@pytest.mark.parametrize("kind", ["folder", "path", "pil", "array", "floats", "tensor", "loader", "generator"])
def test_every_source_gives_the_same_detector(
    fitted: Detector, small: dict[str, Any], files: list[str], tmp_path: Path, kind: str
) -> None:
    sources: dict[str, Callable[[], object]] = {
        "folder": lambda: str(as_folder(files, tmp_path)),
        "path": lambda: [Path(file) for file in files],
        "pil": lambda: pictures(files),
        "array": lambda: stack(files),
        "floats": lambda: [image / 255 for image in stack(files)],
        "tensor": lambda: torch.from_numpy(stack(files)).permute(0, 3, 1, 2),
        "loader": lambda: loader(files, fitted, labels=True),
        "generator": lambda: (batch[0] for batch in loader(files, fitted, labels=False)),
    }
    detector = Detector(**small).fit(sources[kind]())
    assert detector.n_images_ == 40
    np.testing.assert_allclose(detector.calibration_, fitted.calibration_, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("labels", [True, False])
def test_loader_can_be_scored(fitted: Detector, fresh: list[str], labels: bool) -> None:
    scores = fitted.score(loader(fresh, fitted, labels))
    assert scores.path == [f"loader[{i}]" for i in range(20)]
    np.testing.assert_allclose(scores.ood_score, fitted.score(fresh).ood_score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [torch.zeros(3, 8, 8), "text", (), None], ids=["3d", "text", "empty", "none"])
def test_loader_of_something_else_is_refused(fitted: Detector, batch: object) -> None:
    with pytest.raises(UsageError, match=r"a loader must give .*\(B, C, H, W\)"):
        fitted.score(iter([batch]))


@pytest.mark.parametrize("method", ["fit", "score"])
@pytest.mark.parametrize("source", [[], iter(()), "missing/folder", 7], ids=["list", "loader", "missing", "number"])
def test_nothing_to_read_is_refused(fitted: Detector, small: dict[str, Any], method: str, source: object) -> None:
    detector = fitted if method == "score" else Detector(**small)
    with pytest.raises(UsageError):
        getattr(detector, method)(iter(()) if hasattr(source, "__next__") else source)


def test_empty_folder_is_refused(fitted: Detector, small: dict[str, Any], tmp_path: Path) -> None:
    for action in (Detector(**small).fit, fitted.score):
        with pytest.raises(UsageError, match="no images"):
            action(tmp_path)


def test_duplicates_count_once(fitted: Detector, small: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    """A copy under another name would otherwise calibrate with an image that was trained on."""
    copies = [tmp_path / f"copy_{i}.png" for i in range(5)]
    for copy, file in zip(copies, files, strict=False):
        copy.write_bytes(Path(file).read_bytes())
    detector = Detector(**small).fit([*files, *copies])
    assert (detector.n_images_, detector.n_duplicates_) == (40, 5)
    np.testing.assert_array_equal(detector.calibration_, fitted.calibration_)
    assert (fitted.n_images_, fitted.n_duplicates_) == (40, 0)


def test_duplicates_in_a_loader_count_once(fitted: Detector, small: dict[str, Any], files: list[str]) -> None:
    batches = [batch[0] for batch in loader(files, fitted, labels=False)]
    detector = Detector(**small).fit(iter([*batches, batches[0][:7]]))
    assert (detector.n_images_, detector.n_duplicates_) == (40, 7)


def test_path_given_twice_is_one_row(fitted: Detector, fresh: list[str]) -> None:
    assert fitted.score([fresh[0], fresh[1], fresh[0]]).path == fresh[:2]


def test_palette_pictures_with_other_colours_are_other_images(small: dict[str, Any], files: list[str]) -> None:
    """The same indices into two palettes: the bytes of the pixels are equal, the pictures are not."""
    first = [picture.quantize(16) for picture in pictures(files)]
    second = [picture.copy() for picture in first]
    for picture in second:
        picture.putpalette([255 - value for value in picture.getpalette() or []])
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    detector = Detector(**small).fit([*first, *second])
    assert (detector.n_images_, detector.n_duplicates_) == (80, 0)


def test_unreadable_files_are_listed_and_skipped(
    fitted: Detector, small: dict[str, Any], files: list[str], tmp_path: Path
) -> None:
    cut, empty, text = (tmp_path / name for name in ("cut.png", "empty.png", "text.jpg"))
    cut.write_bytes(Path(files[0]).read_bytes()[:300])
    empty.write_bytes(b"")
    text.write_text("hello")
    gone = str(tmp_path / "gone.png")
    detector = Detector(**small).fit([cut, *files, empty, text, gone])
    reasons = dict(detector.unreadable_)
    assert list(reasons) == [str(cut), str(empty), str(text), gone]
    assert "damaged" in reasons[str(cut)]
    assert "empty file" in reasons[str(empty)]
    assert "not an image" in reasons[str(text)]
    assert "no such file" in reasons[gone]
    assert detector.n_images_ == 40
    np.testing.assert_array_equal(detector.calibration_, fitted.calibration_)


def test_nothing_readable_names_the_first(small: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("hello")
    with pytest.raises(UsageError, match=r"none of the images could be read.*a\.png: not an image"):
        Detector(**small).fit(tmp_path)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_are_refused(small: dict[str, Any], files: list[str], count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} different images are too few"):
        Detector(**small).fit(files[:count])


def test_picture_beyond_the_limit_is_unreadable(small: dict[str, Any], files: list[str]) -> None:
    detector = Detector(**small, max_pixels=32 * 32).fit(files)
    scores = detector.score([*pictures(files[:1]), Image.new("RGB", (33, 32))])
    assert scores.status == ["ok", "unreadable"]
    assert "33 x 32 pixels, more than the limit of 1,024" in scores.reason[1]


# ---- rates that cannot be held ----


def test_rate_that_needs_more_images_is_refused_when_fitting(small: dict[str, Any], files: list[str]) -> None:
    calls: list[str] = []
    with pytest.raises(UsageError, match="0.01 needs at least 99 .* there are 8") as caught:
        Detector(**{**small, "fpr": 0.01}).fit(files, lambda stage, *_: calls.append(stage))
    assert "training" not in calls
    assert "--fpr 0.112 or more" in str(caught.value)


def test_rate_that_needs_more_images_is_refused_when_scoring(fitted: Detector, fresh: list[str]) -> None:
    with pytest.raises(UsageError, match="0.001 needs at least 999 .* there are 8"):
        fitted.score(fresh, fpr=0.001)
    assert fitted.score(fresh, fpr=1 / 9).p_value.min() >= 1 / 9 - 1e-12  # the smallest rate that 8 support


@pytest.mark.parametrize("fpr", [0, 1, -0.1, 2, float("nan"), "often", None])
def test_rate_that_is_none_is_refused(fitted: Detector, fresh: list[str], fpr: Any) -> None:
    with pytest.raises(UsageError, match="--fpr"):
        Detector(fpr=fpr)
    if fpr is not None:
        with pytest.raises(UsageError, match="--fpr"):
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
    spread = np.std(fitted.calibration_)
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
    spread = np.std(fitted.calibration_)
    assert abs(detector.calibration_ - fitted.calibration_).max() < 1e-3 * spread


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


# ---- variants ----


@pytest.mark.parametrize("head", ["fused", "layerwise", "mse", "mfsim", "lr"])
@pytest.mark.parametrize("joint", [False, True])
def test_every_head_can_be_the_score(
    small: dict[str, Any], files: list[str], fresh: list[str], tmp_path: Path, head: str, joint: bool
) -> None:
    detector = Detector(**small, head=head, joint=joint).fit(files)
    detector.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model")
    scores = loaded.score(fresh)
    np.testing.assert_array_equal(scores.ood_score, detector.score(fresh).ood_score)
    assert np.isfinite(scores.ood_score).all()
    assert len(set(scores.ood_score)) == 20
    pixels = torch.stack([detector.extractor_.transform(picture) for picture in pictures(fresh)])
    heads = detector.all_heads(detector.extractor_(pixels))
    named = {"layerwise", "mse", "mfsim", "lr", "layer_layer1", "layer_layer2"}
    neighbours = {"knn_layer2"} if head == "fused" else set()  # diffusion alone keeps no bank
    assert set(heads) == (named | neighbours) - {head} | {"featdiff"}
    np.testing.assert_allclose(heads["featdiff"], scores.ood_score, rtol=1e-4, atol=1e-5)


def test_mse_head_is_the_mean_squared_error_of_the_averaged_reconstruction(
    small: dict[str, Any], files: list[str], fresh: list[str]
) -> None:
    """Computed again by hand from the denoiser, the schedule and the stored noise."""
    detector = Detector(**small, head="mse").fit(files)
    extractor, heads = detector.extractor_, detector.heads_.diffusion
    pixels = torch.stack([extractor.transform(picture) for picture in pictures(fresh)])
    x = block_normalise(extractor(pixels)[:, :80], extractor.widths)
    kept = heads.scheduler.alphas_cumprod
    errors = []
    with torch.inference_mode():
        for start, draws in zip((70, 95), heads.noise, strict=True):
            t = torch.full((len(x),), start)
            noisy = [kept[start].sqrt() * x + (1 - kept[start]).sqrt() * draw for draw in draws]
            mean = torch.stack([heads.denoiser(x_t, t) for x_t in noisy]).mean(0)
            errors.append((x - mean).square().mean(1))
    expected = torch.stack(errors).mean(0).numpy()
    np.testing.assert_allclose(detector.score(fresh).ood_score, expected, rtol=1e-4)


def test_joint_is_one_network_over_all_layers(small: dict[str, Any], files: list[str]) -> None:
    names = list(Detector(**small, joint=True).fit(files).heads_.state_dict())
    assert "diffusion.denoiser.project_in.weight" in names
    assert not any(name.startswith("diffusion.denoiser.layers.") for name in names)


def test_several_steps_and_other_times_work(small: dict[str, Any], files: list[str], fresh: list[str]) -> None:
    one = Detector(**small, start_times=(9,), draws=1).fit(files).score(fresh)
    many = Detector(**small, start_times=(9,), draws=1, stride=3).fit(files).score(fresh)
    assert np.isfinite(many.ood_score).all()
    assert not np.allclose(one.ood_score, many.ood_score, rtol=1e-3)


# ---- a module of one's own ----


def test_own_module_is_fitted_saved_and_loaded(files: list[str], fresh: list[str], tmp_path: Path) -> None:
    detector = Detector(tiny_net(), **MODULE).fit(files)
    scores = detector.score(fresh)
    assert scores.columns == [*COLUMNS, "layer_stem", "layer_body"]
    assert detector.extractor_.widths == (12, 24)
    detector.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model", backbone=tiny_net(), transform=to_tensor)
    np.testing.assert_array_equal(loaded.score(fresh).ood_score, scores.ood_score)


def test_own_module_must_be_given_again(files: list[str], tmp_path: Path) -> None:
    Detector(tiny_net(), **MODULE).fit(files).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"your own module.*backbone=.*TinyNet"):
        Detector.from_pretrained(tmp_path / "model")


def changed(net: TinyNet) -> TinyNet:
    with torch.no_grad():
        net.body.bias[0] += 1
    return net


@pytest.mark.parametrize(
    "other",
    [lambda: changed(tiny_net()), lambda: tiny_net(nn.GELU()), lambda: nn.Sequential(nn.Conv2d(3, 12, 5))],
    ids=["other-weights", "other-activation", "other-network"],
)
def test_another_module_is_refused(files: list[str], tmp_path: Path, other: Callable[[], nn.Module]) -> None:
    """Equal weights are not enough: ReLU and GELU have none, and give other features."""
    Detector(tiny_net(), **MODULE).fit(files).save_pretrained(tmp_path / "model")
    with pytest.raises(FeatdiffError):
        Detector.from_pretrained(tmp_path / "model", backbone=other(), transform=to_tensor)


def test_own_module_without_a_transform_takes_ready_tensors_only(files: list[str]) -> None:
    arguments = {**MODULE, "transform": None}
    batches = torch.stack([to_tensor(picture) for picture in pictures(files)]).split(16)
    detector = Detector(tiny_net(), **arguments).fit(iter(batches))
    np.testing.assert_allclose(
        detector.calibration_, Detector(tiny_net(), **MODULE).fit(files).calibration_, rtol=1e-3, atol=1e-4
    )
    with pytest.raises(UsageError, match="transform="):
        Detector(tiny_net(), **arguments).fit(files)


def test_own_module_can_be_trained_on_afterwards(files: list[str], fresh: list[str]) -> None:
    """Scores do not follow its mode, its batch statistics do not move, and its weights do not come back frozen."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    detector = Detector(net, **{**MODULE, "layers": ["1"]}).fit(files)
    scores = detector.score(fresh).ood_score
    net.train()
    np.testing.assert_array_equal(detector.score(fresh).ood_score, scores)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_unknown_layer_gets_a_hint(files: list[str], small: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="unknown layer 'bodi'; did you mean body"):
        Detector(tiny_net(), **{**MODULE, "layers": ["bodi"]}).fit(files)
    with pytest.raises(UsageError, match="unknown layer 'layer7'; did you mean layer"):
        Detector(**{**small, "layers": "layer7"}).fit(files)


# ---- cached features are used only where they are right ----


def test_model_arguments_are_part_of_the_features(
    small: dict[str, Any], files: list[str], fresh: list[str], tmp_path: Path
) -> None:
    """Another activation leaves the weights, and so their fingerprint, as they are."""
    Detector(**small, cache=tmp_path / "shared").fit(files)
    gelu = {**small, "model_args": {"act_layer": "gelu"}}
    warm = Detector(**gelu, cache=tmp_path / "shared").fit(files)
    cold = Detector(**gelu, cache=tmp_path / "own").fit(files)
    np.testing.assert_array_equal(warm.score(fresh).ood_score, cold.score(fresh).ood_score)


class Scaled:
    """A transform whose ``repr`` says nothing of its state, as most do."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __repr__(self) -> str:
        return "Scaled()"

    def __call__(self, picture: Image.Image) -> Tensor:
        return to_tensor(picture) * self.factor


def test_another_transform_never_gets_the_features_of_the_first(files: list[str], tmp_path: Path) -> None:
    Detector(tiny_net(), **{**MODULE, "transform": Scaled(1)}, cache=tmp_path / "shared").fit(files)
    inverse = {**MODULE, "transform": Scaled(-1)}
    warm = Detector(tiny_net(), **inverse, cache=tmp_path / "shared").fit(files)
    cold = Detector(tiny_net(), **inverse, cache=tmp_path / "own").fit(files)
    np.testing.assert_array_equal(warm.calibration_, cold.calibration_)


def test_another_module_with_the_same_weights_never_gets_the_features_of_the_first(
    files: list[str], tmp_path: Path
) -> None:
    Detector(tiny_net(), **MODULE, cache=tmp_path / "shared").fit(files)
    warm = Detector(tiny_net(nn.Sigmoid()), **MODULE, cache=tmp_path / "shared").fit(files)
    cold = Detector(tiny_net(nn.Sigmoid()), **MODULE, cache=tmp_path / "own").fit(files)
    np.testing.assert_array_equal(warm.calibration_, cold.calibration_)


def test_second_run_computes_nothing_again(small: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    stages: list[str] = []
    first = Detector(**small, cache=tmp_path).fit(files)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")}
    second = Detector(**small, cache=tmp_path).fit(files, lambda stage, *_: stages.append(stage))
    assert before and {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")} == before
    assert set(stages) == {"features"}  # no step of training
    np.testing.assert_array_equal(first.calibration_, second.calibration_)


def test_other_rate_or_head_needs_no_new_training(small: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    Detector(**small, cache=tmp_path).fit(files)
    stages: list[str] = []
    Detector(**{**small, "fpr": 0.3, "head": "mse"}, cache=tmp_path).fit(files, lambda s, *_: stages.append(s))
    assert "training" not in stages


# ---- interruptions ----


def interrupt(stage: str, at: int) -> Callable[[str, int, int], None]:
    """A progress callback that acts as Ctrl-C does."""

    def progress(now: str, done: int, total: int) -> None:
        if now == stage and done >= at:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def eager_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after each epoch, however short."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", -1)


@pytest.mark.usefixtures("eager_checkpoints")
@pytest.mark.parametrize("joint", [False, True])
def test_stopped_training_goes_on_to_the_same_scores(
    small: dict[str, Any], files: list[str], fresh: list[str], tmp_path: Path, joint: bool
) -> None:
    arguments = {**small, "joint": joint, "recipe": {"epochs": 6, "min_steps": 1, "batch_size": 8}}
    with pytest.raises(KeyboardInterrupt):
        Detector(**arguments, cache=tmp_path / "stopped").fit(files, interrupt("training", 10))
    steps: list[int] = []
    resumed = Detector(**arguments, cache=tmp_path / "stopped").fit(
        files, lambda stage, done, _: steps.append(done) if stage == "training" else None
    )
    through = Detector(**arguments, cache=tmp_path / "through").fit(files)
    assert steps[0] > 1  # the epochs before the stop are not trained again
    assert steps[-1] == 18
    np.testing.assert_array_equal(resumed.calibration_, through.calibration_)
    np.testing.assert_array_equal(resumed.score(fresh).ood_score, through.score(fresh).ood_score)


def test_stopped_extraction_keeps_what_was_computed(small: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    arguments = {**small, "image_batch": 8, "cache": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        Detector(**arguments).fit(files, interrupt("features", 16))
    (folder,) = (tmp_path / "features").iterdir()
    assert len(FeatureStore(folder, 128)) >= 16
    assert Detector(**arguments).fit(files).n_images_ == 40
    assert len(FeatureStore(folder, 128)) == 40


def test_stopped_second_fit_never_gives_mixed_scores(small: dict[str, Any], files: list[str], fresh: list[str]) -> None:
    """Half-trained networks with the calibration of an earlier fit: no answer is better than that one."""
    detector = Detector(**small, seed=4).fit(files)
    before = detector.score(fresh).ood_score
    with pytest.raises(KeyboardInterrupt):
        detector.fit(files[5:], interrupt("training", 1))
    try:
        after = detector.score(fresh).ood_score
    except NotFittedError:
        return
    np.testing.assert_array_equal(after, before)


def test_scoring_can_be_stopped_and_started_again(fitted: Detector, fresh: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        fitted.score(fresh, progress=interrupt("scoring", 1))
    assert len(fitted.score(fresh)) == 20


@pytest.mark.usefixtures("eager_checkpoints")
@pytest.mark.parametrize("damage", ["cut", "text", "other-network", "other-content"])
def test_damaged_checkpoint_is_as_good_as_none(
    fitted: Detector, small: dict[str, Any], files: list[str], tmp_path: Path, damage: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        Detector(**small, cache=tmp_path).fit(files, interrupt("training", 4))
    (checkpoint,) = tmp_path.rglob("training-*.pt")
    data = checkpoint.read_bytes()
    if damage == "other-network":
        state = torch.load(checkpoint, weights_only=True)
        state["denoiser"] = {"weight": torch.ones(3)}
        torch.save(state, checkpoint)
    elif damage == "other-content":
        torch.save([1, 2, 3], checkpoint)
    else:
        checkpoint.write_bytes({"cut": data[: len(data) // 2], "text": b"hello"}[damage])
    detector = Detector(**small, cache=tmp_path).fit(files)
    np.testing.assert_array_equal(detector.calibration_, fitted.calibration_)


def test_cache_that_cannot_be_written_is_one_line(small: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FeatdiffError, match=r"cache .*file.* cannot be written.*another cache") as caught:
        Detector(**small, cache=tmp_path / "file").fit(files)
    assert "\n" not in str(caught.value)


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(
            ({name: value}, name)
            for name in (
                "hidden_ratio",
                "hidden_max",
                "blocks",
                "timesteps",
                "draws",
                "image_batch",
                "max_pixels",
            )
            for value in (0, -1, "3", None, True)
        ),
        *(({name: 1.5}, name) for name in ("hidden_max", "blocks", "timesteps", "draws", "image_batch", "workers")),
        ({"hidden_ratio": float("nan")}, "hidden_ratio"),
        ({"stride": 0}, "stride"),
        ({"stride": 2.5}, "stride"),
        ({"workers": -2}, "workers"),
        ({"start_times": ()}, "start_times"),
        ({"start_times": (100,)}, "0 .. 99"),
        ({"start_times": (-1,)}, "start_times"),
        ({"start_times": (1.5,)}, "start_times"),
        ({"start_times": 20}, "start_times"),
        ({"start_times": "20"}, "start_times"),
        ({"start_times": (9,), "timesteps": 9}, "0 .. 8"),
        ({"head": "mean"}, "unknown head 'mean'; known: fused, layerwise, mse, mfsim, lr"),
        ({"fusion": "median"}, "unknown fusion 'median'; known: mean, max"),
        ({"neighbors": -1}, "neighbors must be"),
        ({"neighbors": 2.5}, "neighbors must be"),
        ({"bank_size": 0}, "bank_size"),
        ({"bank_size": 4}, "a bank of 4 vectors has no 5 neighbours"),
        ({"coreset": "best"}, "unknown coreset 'best'"),
        ({"backend": "fais"}, "unknown backend 'fais'; did you mean faiss"),
        ({"calibration": 0}, "calibration"),
        ({"calibration": 0.5}, "calibration"),
        ({"calibration": "0.2"}, "calibration"),
        ({"validation": 1}, "validation"),
        ({"validation": float("nan")}, "validation"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "a"}, "seed"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"recipe": {"epochs": 0}}, "epochs must be above 0"),
        ({"recipe": {"epoch": 3}}, "unknown recipe setting 'epoch'; did you mean epochs"),
        ({"recipe": {"lr_schedule": "linear"}}, "unknown lr_schedule 'linear'"),
        ({"recipe": {"epochs": "3"}}, "epochs"),
        ({"recipe": {"batch_size": 2.5}}, "batch_size"),
        ({"recipe": 5}, "recipe"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_nonsense_is_refused_before_any_work(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Detector(**arguments)


@pytest.mark.parametrize("seed", [0, 2**31, 2**48, 2**63 - 1, 2**64])
def test_every_seed_works_or_is_refused_at_once(small: dict[str, Any], files: list[str], seed: int) -> None:
    try:
        detector = Detector(**small, seed=seed)
    except UsageError as error:
        assert "seed" in str(error) and seed > 2**31
        return
    assert len(detector.fit(files).calibration_) == 8


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"backbone": "test_resnett"},
            UsageError,
            "unknown backbone 'test_resnett'; did you mean test_resnet",
        ),
        ({"backbone": "test_vit"}, WeightsError, "does not fit test_vit"),
        ({"weights": "nowhere.safetensors"}, WeightsError, "nowhere.safetensors"),
        ({"transform": {"colour": 1}}, UsageError, "unknown transform setting 'colour'"),
        ({"model_args": {"wings": 2}}, UsageError, "wings"),
    ],
    ids=["name", "weights", "file", "transform", "model-args"],
)
def test_backbone_that_cannot_be_had_is_refused_when_fitting(
    small: dict[str, Any], files: list[str], arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        Detector(**{**small, **arguments}).fit(files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "action",
    [
        lambda detector, files: detector.score(files),
        lambda detector, files: detector.iter_scores(files),
        lambda detector, files: detector.score_features(torch.zeros(1, 8)),
        lambda detector, files: detector.all_heads(torch.zeros(1, 8)),
        lambda detector, files: detector.config(),
    ],
    ids=["score", "iter_scores", "score_features", "all_heads", "config"],
)
def test_unfitted_detector_says_so(files: list[str], action: Callable[[Detector, list[str]], object]) -> None:
    with pytest.raises(NotFittedError, match="fit"):
        action(Detector(), files)


def test_config_is_plain_and_holds_what_was_given(fitted: Detector, small: dict[str, Any], tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path / "model")
    config = load(tmp_path / "model")[0]
    assert config["layers"] == {"layer1": 32, "layer2": 48}
    assert config["images"] == {"different": 40, "calibration": 8, "bank": 27}
    assert config["arguments"]["transform"]["input_size"] == [3, 32, 32]
    assert config["arguments"]["recipe"]["epochs"] == small["recipe"]["epochs"]
    assert config["arguments"]["recipe"]["learning_rate"] == 1e-3


def test_fit_returns_the_detector(small: dict[str, Any], files: list[str]) -> None:
    detector = Detector(**small)
    assert detector.fit(files) is detector


def test_rows_are_lazy(fitted: Detector, fresh: list[str]) -> None:
    """The first rows come before the last image is read."""

    def batches() -> Iterator[Tensor]:
        yield next(iter(loader(fresh, fitted, labels=False)))[0][:2]
        raise AssertionError("read ahead")

    assert len(next(fitted.iter_scores(batches()))) == 2
