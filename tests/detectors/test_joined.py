"""Several encoders: what each contributes, how scores are joined and calibrated, and what a saved model refuses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset
from weights_files import write

from featdiff import Detector, JoinedDetector, load_detector
from featdiff.data.image_refs import ImageRef
from featdiff.detectors.joining import join, min_p
from featdiff.detectors.model_card import model_card
from featdiff.detectors.pushing import kept_images
from featdiff.detectors.recalibration import recalibrate
from featdiff.detectors.updating import update
from featdiff.evaluation.baselines import fit_baselines
from featdiff.evaluation.protocols import ScoredPair, evaluate_detector
from featdiff.exceptions import FeatdiffError, KnownImages, ModelError, UsageError
from featdiff.export.export import export
from featdiff.features.joined import JoinedTransform
from featdiff.files.model_folder import load, save
from featdiff.outliers.synthesis import self_check
from featdiff.verdicts.calibration import Calibration
from featdiff.verdicts.results import Scores

#: Two real networks with maps of other sizes and preprocessings of their own.
PAIR = ["test_resnet", "test_efficientnet"]


@pytest.fixture(scope="module")
def weights(seeded_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A weights file for each of ``PAIR``, and another for the first."""
    import timm

    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(1)
    efficientnet = timm.create_model("test_efficientnet", pretrained=False).state_dict()
    other = {name: value * 1.5 for name, value in load_file(seeded_backbone).items() if value.is_floating_point()}
    other |= {name: value for name, value in load_file(seeded_backbone).items() if not value.is_floating_point()}
    return [
        seeded_backbone,
        write(efficientnet, folder / "test_efficientnet.safetensors"),
        write(other, folder / "other.safetensors"),
    ]


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    """Arguments of detectors that fit in a moment."""
    return {
        "size": 64,
        "hidden_max": 32,
        "blocks": 1,
        "fpr": 0.2,
        "recipe": {"epochs": 2, "min_steps": 1, "batch_size": 16},
        "calibration": 0.2,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def joined(quick: dict[str, Any], weights: list[Path], files: list[str]) -> JoinedDetector:
    """Fitted on ``files``; do not change it."""
    return JoinedDetector(PAIR, weights=weights[:2], **quick).fit(files)


@pytest.fixture(scope="module")
def by_min_p(quick: dict[str, Any], weights: list[Path], files: list[str]) -> JoinedDetector:
    """The same by the smallest p-value; do not change it."""
    return JoinedDetector(PAIR, weights=weights[:2], join="min-p", **quick).fit(files)


@pytest.fixture(scope="module")
def singles(quick: dict[str, Any], weights: list[Path], files: list[str]) -> list[Detector]:
    """A detector of each encoder alone, on the same images."""
    pairs = zip(PAIR, weights[:2], strict=True)
    return [Detector(name, weights=file, local=False, **quick).fit(files) for name, file in pairs]


@pytest.fixture(scope="module")
def saved(joined: JoinedDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the saved detector; do not change it."""
    folder = tmp_path_factory.mktemp("joined") / "model"
    joined.save_pretrained(folder)
    return folder


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def rows_of(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, tensors = load(folder)
    for name in ("format", "format_version", "tensors", "digest"):
        config.pop(name)
    return config, tensors


# ---- the score ----


def test_each_encoder_is_what_a_detector_of_it_alone_is(
    joined: JoinedDetector, singles: list[Detector], fresh: list[str]
) -> None:
    assert joined.encoders == PAIR
    heads = joined.all_heads(joined.features(fresh)[1][:])
    for name, single in zip(PAIR, singles, strict=True):
        alone = single.score(fresh)
        np.testing.assert_allclose(heads[name], alone.ood_score, atol=1e-5)
        np.testing.assert_array_equal(joined.score(fresh).p_values[name], alone.p_value)
        for layer, values in alone.layers.items():
            np.testing.assert_allclose(joined.score(fresh).layers[f"{name}/{layer}"], values, atol=1e-5)
    assert joined.layers == [
        f"{name}/{layer}" for name, single in zip(PAIR, singles, strict=True) for layer in single.layers
    ]


def test_z_sum_by_hand(joined: JoinedDetector, singles: list[Detector], files: list[str], fresh: list[str]) -> None:
    assert joined.calibration_digests_ == singles[0].calibration_digests_
    calibrate = [file for file, digest in digests_of(singles[0], files) if digest in joined.calibration_digests_]
    assert len(calibrate) == len(joined.calibration_) == 8

    def summed(images: list[str]) -> np.ndarray:
        first, second = (single.score(images).ood_score for single in singles)
        added: np.ndarray = (first + second) / np.sqrt(2)
        return added

    held_out = summed(calibrate)
    expected = (summed(fresh) - held_out.mean()) / held_out.std()
    scores = joined.score(fresh)
    np.testing.assert_allclose(scores.ood_score, expected, atol=1e-4)
    standardised = np.sort((held_out - held_out.mean()) / held_out.std())
    np.testing.assert_allclose(joined.calibration_.scores, standardised, atol=1e-4)
    by_hand = (1 + (standardised[None] >= scores.ood_score[:, None] - 1e-6).sum(1)) / 9
    np.testing.assert_allclose(scores.p_value, by_hand)
    np.testing.assert_array_equal(scores.is_ood, scores.p_value <= 0.2)


def digests_of(detector: Detector, files: list[str]) -> Iterator[tuple[str, bytes]]:
    for batch in detector.batches(files)[0]:
        for item in batch.loaded:
            yield item.ref.path, item.digest


def test_min_p_by_hand(by_min_p: JoinedDetector, joined: JoinedDetector, files: list[str], fresh: list[str]) -> None:
    """The order of scores is that of the smallest p-value, and for equal ones that of the standard deviations."""
    scores = by_min_p.score(fresh)
    smallest = np.min(list(scores.p_values.values()), axis=0)
    assert len(np.unique(smallest)) > 3
    for i, j in np.ndindex(len(fresh), len(fresh)):
        if smallest[i] < smallest[j] - 1e-9:
            assert scores.ood_score[i] > scores.ood_score[j]
    assert len(np.unique(scores.ood_score)) == len(np.unique(joined.score(fresh).ood_score))
    assert (scores.p_value >= smallest).all()  # corrected
    assert (scores.p_value > smallest).any()
    heads = by_min_p.all_heads(by_min_p.features(fresh)[1][:])
    np.testing.assert_allclose(
        heads["z-sum"], (heads["test_resnet"] + heads["test_efficientnet"]) / np.sqrt(2), atol=1e-12
    )
    np.testing.assert_allclose(heads["featdiff"], scores.ood_score, atol=1e-5)


def test_min_p_goes_on_where_p_values_end() -> None:
    calibrations = [Calibration(np.arange(19.0)), Calibration(np.arange(19.0) / 2)]
    z = np.array([[20.0, 0.0], [25.0, 0.0], [0.0, 40.0], [18.0, 0.0], [17.5, 0.0], [0.0, 0.0]])
    scores = min_p(z, calibrations)
    assert list(np.argsort(-scores)) == [2, 1, 0, 3, 4, 5]
    assert np.isfinite(scores).all()
    assert np.isnan(min_p(np.array([[np.nan, 1.0]]), calibrations)).all()


@pytest.mark.parametrize("encoders", [2, 3])
@pytest.mark.parametrize("n", [19, 60])
@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_joint_p_values_hold(n: int, encoders: int, correlation: float) -> None:
    """Over held-out sets and new images, no rate is exceeded; the smallest p-value itself exceeds all."""
    rng = np.random.default_rng(0)
    repeats = 2000
    rates = np.array([1, 2, 4, 8]) / (n + 1)
    found = {how: np.zeros(len(rates)) for how in ("z-sum", "min-p", "naive")}
    for _ in range(repeats):
        shared = rng.standard_normal((n + 5, 1))
        z = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * rng.standard_normal((n + 5, encoders))
        held_out, new = z[:n], z[n:]
        calibrations = [Calibration(column) for column in held_out.T]
        for how in ("z-sum", "min-p"):
            calibration = Calibration(join(how, held_out, calibrations, calibrates=True))
            p = calibration.p_values(join(how, new, calibrations))
            found[how] += (p[:, None] <= rates + 1e-9).mean(0) / repeats
        p = np.min([calibration.p_values(new[:, i]) for i, calibration in enumerate(calibrations)], axis=0)
        found["naive"] += (p[:, None] <= rates + 1e-9).mean(0) / repeats

    # images of one held-out set are not independent: its share of false alarms varies with about rate / n, too
    noise = 4 * np.sqrt(rates * (1 - rates) * (1 / 5 + 1 / n) / repeats)
    assert (found["z-sum"] <= rates + noise).all()
    assert (found["min-p"] <= rates + noise).all()
    assert (found["min-p"] >= 0.4 * rates - noise).all()  # no more careful than it must be
    assert (found["naive"] > rates + noise).all()


@pytest.mark.parametrize("how", ["z-sum", "min-p"])
def test_false_alarms_hold_by_folds(
    how: str, quick: dict[str, Any], weights: list[Path], sample_folders: dict[str, Path]
) -> None:
    settings = {**quick, "calibration": "auto", "recipe": {"epochs": 1, "min_steps": 1, "batch_size": 64}}
    tiles = sorted(map(str, sample_folders["train"].iterdir()))
    tiles = [tiles[i] for i in np.random.default_rng(1).permutation(len(tiles))]
    detector = JoinedDetector(PAIR, weights=weights[:2], join=how, **settings).fit(tiles[:120], groups="none")
    assert len(detector.calibration_) == 120  # each calibrates, by the scores of a fold without it
    share = detector.score(tiles[120:320]).is_ood.mean()
    # 0.2, with the spread of both sets
    assert share <= 0.2 + 4 * np.sqrt(0.16 * (1 / 120 + 1 / 200))
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    assert detector.score(noise).is_ood.mean() > 0.8


def test_rows_do_not_depend_on_the_batch(saved: Path, fresh: list[str]) -> None:
    alone, together = (load_detector(saved, image_batch=size).score(fresh) for size in (1, 7))
    np.testing.assert_allclose(alone.ood_score, together.ood_score, atol=2e-5)
    np.testing.assert_array_equal(alone.p_value, together.p_value)


def test_groups_count_once(quick: dict[str, Any], weights: list[Path], files: list[str]) -> None:
    labels = [i // 2 for i in range(len(files))]
    settings = {**quick, "calibration": "auto", "fpr": 0.2}
    detector = JoinedDetector(PAIR, weights=weights[:2], **settings).fit(files, groups=labels)
    assert detector.calibration_.groups == 20
    assert [member.calibration_.groups for member in detector.members_] == [20, 20]


def test_known_images_are_marked_and_can_be_excluded(joined: JoinedDetector, files: list[str]) -> None:
    with pytest.warns(KnownImages):
        known = joined.score(files[:10])
    excluded = joined.score(files[:10], exclude_known=True)
    assert known.known is not None
    assert 0 < known.known.sum() < 10  # those that calibrate are not in the bank
    assert (excluded.ood_score[known.known] > known.ood_score[known.known]).all()


# ---- reading ----


@dataclass(frozen=True)
class Counted(ImageRef):
    """A file that counts how often it is read."""

    file: str = ""
    reads: Counter[str] = field(default_factory=Counter, compare=False, repr=False)

    def read(self) -> bytes:
        self.reads[self.path] += 1
        return Path(self.file).read_bytes()


def counted(files: list[str]) -> tuple[list[Counted], Counter[str]]:
    reads: Counter[str] = Counter()
    return [Counted(file, file, reads) for file in files], reads


def test_each_image_is_read_and_decoded_once(
    quick: dict[str, Any],
    weights: list[Path],
    files: list[str],
    fresh: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from featdiff.data import batches

    decoded: list[tuple[int, int]] = []
    real = batches.decode

    def counting(image: Any, max_pixels: int) -> Image.Image:
        decoded.append(image.size)
        return real(image, max_pixels)

    monkeypatch.setattr(batches, "decode", counting)
    refs, reads = counted(files)
    detector = JoinedDetector(PAIR, weights=weights[:2], cache=tmp_path, **quick).fit(refs)
    assert reads == Counter(files)
    assert len(decoded) == len(files)

    decoded.clear()
    refs, reads = counted(fresh)
    assert len(detector.score(refs)) == 20
    assert reads == Counter(fresh)
    assert len(decoded) == len(fresh)


def test_pictures_of_many_shapes(joined: JoinedDetector, tmp_path: Path) -> None:
    """Each has the score that it has alone, at its place, whatever stands beside it."""
    rng = np.random.default_rng(0)
    names = []
    for i, size in enumerate([(40, 60, 3), (60, 40, 3), (200, 50, 3), (40, 60, 3), (50, 200, 3), (64, 64, 3)]):
        names.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(names[-1])
    together = joined.score(names)
    for name, row in zip(names, together, strict=True):
        assert row.path == name
        assert joined.score([name]).ood_score[0] == pytest.approx(row.ood_score, abs=1e-4)


def test_what_cannot_be_read_is_a_row(joined: JoinedDetector, fresh: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(fresh[0]).read_bytes()[:80])
    scores = joined.score([fresh[0], str(broken), str(tmp_path / "none.png"), fresh[1]])
    assert scores.status == ["ok", "unreadable", "unreadable", "ok"]
    assert np.isnan(scores.ood_score[1:3]).all()
    assert np.isnan(scores.p_values["test_resnet"][1:3]).all()
    np.testing.assert_allclose(scores.ood_score[[0, 3]], joined.score(fresh[:2]).ood_score, atol=1e-5)


def test_generators_of_images_are_read_and_ready_batches_are_refused(joined: JoinedDetector, fresh: list[str]) -> None:
    scores = joined.score(Image.open(file) for file in fresh[:3])
    np.testing.assert_allclose(scores.ood_score, joined.score(fresh[:3]).ood_score, atol=1e-5)
    loader = DataLoader(TensorDataset(torch.rand(4, 3, 64, 64)), batch_size=2)
    with pytest.raises(UsageError, match="its own way: give images") as error:
        joined.score(loader)
    one_line(error)


def test_large_jpegs_are_decoded_for_the_network_that_needs_the_most() -> None:
    class Needing:
        def __init__(self, *size: int) -> None:
            self.size = size

        def draft(self, width: int, height: int) -> tuple[int, ...]:
            return self.size

        def __call__(self, picture: Image.Image, *place: object) -> tuple[object, ...]:
            return (picture.size, *place)

    both = JoinedTransform([Needing(300, 200), Needing(100, 250)])
    assert both.draft(4000, 3000) == (300, 250)
    picture = Image.new("RGB", (8, 4))
    assert both(picture, (0, 0, 8, 4)) == (((8, 4), (0, 0, 8, 4)),) * 2
    assert not hasattr(JoinedTransform([Needing(1, 1), lambda picture: picture]), "draft")


# ---- explanations and evaluations ----


def test_contributions_of_all_encoders_add_up(
    joined: JoinedDetector, fresh: list[str], sample_folders: dict[str, Path]
) -> None:
    images = [*fresh[:3], *sorted(map(str, sample_folders["digits"].iterdir()))[:2]]
    scores = joined.score(images)
    for row, found in zip(scores, joined.iter_explanations(images, nearest=2), strict=True):
        assert sum(part.amount for part in found.heads) == pytest.approx(row.ood_score, abs=1e-4)
        names = {part.name for part in found.heads}
        assert {f"layer_{layer}" for layer in row.layers} < names
        assert {name.partition("/")[0].removeprefix("layer_") for name in names} == set(PAIR)
        assert found.p_values == row.p_values
        assert found.reasons
        assert len(found.nearest) == 2
        assert found.heat is None
        by_name = {part.name: part for part in found.heads}
        for name, score in row.layers.items():
            assert by_name[f"layer_{name}"].score == pytest.approx(score, abs=1e-4)
            assert by_name[f"layer_{name}"].label in (
                "fine texture and colour",
                "shapes and parts",
                "overall content",
            )


def test_min_p_is_explained_by_layers(by_min_p: JoinedDetector) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = by_min_p.explain(Image.fromarray(noise))
    assert found.heads == ()  # it is no sum
    assert found.is_ood
    assert found.reasons[0].startswith("Flagged")
    assert len(found.reasons) > 1
    assert set(found.p_values) == set(PAIR)


def test_it_is_evaluated_like_any_other(joined: JoinedDetector, fresh: list[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    pairs: list[ScoredPair] = []
    result = evaluate_detector(joined, fresh, {"noise": list(noise)}, scored=pairs)
    scored = pairs[0]
    heads = result["pairs"][0]["heads"]
    assert {"featdiff", "min-p", *PAIR, "test_resnet/neighbors"} <= set(heads)
    assert heads["featdiff"]["auroc"] > 0.9
    assert set(scored.id_contributions) == set(scored.labels)
    total = np.sum(list(scored.id_contributions.values()), axis=0)
    np.testing.assert_allclose(total, scored.id_scores["featdiff"], atol=1e-4)


# ---- save and load ----


def test_a_saved_model_gives_the_same_scores(saved: Path, joined: JoinedDetector, fresh: list[str]) -> None:
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "model.safetensors"]
    other = load_detector(saved)
    assert isinstance(other, JoinedDetector)
    a, b = joined.score(fresh), other.score(fresh)
    np.testing.assert_array_equal(a.ood_score, b.ood_score)
    np.testing.assert_array_equal(a.p_value, b.p_value)
    assert a.layers.keys() == b.layers.keys()
    for name in a.layers:
        np.testing.assert_array_equal(a.layers[name], b.layers[name])
    assert repr(other) == repr(joined)
    assert other.explain(fresh[0]).nearest[0].path == joined.explain(fresh[0]).nearest[0].path
    assert set(other.calibration_.layers) == set(other.layers)


def test_saving_what_was_loaded_changes_nothing(saved: Path, tmp_path: Path) -> None:
    load_detector(saved).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_min_p_is_saved(by_min_p: JoinedDetector, tmp_path: Path, fresh: list[str]) -> None:
    by_min_p.save_pretrained(tmp_path / "model")
    other = JoinedDetector.from_pretrained(tmp_path / "model")
    assert other.settings.join == "min-p"
    np.testing.assert_array_equal(other.score(fresh).ood_score, by_min_p.score(fresh).ood_score)


def test_the_config_names_each_backbone(saved: Path, singles: list[Detector]) -> None:
    config = json.loads((saved / "config.json").read_text())
    found = [encoder["backbone"]["fingerprint"] for encoder in config["encoders"]]
    assert found == [single.extractor_.backbone.fingerprint for single in singles]
    assert config["mode"] == "joined"
    assert config["settings"]["join"] == "z-sum"


def test_what_encoders_share_is_saved_once(saved: Path) -> None:
    names = rows_of(saved)[1]
    assert "0.bank_digests" in names
    assert "0.bank_paths" in names
    assert "1.bank_digests" not in names
    assert "1.bank_paths" not in names


def test_other_weights_of_one_backbone_are_refused(saved: Path, weights: list[Path]) -> None:
    with pytest.raises(ModelError, match="test_resnet.* has other weights than this detector was fitted with") as error:
        load_detector(saved, weights=[weights[2], weights[1]])
    one_line(error)
    assert isinstance(load_detector(saved, weights=weights[:2]), JoinedDetector)


@pytest.mark.parametrize("which", ["0.heads", "1.", "join_scale", "calibration", "0.bank_digests", "1.calibration"])
def test_a_model_that_lacks_a_tensor_is_refused(saved: Path, tmp_path: Path, which: str) -> None:
    config, tensors = rows_of(saved)
    gone = next((name for name in sorted(tensors) if name.startswith(which)), sorted(tensors)[0])
    del tensors[gone]
    save(tmp_path / "model", config, tensors)
    with pytest.raises(ModelError, match="damaged") as error:
        load_detector(tmp_path / "model")
    one_line(error)


@pytest.mark.parametrize("name", ["more", "0.more", "2.mean", "bank_more"])
def test_a_model_with_a_tensor_too_many_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    config, tensors = rows_of(saved)
    save(tmp_path / "model", config, tensors | {name: torch.zeros(2)})
    with pytest.raises(ModelError, match="damaged") as error:
        load_detector(tmp_path / "model")
    one_line(error)


def test_configs_that_do_not_fit_are_refused(saved: Path, tmp_path: Path) -> None:
    config, tensors = rows_of(saved)
    fewer = config | {"encoders": config["encoders"][:1]}
    turned = config | {"encoders": config["encoders"][::-1]}
    strange = config | {"encoders": ["one", "two"]}
    other_images = json.loads(json.dumps(config))
    other_images["encoders"][1]["images"]["different"] += 1
    wrong_join = json.loads(json.dumps(config))
    wrong_join["settings"]["join"] = "product"
    scale = tensors | {"join_scale": torch.tensor([0.0, 0.0], dtype=torch.float64)}
    cases = [(c, tensors) for c in (fewer, turned, strange, other_images, wrong_join)] + [(config, scale)]
    for i, (changed, held) in enumerate(cases):
        save(tmp_path / f"model{i}", changed, held)
        with pytest.raises(ModelError) as error:
            load_detector(tmp_path / f"model{i}")
        one_line(error)
    with pytest.raises(ModelError, match="of mode joined, not feature"):
        Detector.from_pretrained(saved)


def test_the_card_names_each_backbone(saved: Path) -> None:
    config = load(saved)[0]
    card = model_card(config, "org/model")
    for encoder in config["encoders"]:
        assert encoder["backbone"]["tag"] in card
        assert encoder["backbone"]["fingerprint"] in card
    assert 'JoinedDetector.from_pretrained("org/model")' in card
    assert "z-sum" in card
    assert kept_images(load(saved)[1]) == "paths"


# ---- names and arguments ----


def test_two_of_one_name_are_told_apart(
    quick: dict[str, Any], weights: list[Path], files: list[str], fresh: list[str]
) -> None:
    detector = JoinedDetector(["test_resnet", "test_resnet"], weights=[weights[0], weights[2]], **quick).fit(files)
    assert detector.encoders == ["test_resnet", "test_resnet-2"]
    assert len(set(detector.layers)) == len(detector.layers) == 10
    p_values = detector.score(fresh).p_values
    assert set(p_values) == {"test_resnet", "test_resnet-2"}
    assert not np.array_equal(*p_values.values())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"backbone": "test_resnet"}, "backbone must name two encoders or more"),
        ({"backbone": ["test_resnet"]}, "backbone must name two encoders or more"),
        ({"backbone": ["test_resnet", torch.nn.Identity()]}, "backbone must name two encoders or more"),
        ({"weights": ["a.safetensors"]}, "weights must be one file for each of 2 backbones"),
        ({"weights": "a.safetensors"}, "weights must be one file for each of 2 backbones"),
        ({"weights": ["a.safetensors", 3]}, "weights must be a path"),
        ({"join": "product"}, "join"),
        ({"local": True}, "several encoders have no local score"),
        ({"coreset": "greedy"}, "share one bank"),
        ({"engine": "openvino"}, "PyTorch alone"),
        ({"transform": {"input_size": (3, 32, 32)}}, "drop transform"),
        ({"extra_heads": ["energy"]}, "need logits"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as error:
        JoinedDetector(**{"backbone": PAIR, **arguments})
    one_line(error)


def test_the_detector_of_one_backbone_names_the_other() -> None:
    with pytest.raises(UsageError, match=r"featdiff\.JoinedDetector joins several"):
        Detector(PAIR)  # type: ignore[arg-type]


def test_what_several_encoders_cannot_do_is_refused(
    joined: JoinedDetector, saved: Path, fresh: list[str], tmp_path: Path
) -> None:
    refused = [
        (lambda: export(joined, tmp_path / "exported"), "cannot be exported yet"),
        (lambda: recalibrate(joined, fresh), "cannot be recalibrated yet"),
        (lambda: update(joined, fresh), "cannot be updated"),
        (lambda: fit_baselines(joined), "baselines look at features of one backbone"),
        (lambda: self_check(joined), "of mode joined"),
    ]
    for action, text in refused:
        with pytest.raises(FeatdiffError, match=text) as error:
            action()
        one_line(error)


def test_an_unfitted_detector_says_so(quick: dict[str, Any]) -> None:
    detector = JoinedDetector(PAIR, **quick)
    assert repr(detector) == "JoinedDetector(not fitted, fpr=0.2)"
    with pytest.raises(FeatdiffError, match="not fitted"):
        detector.score("photos")


def test_few_images_are_refused_in_one_line(quick: dict[str, Any], weights: list[Path], files: list[str]) -> None:
    with pytest.raises(UsageError, match="fpr 0.01 needs about") as error:
        JoinedDetector(PAIR, weights=weights[:2], **{**quick, "fpr": 0.01}).fit(files)
    one_line(error)


def test_a_rate_can_be_asked_for_anew(joined: JoinedDetector, fresh: list[str]) -> None:
    scores: Scores = joined.score(fresh, fpr=0.5)
    np.testing.assert_array_equal(scores.is_ood, scores.p_value <= 0.5)
