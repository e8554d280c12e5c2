"""Images -> features in a store: each content once, resumed after any stop, with a reason for what cannot be read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_stores import WIDTH, everything, one_line, remount
from torch import Tensor, nn

from featdiff.data.batches import Batch, LoadedImage, Stack, iter_batches, iter_loaded
from featdiff.data.references import ImageRef, list_images
from featdiff.exceptions import DamagedCache, FeatdiffError
from featdiff.features.backbones import load_backbone
from featdiff.features.extraction import Extraction, FeatureBatch, extract, featurise
from featdiff.features.extractor import FeatureExtractor
from featdiff.features.store import FeatureStore
from featdiff.verdicts.calibration import Calibration
from featdiff.verdicts.judge import judge

# ---------------------------------------- from images


@pytest.fixture(scope="module")
def extractor(seeded_backbone: Path) -> FeatureExtractor:
    found = load_backbone("test_resnet", weights=seeded_backbone, transform={"input_size": (3, 32, 32)})
    return FeatureExtractor(found, "layer1,layer4")


def batches(
    folder: Path, extractor: FeatureExtractor, store: FeatureStore | tuple[()] = (), size: int = 2
) -> Iterator[Batch]:
    """As the detector makes them: what the store knows is not decoded."""
    loaded = iter_loaded(list_images(folder), extractor.transform, workers=1, known=store)
    return iter_batches(loaded, size)


def run(folder: Path, extractor: FeatureExtractor, cache: Path) -> tuple[Extraction, FeatureStore]:
    store = FeatureStore(cache, extractor.width)
    return extract(batches(folder, extractor, store), extractor, store), store


def names(found: Extraction) -> list[str]:
    return [Path(path).name for path in found.paths]


def test_extraction_equals_the_extractor_image_by_image(
    few_images: Path, extractor: FeatureExtractor, tmp_path: Path
) -> None:
    found, store = run(few_images, extractor, tmp_path / "cache")
    assert names(found) == [f"{name}.png" for name in "abcdef"]
    assert found.computed == len(store) == 6 and found.unreadable == []
    expected = torch.cat(
        [extractor(extractor.transform(Image.open(few_images / f"{name}.png"))[None]) for name in "abcdef"]
    )
    torch.testing.assert_close(torch.from_numpy(everything(store.table(found.digests))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
def test_batches_that_are_begun_ahead(few_images: Path, extractor: FeatureExtractor, ahead: int) -> None:
    """The same results, each looked at when so many further ones were begun; what ends the batches comes after them."""
    begun: list[int] = []

    class Counting:
        device = torch.device("cpu")

        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            begun.append(len(pixels))
            return extractor(pixels)

    def then_fails() -> Iterator[Batch]:
        yield from batches(few_images, extractor)
        raise KeyboardInterrupt

    expected = [found.features for _, found in featurise(batches(few_images, extractor), extractor)]
    given, counts = [], []
    with pytest.raises(KeyboardInterrupt):
        for batch, found in featurise(then_fails(), Counting(), ahead):  # type: ignore[arg-type]
            assert found.paths == [item.ref.path for item in batch.loaded]
            given.append(found.features)
            counts.append(len(begun))
    assert counts == [min(3, number + ahead) for number in (1, 2, 3)]
    for ours, theirs in zip(given, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_second_run_computes_nothing(few_images: Path, extractor: FeatureExtractor, tmp_path: Path) -> None:
    first, before = run(few_images, extractor, tmp_path / "cache")
    second, after = run(few_images, extractor, tmp_path / "cache")
    assert (first.computed, second.computed) == (6, 0)
    assert (first.paths, first.digests) == (second.paths, second.digests)
    np.testing.assert_array_equal(everything(before.table(first.digests)), everything(after.table(second.digests)))


def test_features_are_found_by_content_not_by_name(
    few_images: Path, extractor: FeatureExtractor, tmp_path: Path
) -> None:
    run(few_images, extractor, tmp_path / "cache")
    (few_images / "a.png").rename(few_images / "z.png")
    shutil.copy(few_images / "b.png", few_images / "y.png")
    Image.new("RGB", (30, 20), "red").save(few_images / "c.png")
    found, store = run(few_images, extractor, tmp_path / "cache")
    assert names(found) == ["b.png", "c.png", "d.png", "e.png", "f.png", "y.png", "z.png"]
    assert found.computed == 1 and len(store) == 7
    table = everything(store.table(found.digests))
    np.testing.assert_array_equal(table[0], table[5])  # b and its copy y


def test_copies_in_one_run_are_kept_once(few_images: Path, extractor: FeatureExtractor, tmp_path: Path) -> None:
    for name in "ghi":
        shutil.copy(few_images / "a.png", few_images / f"{name}.png")
    found, store = run(few_images, extractor, tmp_path / "cache")
    assert len(found.paths) == 9 and len(store) == 6
    table = everything(store.table(found.digests))
    assert all(np.array_equal(table[0], table[row]) for row in (6, 7, 8))


def test_unreadable_images_become_rows_with_a_reason(
    few_images: Path, extractor: FeatureExtractor, tmp_path: Path
) -> None:
    (few_images / "b.png").write_bytes(b"")
    (few_images / "d.png").write_bytes((few_images / "d.png").read_bytes()[:100])
    for _ in range(2):  # a reason is given again when the good ones come from the store
        found, store = run(few_images, extractor, tmp_path / "cache")
        assert names(found) == ["a.png", "c.png", "e.png", "f.png"] and len(found.digests) == 4
        assert [Path(path).name for path, _ in found.unreadable] == ["b.png", "d.png"]
        assert "empty" in found.unreadable[0][1] and "damaged" in found.unreadable[1][1]
    assert found.computed == 0 and len(store) == 4


def test_all_images_unreadable(extractor: FeatureExtractor, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in "ab":
        (tmp_path / "images" / f"{name}.png").write_bytes(b"")
    found, store = run(tmp_path / "images", extractor, tmp_path / "cache")
    assert (found.paths, found.digests, found.computed, len(found.unreadable), len(store)) == (
        [],
        [],
        0,
        2,
        0,
    )


class Root(nn.Module):
    """Gives NaN where a picture is darker than its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(0.25))
        self.root = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.root((x - self.bias).sqrt())


