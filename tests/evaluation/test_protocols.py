"""Metrics of a detector on sets of images: the contract of the result, and what the protocols do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from sklearn.metrics import average_precision_score, roc_auc_score

from featdiff import Detector
from featdiff.evaluation.protocols import PROTOCOLS, ScoredPair, evaluate_detector
from featdiff.exceptions import NotFittedError, UsageError
from featdiff.verdicts.results import OK

HEADS = {
    *("featdiff", "layerwise", "mse", "mfsim", "lr", "neighbors"),
    *("layer_layer1", "layer_layer2", "layer_layer4"),
}


@pytest.fixture(scope="module")
def tiles(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 in-domain tiles of 32 px."""
    folder = tmp_path_factory.mktemp("tiles")
    for file in sorted(sample_folders["test"].iterdir())[:24]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures of 160 x 120 px, cut from the photograph of a flower."""
    folder = tmp_path_factory.mktemp("sharp")
    photograph = load_sample_image("flower.jpg")
    for i in range(12):
        row, column = divmod(i, 4)
        cut = photograph[row * 120 : row * 120 + 120, column * 160 : column * 160 + 160]
        Image.fromarray(cut).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def result(tiny_detector: Detector, tiles: Path, sharp: Path, sample_folders: dict[str, Path]) -> dict[str, Any]:
    digits = sorted(map(str, sample_folders["digits"].iterdir()))[:16]
    return evaluate_detector(tiny_detector, tiles, {"sharp": sharp, "digits": digits})


def heads(result: dict[str, Any], ood: str, protocol: str) -> dict[str, Any]:
    (pair,) = [p for p in result["pairs"] if (p["ood"], p["protocol"]) == (ood, protocol)]
    return pair["heads"]


def by_hand(id_scores: np.ndarray, ood_scores: np.ndarray) -> dict[str, float]:
    labels = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    scores = np.concatenate([id_scores, ood_scores])
    return {
        "auroc": roc_auc_score(labels, scores),
        "aupr_in": average_precision_score(1 - labels, -scores),
        "aupr_out": average_precision_score(labels, scores),
    }


def shrunk(folder: Path, size: int) -> list[Image.Image]:
    """The pictures of a folder, brought by Pillow to a short side of ``size``."""
    pictures = []
    for file in sorted(folder.iterdir()):
        with Image.open(file) as picture:
            scale = size / min(picture.size)
            wanted = tuple(round(side * scale) for side in picture.size)
            pictures.append(picture.resize(wanted, Image.Resampling.BICUBIC))
    return pictures


def test_contract(result: dict[str, Any], tiles: Path) -> None:
    assert list(result) == ["id", "model", "pairs"]
    assert (result["id"], result["model"]) == (str(tiles), "test_resnet.r160_in1k")
    order = [(pair["ood"], pair["protocol"]) for pair in result["pairs"]]
    assert order == [(name, protocol) for name in ("sharp", "digits") for protocol in PROTOCOLS]
    for pair in result["pairs"]:
        assert list(pair) == ["ood", "protocol", "n_id", "n_ood", "heads"]
        assert (pair["n_id"], pair["n_ood"]) == (24, {"sharp": 12, "digits": 16}[pair["ood"]])
        assert set(pair["heads"]) == HEADS
        for metrics in pair["heads"].values():
            assert list(metrics) == ["auroc", "aupr_in", "aupr_out", "fpr95", "auroc_ci"]
            assert all(0 <= metrics[name] <= 1 for name in ("auroc", "aupr_in", "aupr_out", "fpr95"))
            low, high = metrics["auroc_ci"]
            assert 0 <= low <= metrics["auroc"] <= high <= 1
    assert json.loads(json.dumps(result)) == result


def test_default_score_comes_first(result: dict[str, Any]) -> None:
    assert all(next(iter(pair["heads"])) == "featdiff" for pair in result["pairs"])


def test_as_published_is_what_score_gives(
    result: dict[str, Any], tiny_detector: Detector, tiles: Path, sharp: Path
) -> None:
    home, away = tiny_detector.score(tiles), tiny_detector.score(sharp)
    found = heads(result, "sharp", "as-published")
    for name, metrics in (
        ("featdiff", by_hand(home.ood_score, away.ood_score)),
        ("layer_layer4", by_hand(home.layers["layer4"], away.layers["layer4"])),
    ):
        for key, value in metrics.items():
            assert found[name][key] == pytest.approx(value, abs=1e-6), (name, key)


def test_matched_is_what_score_gives_for_shrunk_pictures(
    result: dict[str, Any], tiny_detector: Detector, tiles: Path, sharp: Path
) -> None:
    """A set of 120 px against one of 32 px is measured at 32 px."""
    home, away = tiny_detector.score(tiles), tiny_detector.score(shrunk(sharp, 32))
    found = heads(result, "sharp", "matched")["featdiff"]
    for key, value in by_hand(home.ood_score, away.ood_score).items():
        assert found[key] == pytest.approx(value, abs=1e-6), key


def test_protocols_differ_for_a_sharp_set_only(result: dict[str, Any]) -> None:
    matched, published = (heads(result, "sharp", protocol) for protocol in PROTOCOLS)
    assert matched != published
    assert heads(result, "digits", "matched") == heads(result, "digits", "as-published")


def test_sharp_in_domain_set_is_shrunk_as_well(tiny_detector: Detector, tiles: Path, sharp: Path) -> None:
    found = evaluate_detector(tiny_detector, sharp, {"tiles": tiles}, ["matched"])
    home, away = tiny_detector.score(shrunk(sharp, 32)), tiny_detector.score(tiles)
    expected = by_hand(home.ood_score, away.ood_score)
    assert heads(found, "tiles", "matched")["featdiff"]["auroc"] == pytest.approx(expected["auroc"], abs=1e-6)


def test_each_image_of_a_mixed_set_is_shrunk_by_its_own_size(
    tiny_detector: Detector, tiles: Path, sharp: Path, tmp_path: Path
) -> None:
    """Small pictures of a set stay as they are when the large ones are brought down."""
    for file in [*sorted(tiles.iterdir())[:5], *sorted(sharp.iterdir())[:4]]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    found = evaluate_detector(tiny_detector, tiles, {"mixed": tmp_path}, ["matched"])
    away = np.concatenate(
        [
            tiny_detector.score(sorted(map(str, tiles.iterdir()))[:5]).ood_score,
            tiny_detector.score(shrunk(sharp, 32)[:4]).ood_score,
        ]
    )
    expected = by_hand(tiny_detector.score(tiles).ood_score, away)
    assert heads(found, "mixed", "matched")["featdiff"]["auroc"] == pytest.approx(expected["auroc"], abs=1e-6)


def test_datasets_are_measured_as_their_folders_are(
    result: dict[str, Any], tiny_detector: Detector, tiles: Path, sharp: Path
) -> None:
    class Rows:
        def __init__(self, folder: Path) -> None:
            self.files = sorted(folder.iterdir())

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": Image.open(self.files[index]), "label": 0}

    found = evaluate_detector(tiny_detector, Rows(tiles), {"sharp": Rows(sharp)})
    assert found["id"] == "24 images in memory"
    for protocol in PROTOCOLS:
        expected = heads(result, "sharp", protocol)["featdiff"]["auroc"]
        assert heads(found, "sharp", protocol)["featdiff"]["auroc"] == pytest.approx(expected, abs=1e-6)

    with pytest.raises(UsageError, match="read only once"):
        evaluate_detector(tiny_detector, (row for row in [Image.open(next(tiles.iterdir()))]), {"sharp": sharp})


def test_swapped_sets_give_the_mirrored_auroc(
    result: dict[str, Any], tiny_detector: Detector, tiles: Path, sharp: Path
) -> None:
    other = evaluate_detector(tiny_detector, sharp, {"tiles": tiles}, ["as-published"])
    for name, metrics in heads(result, "sharp", "as-published").items():
        mirrored = heads(other, "tiles", "as-published")[name]["auroc"]
        assert mirrored == pytest.approx(1 - metrics["auroc"], abs=1e-9)


def test_same_call_gives_the_same_result(
    result: dict[str, Any], tiny_detector: Detector, tiles: Path, sharp: Path
) -> None:
    again = evaluate_detector(tiny_detector, tiles, {"sharp": sharp})
    assert again["pairs"] == result["pairs"][:2]


def test_unreadable_images_are_left_out_and_counted_out(
    tiny_detector: Detector, tiles: Path, result: dict[str, Any], sharp: Path, tmp_path: Path
) -> None:
    for file in tiles.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "zzz_empty.png").write_bytes(b"")
    whole = next(iter(sorted(tiles.iterdir()))).read_bytes()
    (tmp_path / "aaa_cut.png").write_bytes(whole[: len(whole) // 2])
    assert tiny_detector.score(tmp_path).status.count(OK) == 24
    (pair,) = evaluate_detector(tiny_detector, tmp_path, {"sharp": sharp}, ["as-published"])["pairs"]
    assert (pair["n_id"], pair["n_ood"]) == (24, 12)
    assert pair["heads"] == heads(result, "sharp", "as-published")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_set_without_a_readable_image_is_named(
    tiny_detector: Detector, tiles: Path, tmp_path: Path, protocol: str
) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UsageError, match="'broken'"):
        evaluate_detector(tiny_detector, tiles, {"broken": tmp_path}, [protocol])
    with pytest.raises(UsageError, match="'id'"):
        evaluate_detector(tiny_detector, tmp_path, {"tiles": tiles}, [protocol])


def test_missing_and_empty_sets_are_refused(tiny_detector: Detector, tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no images"):
        evaluate_detector(tiny_detector, tiles, {"empty": tmp_path})
    with pytest.raises(UsageError, match="nowhere.*no such"):
        evaluate_detector(tiny_detector, tmp_path / "nowhere", {"tiles": tiles})


def test_unknown_protocol_gets_a_hint(tiny_detector: Detector, tiles: Path) -> None:
    with pytest.raises(UsageError, match="unknown protocol 'match'; did you mean matched"):
        evaluate_detector(tiny_detector, tiles, {"tiles": tiles}, ["match"])


def test_unfitted_detector_says_so(tiles: Path) -> None:
    with pytest.raises(NotFittedError, match="fit"):
        evaluate_detector(Detector(), tiles, {"tiles": tiles})


def test_pictures_in_memory_can_be_evaluated(tiny_detector: Detector, sharp: Path, tiles: Path) -> None:
    """And the result names them in a few words, not by printing them."""
    found = evaluate_detector(tiny_detector, shrunk(sharp, 32), {"tiles": tiles}, ["matched"])
    assert found["pairs"][0]["n_id"] == 12
    assert len(found["id"]) < 100


def test_scores_behind_the_metrics_are_kept(tiny_detector: Detector, tiles: Path, sharp: Path) -> None:
    scored: list[ScoredPair] = []
    result = evaluate_detector(tiny_detector, tiles, {"sharp": sharp}, scored=scored)
    assert result == evaluate_detector(tiny_detector, tiles, {"sharp": sharp})
    assert [(pair.ood, pair.protocol) for pair in scored] == [("sharp", protocol) for protocol in PROTOCOLS]
    for pair, document in zip(scored, result["pairs"], strict=True):
        assert list(pair.id_scores) == list(pair.ood_scores) == list(document["heads"])
        for head, metrics in document["heads"].items():
            is_ood = np.repeat([0, 1], [document["n_id"], document["n_ood"]])
            both = np.concatenate([pair.id_scores[head], pair.ood_scores[head]])
            assert roc_auc_score(is_ood, both) == pytest.approx(metrics["auroc"])

    as_published = scored[1]
    assert np.array_equal(as_published.id_flags, tiny_detector.score(tiles).is_ood)
    assert np.array_equal(as_published.ood_flags, tiny_detector.score(sharp).is_ood)


def test_what_scores_are_made_of_is_kept(tiny_detector: Detector, tiles: Path, sharp: Path) -> None:
    scored: list[ScoredPair] = []
    evaluate_detector(tiny_detector, tiles, {"sharp": sharp}, scored=scored)
    for pair in scored:
        for parts, scores in ((pair.id_contributions, pair.id_scores), (pair.ood_contributions, pair.ood_scores)):
            assert list(parts) == ["layer_layer1", "layer_layer2", "layer_layer4", "neighbors"]
            np.testing.assert_allclose(sum(parts.values()), scores["featdiff"], atol=1e-4)
        assert pair.labels["layer_layer4"] == "overall content"
        assert set(pair.labels) >= set(pair.id_contributions)


def test_progress_reaches_the_number_of_images(tiny_detector: Detector, tiles: Path, sharp: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    evaluate_detector(tiny_detector, tiles, {"sharp": sharp}, ["matched"], lambda *step: calls.append(step))
    assert ("features", 24, 24) in calls
    assert ("features", 12, 12) in calls


def test_head_of_the_detector_is_the_entry_featdiff(
    tiny_model: Path,
    tiles: Path,
    sharp: Path,
    result: dict[str, Any],
    tiny_arguments: dict[str, Any],
    sample_folders: dict[str, Path],
) -> None:
    """With another head there are no neighbours, and every number of the others stays the same."""
    detector = Detector(**tiny_arguments, head="mfsim").fit(sample_folders["train"])
    scored: list[ScoredPair] = []
    found = heads(evaluate_detector(detector, tiles, {"sharp": sharp}, ["matched"], scored=scored), "sharp", "matched")
    assert scored[0].id_contributions == scored[0].ood_contributions == {}
    before = heads(result, "sharp", "matched")
    assert set(found) == HEADS - {"mfsim", "neighbors"}
    assert found["featdiff"] == before["mfsim"]
