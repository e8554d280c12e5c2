"""Fitting the default mode: what it may be fitted on, what the cache keeps, and how it goes on after a stop."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_detectors import MODULE, loader, pictures, stack, tiny_net, to_tensor
from torch import Tensor, nn

from featdiff import Detector
from featdiff.exceptions import DamagedCache, FeatdiffError, NotFittedError, UsageError
from featdiff.features.store import FeatureStore
from featdiff.files.sealed import read_sealed, write_sealed
from featdiff.runtime import checkpoints


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_networks_train_in_any_context(
    fitted: Detector, small: dict[str, Any], files: list[str], context: Callable[[], Any]
) -> None:
    """As where a detector is fitted in the middle of somebody's evaluation."""
    with context():
        detector = Detector(**small).fit(files)
        np.testing.assert_array_equal(detector.calibration_.scores, fitted.calibration_.scores)
        assert torch.is_grad_enabled() is False


# ---- what may be fitted on ----


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
    np.testing.assert_allclose(detector.calibration_.scores, fitted.calibration_.scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("labels", [True, False])
def test_loader_can_be_scored(fitted: Detector, fresh: list[str], labels: bool) -> None:
    scores = fitted.score(loader(fresh, fitted, labels))
    assert scores.path == [f"loader[{i}]" for i in range(20)]
    np.testing.assert_allclose(scores.ood_score, fitted.score(fresh).ood_score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [torch.zeros(2, 8), (), None], ids=["2d", "empty", "none"])
def test_loader_of_something_else_is_refused(fitted: Detector, batch: object) -> None:
    with pytest.raises(UsageError, match=r"a loader must give .*\(B, C, H, W\)"):
        fitted.score(iter([batch]))


def test_loader_of_single_tensors_is_refused_with_both_ways_out(fitted: Detector) -> None:
    with pytest.raises(UsageError, match=r"\(3, 8, 8\).*DataLoader.*\(B, C, H, W\).*transform"):
        fitted.score(iter([torch.zeros(3, 8, 8)]))


class Pictures:
    """A dataset of (picture, label)."""

    def __init__(self, files: list[str]) -> None:
        self.items = [(picture, i) for i, picture in enumerate(pictures(files))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.items[index]


def test_datasets_and_generators_are_fitted_and_scored_as_the_files_are(
    fitted: Detector, small: dict[str, Any], files: list[str], fresh: list[str]
) -> None:
    expected = fitted.score(fresh).ood_score
    for source in (Pictures(files), iter(pictures(files)), iter(files)):
        detector = Detector(**small).fit(source)
        assert detector.n_images_ == fitted.n_images_
        np.testing.assert_allclose(detector.score(Pictures(fresh)).ood_score, expected, rtol=1e-4, atol=1e-5)

    scores = fitted.score(
        {"image": picture, "path": path} for picture, path in zip(pictures(fresh), fresh, strict=True)
    )
    assert scores.path == fresh
    np.testing.assert_allclose(scores.ood_score, expected, rtol=1e-4, atol=1e-5)
    names, _ = fitted.features(Pictures(fresh))
    assert names == [f"dataset[{i}]" for i in range(len(fresh))]


def test_rows_of_a_generator_come_while_it_runs(small: dict[str, Any], files: list[str]) -> None:
    detector = Detector(**{**small, "image_batch": 2}).fit(files)
    read: list[str] = []
    totals: list[int] = []

    def stream() -> Iterator[object]:
        for file in files:
            read.append(file)
            yield {"image": file}

    parts = detector.iter_scores(stream(), progress=lambda stage, done, total: totals.append(total - done))
    assert read == []
    assert next(parts).path == files[:2]
    assert len(read) < 10
    assert [path for part in parts for path in part.path] == files[2:]
    assert set(totals) == {0}  # how many there will be is not known


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
    np.testing.assert_array_equal(detector.calibration_.scores, fitted.calibration_.scores)
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
    np.testing.assert_array_equal(detector.calibration_.scores, fitted.calibration_.scores)


def test_nothing_readable_names_the_first(small: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("hello")
    with pytest.raises(UsageError, match=r"none of the images could be read.*a\.png: not an image"):
        Detector(**small).fit(tmp_path)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_are_refused(small: dict[str, Any], files: list[str], count: int) -> None:
    with pytest.raises(UsageError, match=f"too few different images, {count}:"):
        Detector(**small).fit(files[:count])


def test_picture_beyond_the_limit_is_unreadable(small: dict[str, Any], files: list[str]) -> None:
    detector = Detector(**small, max_pixels=32 * 32).fit(files)
    scores = detector.score([*pictures(files[:1]), Image.new("RGB", (33, 32))])
    assert scores.status == ["ok", "unreadable"]
    assert "33 x 32 pixels, more than the limit of 1,024" in scores.reason[1]


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
    np.testing.assert_array_equal(warm.calibration_.scores, cold.calibration_.scores)


def test_another_module_with_the_same_weights_never_gets_the_features_of_the_first(
    files: list[str], tmp_path: Path
) -> None:
    Detector(tiny_net(), **MODULE, cache=tmp_path / "shared").fit(files)
    warm = Detector(tiny_net(nn.Sigmoid()), **MODULE, cache=tmp_path / "shared").fit(files)
    cold = Detector(tiny_net(nn.Sigmoid()), **MODULE, cache=tmp_path / "own").fit(files)
    np.testing.assert_array_equal(warm.calibration_.scores, cold.calibration_.scores)


def test_second_run_computes_nothing_again(small: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    stages: list[str] = []
    first = Detector(**small, cache=tmp_path).fit(files)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")}
    second = Detector(**small, cache=tmp_path).fit(files, lambda stage, *_: stages.append(stage))
    assert before and {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")} == before
    assert set(stages) == {"features"}  # no step of training
    np.testing.assert_array_equal(first.calibration_.scores, second.calibration_.scores)


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
    arguments = {**small, "joint": joint, "recipe": {"epochs": 6, "min_steps": 1, "batch_size": 8, "check_steps": 1}}
    with pytest.raises(KeyboardInterrupt):
        Detector(**arguments, cache=tmp_path / "stopped").fit(files, interrupt("training", 10))
    steps: list[int] = []
    resumed = Detector(**arguments, cache=tmp_path / "stopped").fit(
        files, lambda stage, done, _: steps.append(done) if stage == "training" else None
    )
    through = Detector(**arguments, cache=tmp_path / "through").fit(files)
    assert steps[0] > 1  # the epochs before the stop are not trained again
    assert steps[-1] == 18
    np.testing.assert_array_equal(resumed.calibration_.scores, through.calibration_.scores)
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
@pytest.mark.parametrize("damage", ["cut", "text", "other-network", "other-content", "other-training"])
def test_damaged_checkpoint_is_removed_and_training_starts_anew(
    fitted: Detector, small: dict[str, Any], files: list[str], tmp_path: Path, damage: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        Detector(**small, cache=tmp_path).fit(files, interrupt("training", 4))
    (checkpoint,) = tmp_path.rglob("training-*.pt")
    data = checkpoint.read_bytes()
    if damage == "other-network":
        state = torch.load(io.BytesIO(read_sealed(checkpoint)), weights_only=True)
        stream = io.BytesIO()
        torch.save(state | {"denoiser": {"weight": torch.ones(3)}}, stream)
        write_sealed(checkpoint, stream.getvalue())
    elif damage == "other-content":
        stream = io.BytesIO()
        torch.save([1, 2, 3], stream)
        write_sealed(checkpoint, stream.getvalue())
    elif damage == "other-training":
        Detector(**small, cache=tmp_path).fit(files[:-1])
        (other,) = {*tmp_path.rglob("training-*.pt")} - {checkpoint}
        shutil.copy(other, checkpoint)
    else:
        checkpoint.write_bytes({"cut": data[: len(data) // 2], "text": b"hello"}[damage])

    with pytest.warns(DamagedCache, match=f"{checkpoint.name} was damaged .* training starts anew"):
        detector = Detector(**small, cache=tmp_path).fit(files)
    np.testing.assert_array_equal(detector.calibration_.scores, fitted.calibration_.scores)


def test_cache_that_cannot_be_written_is_one_line(small: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FeatdiffError, match=r"cache .*file.* cannot be written.*another cache") as caught:
        Detector(**small, cache=tmp_path / "file").fit(files)
    assert "\n" not in str(caught.value)
