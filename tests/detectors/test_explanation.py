"""Why an image is judged as it is: parts of the score, the nearest normal images, sentences, and what a model keeps."""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_detectors import MODULE, stack, tiny_net
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from featdiff import Detector
from featdiff.detectors import bank_images
from featdiff.detectors.reasons import layer_labels, sentences
from featdiff.exceptions import ModelError, UsageError
from featdiff.features.extractor import FeatureExtractor
from featdiff.scores.nearest import NearestNeighbors
from featdiff.verdicts.explanation import Contribution, Explanation, Neighbor
from featdiff.verdicts.results import Row


def files_of(folder: Path, count: int, step: int = 1) -> list[str]:
    return [str(file) for file in sorted(folder.iterdir())[: count * step : step]]


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """Arguments of a detector that is fitted in a moment, on a network of one's own."""
    return {**MODULE, "recipe": {"epochs": 1, "min_steps": 1, "batch_size": 16}}


@pytest.fixture(scope="module")
def photos(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 images that a test may change a copy of."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    folder.mkdir()
    for file in files_of(sample_folders["train"], 40):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def fitted(small: dict[str, Any], photos: Path) -> Detector:
    """A detector of its own network on ``photos``; do not change it."""
    return Detector(tiny_net(), **small).fit(str(photos))


# ---- the score and its parts ----


@pytest.mark.parametrize("head", ["fused", "layerwise"])
def test_contributions_add_up_to_the_score(
    small: dict[str, Any], photos: Path, sample_folders: dict[str, Path], head: str
) -> None:
    detector = Detector(tiny_net(), **{**small, "head": head}).fit(str(photos))
    images = [*files_of(sample_folders["digits"], 5), *files_of(sample_folders["test"], 5)]
    scores = detector.score(images)
    for row, found in zip(scores, detector.iter_explanations(images), strict=True):
        assert sum(part.amount for part in found.heads) == pytest.approx(row.ood_score, abs=1e-4)
        assert found.heads == tuple(sorted(found.heads, key=lambda part: -part.amount))
        by_name = {part.name: part for part in found.heads}
        for name, score in row.layers.items():
            assert by_name[f"layer_{name}"].score == pytest.approx(score, abs=1e-4)
        assert len(found.heads) == len(row.layers) + (head == "fused")
        assert (found.ood_score, found.p_value, found.is_ood) == pytest.approx(
            (row.ood_score, row.p_value, row.is_ood), abs=1e-5
        )
        assert found.threshold == detector.calibration_.threshold(detector.fpr)
        assert found.is_ood == (found.ood_score > found.threshold)


def test_a_score_that_is_no_sum_has_no_contributions(small: dict[str, Any], photos: Path) -> None:
    detector = Detector(tiny_net(), **{**small, "head": "mse"}).fit(str(photos))
    found = detector.explain(files_of(photos, 1)[0])
    assert found.heads == ()
    assert found.nearest == ()
    assert list(found.layers) == ["stem", "body"]
    assert found.reasons


# ---- the nearest normal images ----


def test_the_nearest_images_are_those_of_the_bank(fitted: Detector, sample_folders: dict[str, Path]) -> None:
    (file,) = files_of(sample_folders["digits"], 1)
    search = next(score for score in fitted.heads_.members if isinstance(score, NearestNeighbors))
    _, table = fitted.features(file)
    bank = search.vectors.double() * search.scales.double()
    distances = (search.view(table[:]).double() - bank).square().sum(1).sqrt().numpy()
    order = np.argsort(distances, kind="stable")[:3]

    found = fitted.explain(file, nearest=3)
    assert [other.distance for other in found.nearest] == pytest.approx(distances[order].tolist(), rel=1e-4)
    assert [other.path for other in found.nearest] == [fitted.bank_images_.paths[i] for i in order]
    contents = {digest.tobytes(): i for i, digest in enumerate(fitted.bank_digests_)}
    for other in found.nearest:  # the name and the picture belong to that row of the bank
        assert fitted.bank_images_.paths.index(other.path) in contents.values()
        assert other.thumbnail is not None
        np.testing.assert_array_equal(np.asarray(other.thumbnail), np.asarray(Image.open(other.path).convert("RGB")))


def test_explanations_do_not_depend_on_the_batch(fitted: Detector, sample_folders: dict[str, Path]) -> None:
    images = files_of(sample_folders["digits"], 7)
    together = list(fitted.iter_explanations(images))
    for image, found in zip(images, together, strict=True):
        alone = fitted.explain(image)
        assert [other.path for other in alone.nearest] == [other.path for other in found.nearest]
        assert alone.reasons == found.reasons
        assert alone.ood_score == pytest.approx(found.ood_score, abs=1e-4)
        for a, b in zip(alone.heads, found.heads, strict=True):
            assert a.name == b.name and a.amount == pytest.approx(b.amount, abs=1e-4)


def test_a_training_image_finds_itself_and_is_told(fitted: Detector) -> None:
    path = fitted.bank_images_.paths[3]
    found = fitted.explain(path)
    assert found.nearest[0].path == path
    assert found.nearest[0].distance < 0.2 * found.nearest[1].distance
    assert any("among the training images" in reason for reason in found.reasons)


def test_more_neighbours_than_the_bank_holds(fitted: Detector, sample_folders: dict[str, Path]) -> None:
    found = fitted.explain(files_of(sample_folders["digits"], 1)[0], nearest=10_000)
    assert len(found.nearest) == len(fitted.bank_digests_)


def test_without_neighbours_there_are_none(small: dict[str, Any], photos: Path) -> None:
    found = Detector(tiny_net(), **{**small, "neighbors": 0}).fit(str(photos)).explain(files_of(photos, 1)[0])
    assert found.nearest == ()
    assert len(found.heads) == 2
    assert found.reasons


# ---- images ----


def test_the_original_is_small_upright_and_of_any_shape(fitted: Detector, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (1200, 400), "red").save(tmp_path / "turned.jpg", exif=exif)
    found = fitted.explain(str(tmp_path / "turned.jpg"))
    assert found.size == (400, 1200)
    assert found.picture is not None and found.picture.size == (171, 512)


def test_unreadable_images_are_explained_by_their_reason(fitted: Detector, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    good = files_of(photos, 2)
    found = list(fitted.iter_explanations([good[0], str(tmp_path / "torn.png"), str(tmp_path / "gone.png"), good[1]]))
    assert [item.status for item in found] == ["ok", "unreadable", "unreadable", "ok"]
    assert found[2].reason == "no such file or folder"
    assert found[1].reasons == () and found[1].nearest == () and found[1].picture is None
    assert found[3].picture is not None and found[3].size == (32, 32)
    assert found[1].to_json()["is_ood"] is None
    json.dumps(found[1].to_json(), allow_nan=False)


def test_arrays_and_streams_of_images(fitted: Detector, photos: Path) -> None:
    pictures = stack(files_of(photos, 3))
    (found,) = [fitted.explain(pictures[0])]
    assert found.path == "array[0]"
    streamed = list(fitted.iter_explanations(Image.fromarray(picture) for picture in pictures))
    assert [item.ood_score for item in streamed] == pytest.approx(
        [item.ood_score for item in fitted.iter_explanations(list(pictures))], abs=1e-4
    )
    assert all(item.picture is not None for item in streamed)


def test_batches_of_a_loader_have_no_picture(small: dict[str, Any]) -> None:
    pixels = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(pixels), batch_size=8)
    detector = Detector(tiny_net(), **{**small, "keep_thumbnails": True}).fit(loader)
    found = list(detector.iter_explanations(loader))
    assert len(found) == 40
    assert all(item.picture is None and item.status == "ok" for item in found)
    assert found[0].nearest[0].path.startswith("loader[") and found[0].nearest[0].thumbnail is None
    with pytest.raises(UsageError, match="iter_explanations"):
        detector.explain(loader)


def test_one_image_is_not_several(fitted: Detector, photos: Path) -> None:
    with pytest.raises(UsageError, match="explain takes one image, and there are 40: use iter_explanations"):
        fitted.explain(str(photos))
    with pytest.raises(UsageError, match="nearest must be a whole number above 0, not 0"):
        fitted.explain(files_of(photos, 1)[0], nearest=0)
    with pytest.raises(UsageError, match="fpr 0.001 needs"):
        fitted.explain(files_of(photos, 1)[0], fpr=0.001)


# ---- what a model keeps ----


def reloaded(detector: Detector, folder: Path) -> Detector:
    detector.save_pretrained(folder)
    return Detector.from_pretrained(folder, backbone=tiny_net(), transform=MODULE["transform"])


def test_paths_are_kept_and_pictures_are_looked_up(fitted: Detector, photos: Path, tmp_path: Path) -> None:
    loaded = reloaded(fitted, tmp_path / "model")
    assert loaded.bank_images_.paths == fitted.bank_images_.paths
    assert set(loaded.bank_images_.paths) <= {str(file) for file in photos.iterdir()}
    found = loaded.explain(fitted.bank_images_.paths[0])
    assert found.nearest[0].path == fitted.bank_images_.paths[0]
    assert found.nearest[0].thumbnail is not None


def test_a_file_that_holds_something_else_by_now_is_not_shown(
    small: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changing"
    shutil.copytree(photos, folder)
    detector = Detector(tiny_net(), **small).fit(str(folder))
    path = detector.bank_images_.paths[0]
    image = Image.open(path).convert("RGB")
    assert detector.explain(image).nearest[0].thumbnail is not None

    Image.new("RGB", (32, 32), "red").save(path)
    changed = detector.explain(image).nearest[0]
    assert changed.path == path and changed.thumbnail is None
    Path(path).unlink()
    assert detector.explain(image).nearest[0].thumbnail is None


def test_thumbnails_outlive_the_files(small: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moving"
    shutil.copytree(photos, folder)
    detector = Detector(tiny_net(), **{**small, "keep_thumbnails": True}).fit(str(folder))
    image = Image.open(detector.bank_images_.paths[0]).convert("RGB")
    shutil.rmtree(folder)

    nearest = reloaded(detector, tmp_path / "model").explain(image).nearest[0]
    assert nearest.path == detector.bank_images_.paths[0]
    assert nearest.thumbnail is not None and nearest.thumbnail.size == (32, 32)
    difference = np.asarray(nearest.thumbnail, dtype=float) - np.asarray(image, dtype=float)
    assert np.abs(difference).mean() < 12  # JPEG


def test_thumbnails_are_bounded(
    monkeypatch: pytest.MonkeyPatch, small: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    detector = Detector(tiny_net(), **{**small, "keep_thumbnails": True}).fit(str(photos))
    whole = sum(map(len, detector.bank_images_.thumbnails))
    monkeypatch.setattr(bank_images, "MOST_BYTES", whole // 3)
    fewer = Detector(tiny_net(), **{**small, "keep_thumbnails": True}).fit(str(photos)).bank_images_
    assert sum(map(len, fewer.thumbnails)) <= whole // 3
    assert len(fewer.thumbnails) == len(fewer.paths)
    assert fewer.thumbnails[0]


def test_without_paths_images_have_numbers(small: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    detector = Detector(tiny_net(), **{**small, "keep_paths": False}).fit(str(photos))
    loaded = reloaded(detector, tmp_path / "model")
    data = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert b"photos" not in data and b"china" not in data
    assert b"china" not in (tmp_path / "model" / "config.json").read_bytes()

    nearest = loaded.explain(files_of(photos, 1)[0]).nearest
    assert all(other.path.startswith("image ") and other.thumbnail is None for other in nearest)
    assert 1 <= int(nearest[0].path.removeprefix("image ")) <= len(loaded.bank_digests_)


def test_thumbnails_without_paths_are_refused() -> None:
    with pytest.raises(UsageError, match="keep_thumbnails"):
        Detector(keep_paths=False, keep_thumbnails=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("bank_paths"),
        lambda t: t.update(bank_paths=t["bank_paths"][:-5]),
        lambda t: t.update(bank_paths=t["bank_paths"].float()),
        lambda t: t.update(bank_paths=torch.tensor(list(b'["a.png"]'), dtype=torch.uint8)),  # not compressed
        lambda t: t.update(bank_paths=torch.tensor(list(zlib.compress(b'["a.png"]')), dtype=torch.uint8)),
        lambda t: t.update(bank_paths=torch.tensor(list(zlib.compress(b"[1]")), dtype=torch.uint8)),
        lambda t: t.update(bank_thumbnails=t["bank_thumbnails"][1:]),
        lambda t: t.pop("bank_thumbnails"),
        lambda t: t.pop("bank_thumbnail_ends"),
        lambda t: t.update(bank_thumbnail_ends=t["bank_thumbnail_ends"].flip(0)),
        lambda t: t.update(bank_thumbnail_ends=t["bank_thumbnail_ends"][1:]),
        lambda t: t.update(bank_thumbnail_ends=-t["bank_thumbnail_ends"]),
    ],
)
def test_damaged_paths_and_thumbnails_are_refused(
    small: dict[str, Any], photos: Path, tmp_path: Path, change: Any
) -> None:
    detector = Detector(tiny_net(), **{**small, "keep_thumbnails": True}).fit(str(photos))
    tensors = detector.tensors()
    change(tensors)
    from featdiff.files.model_folder import save

    save(tmp_path / "model", detector.config(), tensors)
    with pytest.raises(ModelError, match="of its bank are not those it was saved with"):
        Detector.from_pretrained(tmp_path / "model", backbone=tiny_net(), transform=MODULE["transform"])


def test_damaged_jpegs_are_not_shown(small: dict[str, Any], photos: Path) -> None:
    detector = Detector(tiny_net(), **{**small, "keep_thumbnails": True}).fit(str(photos))
    kept = detector.bank_images_
    image = Image.open(kept.paths[0]).convert("RGB")
    gone = tuple(f"gone/{path}" for path in kept.paths)
    detector.bank_images_ = replace(kept, paths=gone, thumbnails=tuple(data[:20] for data in kept.thumbnails))
    assert detector.explain(image).nearest[0].thumbnail is None


# ---- words ----

ROW = Row("a.png", "ok", "", 5.0, 0.01, True, {"early": 1.0, "late": 6.0})


def parts(**scores: float) -> list[Contribution]:
    labels = {"texture": "fine texture and colour", "content": "overall content", "like": "distance from normal images"}
    return [Contribution(name, labels[name], score, score) for name, score in scores.items()]


def test_layers_are_named_by_their_depth() -> None:
    words = layer_labels(["stem", "s1", "s2", "s3", "s4"])
    assert list(words.values()) == [
        *["fine texture and colour"] * 2,
        *["shapes and parts"] * 2,
        "overall content",
    ]
    assert layer_labels(["only"]) == {"only": "overall content"}


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (parts(texture=6.0), "Fine texture and colour are very unusual."),
        (parts(content=2.5), "Overall content is unusual."),
        (parts(like=3.0), "It is unlike every normal image that the model knows; the nearest is n.png."),
        (parts(content=1.5, texture=1.0), "No single thing stands out; most unusual is the overall content."),
    ],
)
def test_sentences_say_what_is_unusual(heads: list[Contribution], expected: str) -> None:
    found = sentences(ROW, heads, [Neighbor("photos/n.png", 1.0)], False, None, 0.0)
    assert found == ("Flagged: at most 1 % of normal images look as strange as this one.", expected)


def test_sentences_of_an_ordinary_image() -> None:
    row = replace(ROW, is_ood=False, p_value=0.43)
    assert sentences(row, parts(texture=0.3), [], False, None, 0.0) == (
        "Not flagged: about 43 % of normal images look at least as strange as this one.",
        "Nothing about it stands out.",
    )


@pytest.mark.parametrize(
    ("whole", "expected"),
    [
        (0.4, "As a whole, the picture looks ordinary."),
        (0.06, "As a whole, it is a little unusual too; both together are rare."),
    ],
)
def test_sentences_of_an_image_with_strange_places(whole: float, expected: str) -> None:
    row = replace(ROW, p_values={"global": whole, "local": 0.02})
    found = sentences(row, parts(texture=0.3), [], False, None, 0.0)
    assert found[1:] == ("Places in the picture are stranger than the picture as a whole.", expected)


def test_sentences_say_where() -> None:
    heat = np.zeros((100, 100), dtype=np.float32)
    heat[10:20, 80:90] = 3.0
    heat[:, :25] = np.nan
    found = sentences(ROW, [], [], False, heat, 1.0)
    assert "Places that cover 1.3 % of the picture are stranger than normal, most of all in the upper right." in found
    assert "The network did not see 25 % of the picture." in found
    assert "No place in the picture is strange by itself." in sentences(ROW, [], [], False, heat, 3.0)
    most = "The picture is stranger than normal nearly everywhere, most of all in the upper right."
    assert most in sentences(ROW, [], [], False, heat, -1.0)
    everywhere = sentences(ROW, [], [], False, np.full_like(heat, 2.0), 1.0)
    assert "The picture is stranger than normal nearly everywhere." in everywhere
    assert not any("most of all" in sentence for sentence in everywhere)


# ---- the heat map of an explanation ----


#: EXIF orientation -> how an upright picture is stored.
TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


class RedExtractor(FeatureExtractor):
    """An extractor for which a place is as strange as it is red."""

    def with_heat(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        rows, _ = super().with_heat(pixels)
        red = pixels[:, 0] - pixels[:, 1:].mean(1)
        return rows, torch.nn.functional.avg_pool2d(red, 8)


class SeesRed(Detector):
    """A detector with maps of how red a place is, so that a test knows where they are hot."""

    def fit(self, images: object, *further: Any) -> SeesRed:
        super().fit(images, *further)
        self.extractor_.__class__ = RedExtractor
        return self

    def heat_scale(self, fpr: float) -> tuple[float, float]:
        return 0.5, 4.0


@pytest.fixture(scope="module")
def sees_red(tiny_arguments: dict[str, Any], photos: Path) -> dict[str, SeesRed]:
    """Detectors of a named backbone with the view of the whole picture, and with a crop."""
    arguments = {**tiny_arguments, "recipe": {"epochs": 1, "min_steps": 1}, "fpr": 0.2}
    return {view: SeesRed(**arguments, view=view).fit(str(photos)) for view in ("whole", "squash", "crop")}


@pytest.mark.parametrize("view", ["whole", "squash", "crop"])
@pytest.mark.parametrize(
    ("size", "centre"), [((300, 900), (0.3, 0.45)), ((900, 300), (0.55, 0.7)), ((64, 64), (0.4, 0.4))]
)
def test_a_red_square_is_hot_where_it_is(
    sees_red: dict[str, SeesRed], view: str, size: tuple[int, int], centre: tuple[float, float]
) -> None:
    picture = Image.new("RGB", size, (90, 90, 90))
    half = min(size) // 8
    x, y = int(centre[0] * size[0]), int(centre[1] * size[1])
    picture.paste((255, 0, 0), (x - half, y - half, x + half, y + half))
    other = Image.new("RGB", size, (90, 90, 90))

    found, plain = sees_red[view].iter_explanations([picture, other])
    assert found.picture is not None and found.heat is not None
    assert found.heat.shape == found.picture.size[::-1]
    hot = found.heat > 0.5
    assert hot.any() and not (plain.heat > 0.5).any()
    rows, columns = np.nonzero(hot)
    scale = found.picture.width / size[0]
    assert abs(columns.mean() / scale - x) < 0.06 * max(size)
    assert abs(rows.mean() / scale - y) < 0.06 * max(size)
    assert "stranger than normal" in " ".join(found.reasons)
    assert "No place in the picture is strange by itself." in plain.reasons
    assert (found.heat_threshold, found.heat_top) == (0.5, 4.0)

    unseen = np.isnan(found.heat)
    assert unseen.any() == (view == "crop")
    assert ("did not see" in " ".join(found.reasons)) == (view == "crop")
    alone = sees_red[view].explain(picture)
    np.testing.assert_array_equal(alone.heat, found.heat)


@pytest.mark.parametrize("view", ["whole", "squash", "crop"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_red_square_of_a_large_jpeg_is_hot_where_it_is(
    sees_red: dict[str, SeesRed], tmp_path: Path, view: str, orientation: int
) -> None:
    """Decoded at a quarter, but for crops; the score is that of scoring."""
    picture = Image.new("RGB", (2402, 2101), (90, 90, 90))
    picture.paste((255, 0, 0), (1300, 600, 1700, 1000))
    stored = picture.transpose(TURNS[orientation]) if orientation in TURNS else picture
    tags = Image.Exif()
    tags[0x0112] = orientation
    stored.save(tmp_path / "large.jpg", exif=tags)

    found = sees_red[view].explain(str(tmp_path / "large.jpg"))
    assert found.size == (2402, 2101)
    assert found.picture is not None and found.heat is not None and found.picture.size == (512, 448)
    rows, columns = np.nonzero(found.heat > 0.5)
    assert abs(columns.mean() * 2402 / 512 - 1500) < 50
    assert abs(rows.mean() * 2101 / 448 - 800) < 50
    red = np.nonzero(np.asarray(found.picture)[..., 1] < 45)
    assert abs(red[1].mean() * 2402 / 512 - 1500) < 6
    assert abs(red[0].mean() * 2101 / 448 - 800) < 6
    scores = sees_red[view].score(str(tmp_path / "large.jpg"))
    assert found.ood_score == pytest.approx(float(scores.ood_score[0]), abs=1e-5)


def test_a_detector_may_have_no_map(fitted: Detector, photos: Path) -> None:
    assert fitted.local_ is None
    found = fitted.explain(files_of(photos, 1)[0])
    assert (found.heat, found.heat_threshold, found.heat_top) == (None, None, None)
    assert found.to_json()["heat"] is None


def test_a_transform_of_ones_own_is_undone_or_there_is_no_map(small: dict[str, Any], photos: Path) -> None:
    def middle(picture: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(picture.resize((64, 32)))).permute(2, 0, 1).float() / 255
        return pixels[:, :, 16:48]

    def mirrored(picture: Image.Image) -> torch.Tensor:
        return middle(picture).flip(2)

    picture = Image.new("RGB", (400, 200), (90, 90, 90))
    picture.paste((255, 0, 0), (200, 50, 250, 100))
    found = SeesRed(tiny_net(), **{**small, "transform": middle}).fit(str(photos)).explain(picture)
    assert found.heat is not None
    unseen = np.isnan(found.heat)
    assert unseen[:, :99].all() and unseen[:, 301:].all()
    assert not unseen[:, 102:298].any()
    assert found.hottest == (pytest.approx(225, abs=30), pytest.approx(75, abs=30))
    assert SeesRed(tiny_net(), **{**small, "transform": mirrored}).fit(str(photos)).explain(picture).heat is None


def explanation(**changes: Any) -> Explanation:
    values = {"path": "a.png", "status": "ok", "reason": "", "ood_score": 1.0, "p_value": 0.5, "is_ood": False}
    return Explanation(**{**values, "fpr": 0.05, "threshold": 2.0, **changes})


def test_heat_must_fit_the_picture_and_have_a_scale() -> None:
    picture = Image.new("RGB", (6, 4))
    heat = np.zeros((4, 6), dtype=np.float32)
    heat[3, 1] = 2.0
    heat[0, 0] = np.nan
    found = explanation(picture=picture, size=(60, 40), heat=heat, heat_threshold=1.0, heat_top=3.0)
    assert found.hottest == (15, 35)
    assert found.to_json()["heat"] == {
        "threshold": 1.0,
        "top": 3.0,
        "max": 2.0,
        "hottest": [15, 35],
        "share_above": pytest.approx(1 / 23, rel=1e-6),
        "share_seen": pytest.approx(23 / 24, rel=1e-6),
    }
    for changes in ({"heat": heat.T}, {"picture": None}, {"heat_threshold": None}, {"heat_top": None}):
        with pytest.raises(UsageError, match="heat map"):
            replace(found, **changes)