def test_nan_features_make_unreadable_rows(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, grey in (("a", 255), ("b", 0), ("c", 255 // 2), ("d", 10)):
        Image.new("RGB", (4, 4), (grey,) * 3).save(folder / f"{name}.png")

    def transform(picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)

    extractor = FeatureExtractor(Root(), ["root"], transform=transform)
    for computed in (2, 0):
        found, store = run(folder, extractor, tmp_path / "cache")
        assert names(found) == ["a.png", "c.png"] and found.computed == computed
        assert [Path(path).name for path, _ in found.unreadable] == ["b.png", "d.png"]
        assert all("NaN or infinite features" in reason for _, reason in found.unreadable)
        np.testing.assert_allclose(
            everything(store.table(found.digests))[:, 0], np.sqrt([0.75, 127 / 255 - 0.25]), rtol=1e-5
        )


def test_featurise_answers_by_position(few_images: Path, extractor: FeatureExtractor) -> None:
    (few_images / "b.png").write_bytes(b"")
    (batch,) = batches(few_images, extractor, size=10)
    ((_, featurised),) = featurise([batch], extractor)
    assert featurised.positions == [0, 2, 3, 4, 5] and list(featurised.failed) == [1]
    assert len(featurised) == 6 and featurised.paths == [item.ref.path for item in batch.loaded]
    assert featurised.features.shape == (5, extractor.width)
    alone = extractor(extractor.transform(Image.open(few_images / "c.png"))[None]).numpy()[0]
    np.testing.assert_allclose(featurised.features[1], alone, rtol=1e-4, atol=1e-5)


def test_rows_of_mixed_shapes_are_in_order(seeded_backbone: Path, tmp_path: Path) -> None:
    """One is unreadable, and one gives NaN."""
    mixed = FeatureExtractor(load_backbone("test_resnet", weights=seeded_backbone, size=96), "layer1,layer4")
    sizes = [(96, 96), (40, 120), (120, 40), (96, 96), (40, 120), (30, 30), (70, 35)]
    for i, size in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"")
    (batch,) = batches(tmp_path, mixed, size=4)
    assert [stack.positions for stack in batch.stacks] == [[0, 5], [1, 4], [2], [6]]

    batch.stacks[1].pixels[0] = torch.nan
    ((_, featurised),) = featurise([batch], mixed)
    assert featurised.positions == [0, 2, 4, 5, 6]
    assert sorted(featurised.failed) == [1, 3] and "NaN" in featurised.failed[1]
    for row, i in zip(featurised.features, featurised.positions, strict=True):
        alone = mixed(mixed.transform(Image.open(tmp_path / f"{i}.png").convert("RGB"))[None])[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_progress_counts_images(few_images: Path, extractor: FeatureExtractor, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    for total in (6, 0):  # known, unknown
        store = FeatureStore(tmp_path / str(total), extractor.width)
        extract(
            batches(few_images, extractor, store, size=4),
            extractor,
            store,
            total,
            lambda *step: seen.append(step),
        )
    assert seen == [("features", 4, 6), ("features", 6, 6), ("features", 4, 4), ("features", 6, 6)]


# ---------------------------------------- interruption


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_interrupted_run_keeps_what_it_computed(
    error: type[BaseException], few_images: Path, extractor: FeatureExtractor, tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path / "cache", extractor.width)

    def stopped() -> Iterator[Batch]:
        for count, batch in enumerate(batches(few_images, extractor, store)):
            if count == 2:
                raise error
            yield batch

    with pytest.raises(error):
        extract(stopped(), extractor, store)
    assert len(FeatureStore(tmp_path / "cache", extractor.width)) == 4
    found, store = run(few_images, extractor, tmp_path / "cache")
    assert found.computed == 2 and len(store) == 6
    fresh, other = run(few_images, extractor, tmp_path / "fresh")
    np.testing.assert_allclose(
        everything(store.table(found.digests)), everything(other.table(fresh.digests)), rtol=1e-4, atol=1e-5
    )


def test_interrupt_from_the_progress_bar_keeps_the_batch(
    few_images: Path, extractor: FeatureExtractor, tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path, extractor.width)

    def stop(*step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(batches(few_images, extractor, store), extractor, store, progress=stop)
    assert len(FeatureStore(tmp_path, extractor.width)) == 2


def test_damaged_cache_is_mended_by_the_next_run(few_images: Path, extractor: FeatureExtractor, tmp_path: Path) -> None:
    first, store = run(few_images, extractor, tmp_path)
    before = everything(store.table(first.digests))
    for file in tmp_path.glob("*.npy"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(DamagedCache):
        found, store = run(few_images, extractor, tmp_path)
    assert found.computed == 6
    np.testing.assert_allclose(everything(store.table(found.digests)), before, rtol=1e-4, atol=1e-5)
    assert run(few_images, extractor, tmp_path)[0].computed == 0


# ---------------------------------------- disks that do not take it


def test_extraction_on_a_full_disk(few_images: Path, extractor: FeatureExtractor, small_disk: Path) -> None:
    found, _ = run(few_images, extractor, small_disk / "features")
    Image.new("RGB", (30, 20), "red").save(few_images / "g.png")
    with (
        (small_disk / "other").open("wb", buffering=0) as stream,
        pytest.raises(OSError, match="No space left"),
    ):
        while True:
            stream.write(bytes(4096))
    with pytest.raises(FeatdiffError) as error:
        run(few_images, extractor, small_disk / "features")
    assert "No space left" in one_line(error)
    (few_images / "g.png").unlink()
    again, _ = run(few_images, extractor, small_disk / "features")
    assert (again.computed, again.digests) == (0, found.digests)
    (small_disk / "other").unlink()


def test_read_only_cache_can_be_used_but_not_added_to(
    few_images: Path, extractor: FeatureExtractor, small_disk: Path
) -> None:
    run(few_images, extractor, small_disk / "features")
    remount(small_disk, "ro")
    found, store = run(few_images, extractor, small_disk / "features")
    assert found.computed == 0 and len(store.table(found.digests)) == 6
    Image.new("RGB", (30, 20), "red").save(few_images / "g.png")
    with pytest.raises(FeatdiffError) as error:
        run(few_images, extractor, small_disk / "features")
    text = one_line(error)
    assert "Read-only" in text and str(small_disk) in text and "another cache" in text
    with pytest.raises(FeatdiffError, match="Read-only"):
        FeatureStore(small_disk / "new", WIDTH)


def test_a_note_on_an_image_reaches_its_row_which_stays_ok(extractor: FeatureExtractor) -> None:
    good = LoadedImage(ImageRef("a.tif"), b"a", note="page 1 of 3 was read")
    bad = LoadedImage(ImageRef("b.tif"), b"b", reason="empty file (0 bytes)")
    batch = Batch([bad, good], [Stack(torch.rand(1, 3, 32, 32), [1])])
    features = FeatureBatch.concatenate([found for _, found in featurise([batch] * 2, extractor)])
    assert features.notes == {1: "page 1 of 3 was read", 3: "page 1 of 3 was read"}

    calibration = Calibration(np.linspace(0, 1, 40))
    scores = judge(
        features.paths, features.positions, features.failed, np.zeros(2), {}, calibration, 0.1, features.notes
    )
    assert scores.status == ["unreadable", "ok"] * 2
    assert scores.reason == ["empty file (0 bytes)", "page 1 of 3 was read"] * 2
