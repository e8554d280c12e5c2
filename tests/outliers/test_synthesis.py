"""Synthetic outliers: where they start, how far they lie, what stays of a row, files, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from featdiff import Detector, FeatureDiffusion, PixelDetector
from featdiff.exceptions import ModelError, NotFittedError, UsageError
from featdiff.features.layout import FeatureLayout, Kind
from featdiff.outliers import synthesis
from featdiff.outliers.boundary import (
    BoundaryNoise,
    boundary_points,
    default_k,
    draw_outliers,
    leave_one_out_distances,
)
from featdiff.outliers.denoised import DenoisedDirections
from featdiff.outliers.outlier_file import DIGEST, Outliers, digest_of, load_outliers
from featdiff.outliers.space import Space
from featdiff.outliers.synthesis import Synthesis, self_check, synthesise
from featdiff.verdicts.calibration import Calibration

LAYOUT = FeatureLayout.of({("a", Kind.MEAN): 5, ("b", Kind.MEAN): 7, ("b", Kind.SPATIAL_STD): 4})


def made_up(n: int, seed: int = 0) -> Tensor:
    """Rows whose last block is never negative."""
    rows = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)) + 1
    rows[:, 12:] = rows[:, 12:].abs()
    return rows


@pytest.fixture(scope="module")
def classes(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training tiles in a folder for each of the two photographs."""
    folder = tmp_path_factory.mktemp("classes")
    for file in sample_folders["train"].iterdir():
        place = folder / file.name.split("_")[0]
        place.mkdir(exist_ok=True)
        shutil.copy(file, place)
    return folder


@pytest.fixture(scope="module", params=["diffusion", "boundary"])
def found(request: pytest.FixtureRequest, tiny_detector: Detector, classes: Path) -> Synthesis:
    """101 outliers of each method."""
    return synthesise(tiny_detector, classes, 101, request.param, k=20)


@pytest.fixture(scope="module")
def rows(tiny_detector: Detector, classes: Path) -> Tensor:
    """Rows of one class."""
    table = tiny_detector.features(classes / "china")[1]
    return table[np.arange(len(table))]


# ---- the space ----


def test_joined_blocks_count_alike_and_have_length_1() -> None:
    rows = made_up(20)
    joined = Space(LAYOUT, rows).join(rows)
    for part in (part.columns for part in LAYOUT.parts):
        assert torch.allclose(joined[:, part].square().sum(1), torch.full((20,), 1 / 3), atol=1e-6)
        assert torch.allclose(
            joined[:, part] * 3**0.5 * rows[:, part].norm(dim=1, keepdim=True), rows[:, part], atol=1e-5
        )
    assert torch.allclose(Space(LAYOUT, rows).restore(joined, rows), rows, atol=1e-5)


def test_what_is_never_negative_stays_so() -> None:
    rows = made_up(20)
    back = Space(LAYOUT, rows).restore(-rows + 1.5, rows)
    assert (back[:, 12:] >= 0).all() and (back[:, 12:] == 0).any()
    assert (back[:, :5] < 0).any()
    for part in (part.columns for part in LAYOUT.parts):
        assert torch.allclose(back[:, part].norm(dim=1), rows[:, part].norm(dim=1), rtol=1e-5)


def test_rows_that_do_not_fit_are_refused() -> None:
    rows = made_up(5)
    space = Space(LAYOUT, rows)
    with pytest.raises(UsageError, match=r"shape \(N, 16\), not \(5, 15\)"):
        space.join(rows[:, :15])
    rows[3, 2] = torch.nan
    with pytest.raises(UsageError, match="NaN or infinite values, first in row 3"):
        space.join(rows)


# ---- the boundary ----


def test_boundary_rows_are_those_of_a_brute_force_search() -> None:
    rows = made_up(60)
    joined = Space(LAYOUT, rows).join(rows)
    labels = np.arange(60) % 2
    points = boundary_points(joined, labels, 7, 6)
    for label in (0, 1):
        mine = np.flatnonzero(labels == label)
        far = {}
        for i in mine:
            others = [float((joined[i] - joined[j]).norm()) for j in mine if j != i]
            far[int(i)] = sorted(others)[6]
        assert np.allclose(leave_one_out_distances(joined[torch.from_numpy(mine)], 7), list(far.values()), atol=1e-5)
        chosen = [far[int(i)] for i in points[6 * label : 6 * label + 6]]  # two rows may be each other's neighbours
        assert np.allclose(chosen, sorted(far.values(), reverse=True)[:6], atol=1e-5)


def test_a_tenth_of_a_class_is_boundary_by_default() -> None:
    joined = torch.nn.functional.normalize(made_up(46), dim=1)
    labels = np.array([0] * 41 + [1] * 5)
    points = boundary_points(joined, labels, 3)
    assert [int((labels[points] == label).sum()) for label in (0, 1)] == [5, 1]
    assert len(boundary_points(joined, labels, 3, 1000)) == 46


@pytest.mark.parametrize(("smallest", "k"), [(3, 1), (5, 3), (500, 300), (5000, 300)])
def test_the_published_k_is_a_share_of_the_class(smallest: int, k: int) -> None:
    assert default_k(smallest) == k


# ---- noise around boundary rows ----


@pytest.mark.parametrize("sigma", [None, 0.1])
def test_noise_is_measured_as_if_each_candidate_were_built(sigma: float | None) -> None:
    """By the products of the parts; here every candidate is built and compared with every row."""
    rows, k = made_up(40).abs() * torch.where(torch.arange(16) < 12, -1, 1), 5
    space = Space(
        FeatureLayout.of_stages({"a": 16}), torch.cat([rows, -rows])
    )  # one block, in which nothing is cut off
    points = torch.tensor([3, 17, 21])
    found = BoundaryNoise(space, rows, points, k, sigma, candidates=9, keep=2)(5)
    noise = torch.randn(9, 16, generator=torch.Generator().manual_seed(5))
    unit = rows / rows.norm(dim=1, keepdim=True)
    for i, point in enumerate(points):
        distances = (unit - unit[point]).norm(dim=1).sort().values
        length = distances[k] / 16**0.5 if sigma is None else sigma
        built = torch.nn.functional.normalize(unit[point] + length * noise, dim=1)
        far = torch.stack([(unit - candidate).norm(dim=1).sort().values[k - 1] for candidate in built])
        expected = built[far.argsort(descending=True)[:2]] * rows[point].norm()
        assert torch.allclose(found[i], expected, atol=1e-4)


def test_noise_is_as_long_as_the_way_to_a_neighbour(rows: Tensor, tiny_detector: Detector) -> None:
    """The default deviation: the angle to the outlier is what adding a vector of that length at a right angle gives."""
    part = rows[:, tiny_detector.extractor_.layout.last_stage.columns]
    part = part - part.mean(0)  # of either sign, so that nothing is cut off
    space = Space(FeatureLayout.of_stages({"layer4": part.shape[1]}), part)
    joined = space.join(part)
    points = torch.arange(10)
    outliers = BoundaryNoise(space, part, points, 9, candidates=64, keep=64)(0)
    length = leave_one_out_distances(joined, 9)[points]
    cosine = torch.nn.functional.cosine_similarity(outliers, part[points][:, None], dim=2).mean(1)
    assert torch.allclose(cosine, 1 / (1 + length.square()).sqrt(), atol=0.03)


@pytest.mark.parametrize("kind", [BoundaryNoise, DenoisedDirections])
def test_outliers_of_a_row_do_not_depend_on_the_other_rows(
    kind: Any, rows: Tensor, tiny_detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Space(tiny_detector.extractor_.layout, rows)
    make: Callable[..., Any] = (
        BoundaryNoise if kind is BoundaryNoise else lambda *a: DenoisedDirections(tiny_detector.heads_, *a)
    )
    together = make(space, rows, torch.tensor([4, 9, 30]), 8)(3)
    alone = make(space, rows, torch.tensor([30]), 8)(3)
    assert torch.allclose(together[2], alone[0], atol=1e-4)
    monkeypatch.setattr("featdiff.outliers.boundary._BLOCK", 1)
    assert torch.allclose(make(space, rows, torch.tensor([4, 9, 30]), 8)(3), together, atol=1e-4)


def test_rounds_go_on_with_fresh_noise_until_there_are_enough() -> None:
    seeds = []

    def rounds(seed: int) -> Tensor:
        seeds.append(seed)
        return torch.arange(6.0).reshape(3, 2, 1) + 100 * len(seeds)

    vectors, starts = draw_outliers(rounds, 8, np.random.SeedSequence(0))
    assert vectors.flatten().tolist() == [100, 102, 104, 101, 103, 105, 200, 202]
    assert starts.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(set(seeds)) == 2


# ---- rows pushed away from what explains them ----


def test_a_push_is_the_strength_times_what_is_not_explained(rows: Tensor, tiny_detector: Detector) -> None:
    """In the layers: measured along x - x_hat, the step is as long as asked for; a tiny one gives the row itself."""
    heads, space = tiny_detector.heads_, Space(tiny_detector.extractor_.layout, torch.cat([rows, -rows]))
    points = torch.arange(6)
    tiny, small, large = (
        DenoisedDirections(heads, space, rows, points, 8, s).candidates(1) for s in (1e-6, 0.01, 0.02)
    )
    assert torch.allclose(tiny, rows[points][:, None].expand_as(tiny), atol=1e-3)
    step, twice = (small - tiny).flatten(0, 1), (large - tiny).flatten(0, 1)
    assert (step.norm(dim=1) > 1e-3).all()
    assert torch.allclose(twice, 2 * step, atol=0.05 * float(step.abs().max()))


def test_layers_keep_their_mean_and_deviation_and_other_blocks_their_length(
    rows: Tensor, tiny_detector: Detector
) -> None:
    layout = tiny_detector.extractor_.layout
    space = Space(layout, torch.cat([rows, -rows]))  # as if either sign were possible
    points = torch.tensor([1, 5])
    made = DenoisedDirections(tiny_detector.heads_, space, rows, points, 8).candidates(2)
    for part in layout.parts:
        block, own = made[:, :, part.columns], rows[points][:, None, part.columns].expand(-1, made.shape[1], -1)
        if part.name in ("layer1", "layer2", "layer4"):
            assert torch.allclose(block.mean(2), own.mean(2), atol=1e-4)
            assert torch.allclose(block.std(2), own.std(2), rtol=1e-3)
        else:
            assert torch.allclose(block.norm(dim=2), own.norm(dim=2), rtol=1e-4)
        assert not torch.allclose(block, own, atol=1e-3)


def test_a_denoiser_explains_the_outlier_worse_than_its_row(rows: Tensor, tiny_detector: Detector) -> None:
    heads = tiny_detector.heads_
    points = torch.arange(40)
    outliers = DenoisedDirections(heads, Space(tiny_detector.extractor_.layout, rows), rows, points, 8, 1.0, keep=1)(0)[
        :, 0
    ]
    before, after = (
        heads.diffusion.errors(heads.diffusion.stages(part)).mean((1, 2)) for part in (rows[points], outliers)
    )
    assert (after > before).float().mean() > 0.95


# ---- all of it ----


def test_outliers_lie_farther_than_their_boundary_and_are_found_more_often(
    found: Synthesis, tiny_detector: Detector
) -> None:
    assert found.distances["outliers"] > found.distances["boundary"] > found.distances["in-domain"] > 0
    assert found.flagged["outliers"] > found.flagged["in-domain"] + 0.2
    assert 0 <= found.flagged["in-domain"] < 0.15


def test_the_numbers_are_what_they_are_called(found: Synthesis, tiny_detector: Detector) -> None:
    space = Space(found.outliers.layout, found.in_domain)
    joined = space.join(found.in_domain).double()
    distances = torch.cdist(joined, joined).fill_diagonal_(torch.inf)
    assert found.distances["in-domain"] == pytest.approx(float(np.median(distances.min(1).values)), abs=1e-5)
    scores = tiny_detector.score_features(found.outliers.vectors)
    held_out = tiny_detector.calibration_.scores
    flags = [(1 + (held_out >= s).sum()) / (len(held_out) + 1) <= 0.05 for s in scores]
    assert found.flagged["outliers"] == pytest.approx(np.mean(flags))


def test_outliers_are_rows_of_the_detector(found: Synthesis, tiny_detector: Detector) -> None:
    outliers, extractor = found.outliers, tiny_detector.extractor_
    assert outliers.vectors.shape == (101, extractor.width) and outliers.vectors.dtype == torch.float32
    assert outliers.layout == extractor.layout and outliers.layers == list(extractor.layers)
    assert outliers.fingerprint == extractor.backbone.fingerprint
    assert outliers.classes == ["china", "flower"]
    assert torch.bincount(outliers.labels).tolist() == [51, 50]
    lowest = found.in_domain.min(0).values
    for part in outliers.layout.parts:
        if (lowest[part.columns] >= 0).all():
            assert (outliers.vectors[:, part.columns] >= 0).all(), part.name
    assert len(torch.unique(outliers.vectors, dim=0)) == 101


def test_each_outlier_lies_beyond_a_boundary_row_of_its_class(found: Synthesis, tiny_detector: Detector) -> None:
    """Blocks that have no denoiser are as long as those of one and the same boundary row."""
    for part in found.outliers.layout.parts:
        if part.kind is Kind.MEAN:
            continue
        lengths = found.outliers.vectors[:, part.columns].norm(dim=1)
        known = found.boundary[:, part.columns].norm(dim=1)
        assert float((lengths[:, None] - known).abs().min(1).values.max()) < 1e-3 * float(known.max())


def test_the_seed_decides_everything(found: Synthesis, tiny_detector: Detector, classes: Path) -> None:
    method = found.outliers.method
    again, other = (synthesise(tiny_detector, classes, 101, method, k=20, seed=seed) for seed in (0, 1))
    assert torch.equal(again.outliers.vectors, found.outliers.vectors)
    assert again.distances == found.distances
    assert not torch.allclose(other.outliers.vectors, found.outliers.vectors, atol=1e-3)
    assert torch.equal(other.boundary, found.boundary)


def test_fewer_outliers_are_the_first_of_more(tiny_detector: Detector, classes: Path) -> None:
    few, more = (synthesise(tiny_detector, classes, n, "boundary", k=20).outliers for n in (6, 60))
    assert torch.equal(few.vectors[few.labels == 1], more.vectors[more.labels == 1][:3])


@pytest.mark.parametrize("labelled", [None, False])
def test_without_folders_of_classes_all_are_one(
    tiny_detector: Detector, sample_folders: dict[str, Path], classes: Path, labelled: bool | None
) -> None:
    images = sample_folders["train"] if labelled is None else classes
    found = synthesise(tiny_detector, images, 5, "boundary", labelled=labelled)
    assert found.outliers.classes == ["in-domain"]
    assert found.outliers.labels.tolist() == [0] * 5
    assert len(found.in_domain) == 390 and len(found.boundary) == 39


def test_copies_count_once_and_unreadable_files_are_listed(
    tiny_detector: Detector, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "in" / "one"
    folder.mkdir(parents=True)
    for file in sorted(sample_folders["train"].iterdir())[:12]:
        shutil.copy(file, folder / file.name)
        shutil.copy(file, folder / f"copy_{file.name}")
    (folder / "broken.png").write_bytes(b"")
    own = copy.copy(tiny_detector)
    found = synthesise(own, tmp_path / "in", 4, k=11)
    assert len(found.in_domain) == 12
    assert own.unreadable_ == [(str(folder / "broken.png"), "empty file (0 bytes)")]
    with pytest.raises(
        UsageError, match="class 'one' has 12 different readable images, too few for neighbour 12: ask f"
    ):
        synthesise(own, tmp_path / "in", 4, k=12)


def test_the_picture_is_a_plane_through_in_domain_rows(found: Synthesis) -> None:
    points, share = found.projection(most=50)
    assert {name: values.shape for name, values in points.items()} == {
        "in-domain": (50, 2),
        "boundary": (min(50, len(found.boundary)), 2),
        "outliers": (50, 2),
    }
    assert np.allclose(points["in-domain"].mean(0), 0, atol=1e-5)
    assert 0.05 < share <= 1
    spread = points["in-domain"].std(0)
    assert spread[0] >= spread[1] > 0


def test_bad_requests_are_one_line(tiny_detector: Detector, classes: Path, few_images: Path, tmp_path: Path) -> None:
    few = tmp_path / "few2"
    for name, count in (("many", 6), ("two", 2)):
        (few / name).mkdir(parents=True)
        for file in sorted(few_images.iterdir())[:count]:
            shutil.copy(file, few / name)
    requests: list[tuple[str, dict[str, Any]]] = [
        ("number of outliers must be above 0, not 0", {"n": 0}),
        ("unknown method 'difusion'; did you mean diffusion", {"method": "difusion"}),
        ("k must be a whole number above 0, not 0", {"k": 0}),
        ("select must be a whole number above 0, not 0", {"select": 0}),
        ("strength must be a number above 0, not -1", {"strength": -1}),
        ("strength must be a number above 0, not nan", {"strength": float("nan")}),
        ("sigma must be a number above 0, not 0", {"method": "boundary", "sigma": 0}),
        ("of 1 candidates 2 cannot be kept", {"method": "boundary", "candidates": 1}),
        ("class 'two' has 2 different readable images, and at least 3 are needed: add some", {"images": few}),
        ("lies in no class folder", {"images": few_images, "labelled": True}),
        ("unknown backend 'fais'", {"backend": "fais"}),
    ]
    for words, options in requests:
        with pytest.raises(UsageError) as raised:
            synthesise(tiny_detector, **{"images": classes, "n": 3, **options})
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_small_class_leaves_the_boundary_of_others_alone(
    tiny_detector: Detector, classes: Path, tmp_path: Path
) -> None:
    shutil.copytree(classes, tmp_path / "all")
    large = sorted(folder for folder in (tmp_path / "all").iterdir())[0]
    (tmp_path / "all" / "zz").mkdir()
    for file in sorted(large.iterdir())[:3]:
        file.rename(tmp_path / "all" / "zz" / file.name)
    alone = synthesise(tiny_detector, [large], 20, labelled=False)
    beside = synthesise(tiny_detector, tmp_path / "all", 60)
    assert torch.equal(beside.boundary[: len(alone.boundary)], alone.boundary)


def test_other_detectors_are_refused(few_images: Path) -> None:
    for detector, mode in ((PixelDetector(), "pixel"), (FeatureDiffusion(), "vectors")):
        for call in (lambda d=detector: synthesise(d, few_images, 3), lambda d=detector: self_check(d)):
            with pytest.raises(UsageError, match=f"this model is of mode {mode}"):
                call()
    with pytest.raises(NotFittedError):
        synthesise(Detector(), few_images, 3)


# ---- the self-check ----


def test_self_check_flags_more_than_in_domain_images(tiny_detector: Detector) -> None:
    share = self_check(tiny_detector, 200)
    assert 0.2 < share <= 1
    assert self_check(tiny_detector, 200) == share
    assert len(tiny_detector.calibration_digests_) == len(tiny_detector.calibration_) == 78


def test_self_check_starts_at_held_out_images(tiny_detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    make = synthesis.DenoisedDirections

    def watched(heads: Any, space: Any, rows: Tensor, points: Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(rows[points])
        return make(heads, space, rows, points, *rest, **more)

    monkeypatch.setattr(synthesis, "DenoisedDirections", watched)
    self_check(tiny_detector, 200)
    kept = tiny_detector.feature_store().table(tiny_detector.calibration_digests_)
    scores = np.sort(tiny_detector.score_features(kept[np.arange(len(kept))]))
    assert np.allclose(scores, tiny_detector.calibration_.scores, atol=1e-5)
    held_out = {row.numpy().tobytes() for row in kept[np.arange(len(kept))]}
    assert {row.numpy().tobytes() for row in seen[0]} == held_out


def test_self_check_sees_a_detector_that_lost_its_bearings(tiny_detector: Detector) -> None:
    """With a threshold that nothing reaches, nothing is flagged."""
    blind = copy.copy(tiny_detector)
    blind.calibration_ = Calibration(np.full(78, 1e9))
    assert self_check(blind, 50) == 0


def test_self_check_needs_a_detector_that_was_fitted_here(tiny_model: Path, tiny_detector: Detector) -> None:
    with pytest.raises(UsageError, match="does not know its held-out images any more"):
        self_check(Detector.from_pretrained(tiny_model))
    with pytest.raises(UsageError, match="must be above 0, not 0"):
        self_check(tiny_detector, 0)
    few = copy.copy(tiny_detector)
    few.calibration_digests_ = few.calibration_digests_[:2]
    with pytest.raises(UsageError, match="at least 3 held-out images, and there are 2"):
        self_check(few)


# ---- files ----


def same(a: Outliers, b: Outliers) -> bool:
    plain = ("classes", "layout", "method", "fingerprint", "layers")
    return all(getattr(a, name) == getattr(b, name) for name in plain) and (
        torch.equal(a.vectors, b.vectors) and torch.equal(a.labels, b.labels)
    )


def test_a_file_gives_back_what_was_saved(found: Synthesis, tmp_path: Path) -> None:
    found.outliers.save(tmp_path / "a.safetensors")
    loaded = load_outliers(tmp_path / "a.safetensors")
    assert same(loaded, found.outliers) and loaded.latents is None
    latents = torch.randn(101, 4, 2, 2)
    replace(found.outliers, latents=latents).save(str(tmp_path / "a.safetensors"))
    loaded = load_outliers(str(tmp_path / "a.safetensors"))
    assert loaded.latents is not None and torch.equal(loaded.latents, latents)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_that_cannot_be_written(found: Synthesis, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="could not be written to .*gone.*: No such file"):
        found.outliers.save(tmp_path / "gone" / "a.safetensors")


def small(**changes: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a good file of two outliers, but for ``changes``."""
    tensors = {"vectors": torch.ones(2, 5), "labels": torch.tensor([0, 1])}
    known = {"method": "boundary", "fingerprint": "ab", "classes": ["x", "y"], "layers": ["a"]}
    known |= {"columns": {"a": [0, 3], "a:std": [3, 5]}}
    tensors |= {name: value for name, value in changes.items() if isinstance(value, Tensor)}
    header = {"format": "featdiff outliers", "format_version": "2"}
    header |= {name: value for name, value in changes.items() if name in header}
    known |= {name: value for name, value in changes.items() if name not in tensors and name not in header}
    metadata = header | {"outliers": json.dumps(known)}
    return tensors, metadata | {DIGEST: digest_of(to_bytes(tensors, metadata))}


def test_the_small_file_is_good(tmp_path: Path) -> None:
    tensors, metadata = small()
    save_file(tensors, tmp_path / "a", metadata)
    assert load_outliers(tmp_path / "a").layout == FeatureLayout.of({("a", Kind.MEAN): 3, ("a", Kind.SPATIAL_STD): 2})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "pt"}, "holds no outliers of featdiff"),
        ({"format_version": "1"}, "have format 1, this featdiff reads 2: make them again"),
        ({"format_version": "3"}, "have format 3, this featdiff reads 2: .*pip install -U featdiff"),
        ({"method": 3}, "method is not what it should be"),
        ({"classes": [1, 2]}, "classes is not what it should be"),
        ({"more": 1}, "its metadata are not those"),
        ({"columns": {"a": [0, 3], "b": [4, 5]}}, r"the columns of 'b' \(4:5\) do not begin at 3"),
        ({"columns": {"a": [0, "3"]}}, "the columns of a are not what they should be"),
        ({"columns": {"a": [0, 4]}}, r"its vectors are not of shape \(n, 4\)"),
        ({"vectors": torch.ones(2, 5, dtype=torch.float64)}, r"not of shape \(n, 5\)"),
        ({"vectors": torch.full((2, 5), torch.nan)}, "vectors hold NaN"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "not one label for each vector"),
        ({"labels": torch.zeros(2)}, "not one label for each vector"),
        ({"labels": torch.tensor([0, 2])}, "labels must lie in 0 .. 1"),
        ({"labels": torch.tensor([-1, 0])}, "labels must lie in 0 .. 1"),
        ({"latents": torch.ones(3, 4)}, "not one latent for each vector"),
        ({"bank": torch.ones(1)}, "it holds bank, labels, vectors, not vectors and labels"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    tensors, metadata = small(**changes)
    save_file(tensors, tmp_path / "a", metadata)
    with pytest.raises(ModelError, match=words) as raised:
        load_outliers(tmp_path / "a")
    assert "\n" not in str(raised.value)


def test_flipped_bit_anywhere_is_found(found: Synthesis, tmp_path: Path) -> None:
    found.outliers.save(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    for place in [*range(0, 700, 9), *np.linspace(700, len(data) - 1, 40).astype(int)]:
        changed = bytearray(data)
        changed[place] ^= 1 << int(place) % 8
        (tmp_path / "a").write_bytes(changed)
        with pytest.raises(ModelError) as raised:
            load_outliers(tmp_path / "a")
        assert "\n" not in str(raised.value)
    (tmp_path / "a").write_bytes(data)
    assert torch.equal(load_outliers(tmp_path / "a").vectors, found.outliers.vectors)


def test_deep_json_is_refused(tmp_path: Path) -> None:
    tensors, metadata = small()
    metadata["outliers"] = "[" * 100_000
    metadata[DIGEST] = digest_of(to_bytes(tensors, metadata | {DIGEST: ""}))
    save_file(tensors, tmp_path / "a", metadata)
    with pytest.raises(ModelError, match="its metadata are not those"):
        load_outliers(tmp_path / "a")


def test_files_of_something_else_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "text").write_text("hello")
    tensors, metadata = small()
    save_file(tensors, tmp_path / "whole", metadata)
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-9])
    assert set(load_file(tmp_path / "whole")) == {"vectors", "labels"}
    for file, words in (
        (tmp_path / "text", "no file of outliers, or a damaged one"),
        (tmp_path / "cut", "no file of outliers, or a damaged one"),
        (tiny_model / "model.safetensors", "holds no outliers of featdiff"),
        (tmp_path / "gone", "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(ModelError, match=words) as raised:
            load_outliers(file)
        assert "\n" not in str(raised.value)
