"""Which images of a set are odd among the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import featdiff
from featdiff import Detector, Scores
from featdiff.detectors.audit import FEWEST, STANDS_APART, audit
from featdiff.evaluation.metrics import auroc
from featdiff.exceptions import UsageError

EXTRA = ["group", "nearest", "duplicate_of"]


@pytest.fixture(scope="session")
def look(small: dict[str, Any]) -> dict[str, Any]:
    """What to look with: a tiny backbone at 32 px."""
    return {name: small[name] for name in ("backbone", "weights", "layers", "transform")}


@pytest.fixture(scope="session")
def odd_folder(
    sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], dict[str, int]]:
    """40 tiles, and among them a near-copy, a copy, a torn file, and a flat picture, which is odd: (paths, places)."""
    folder = tmp_path_factory.mktemp("odd")
    names = []
    for i, file in enumerate(sorted(sample_folders["train"].iterdir())[::9][:40]):
        names.append(folder / f"{i:02d}.png")
        names[-1].write_bytes(file.read_bytes())

    tile = np.asarray(Image.open(names[3]).convert("RGB")).astype(int)
    near = folder / "near.png"
    Image.fromarray(np.clip(tile + 1, 0, 255).astype(np.uint8)).save(near)
    (folder / "copy.png").write_bytes(names[5].read_bytes())
    (folder / "torn.png").write_bytes(names[6].read_bytes()[:60])
    stripes = np.zeros((32, 32, 3), dtype=np.uint8)
    stripes[:, ::4] = 255
    Image.fromarray(stripes).save(folder / "stripes.png")

    paths = list(map(str, names))
    for name, place in (("stripes", 0), ("torn", 10), ("copy", 20), ("near", 44 - 1)):
        paths.insert(place, str(folder / f"{name}.png"))
    return paths, {Path(path).stem: i for i, path in enumerate(paths)}


@pytest.fixture(scope="session")
def audited(odd_folder: tuple[list[str], dict[str, int]], look: dict[str, Any]) -> Scores:
    return audit(odd_folder[0], **look)


Odd = tuple[list[str], dict[str, int]]


def test_audit_is_a_name_of_the_package() -> None:
    assert featdiff.audit is audit


def test_rows_are_those_of_a_score_with_three_more_columns(audited: Scores, odd_folder: Odd) -> None:
    paths, _ = odd_folder
    assert audited.path == paths
    assert len(audited) == 44
    assert audited.columns == ["path", "status", "reason", "ood_score", "p_value", "is_ood", *EXTRA]
    assert audited.layers == {}
    assert audited.fpr == 0.05
    assert audited[4].extra == {name: audited.extra[name][4] for name in EXTRA}


def test_an_odd_image_comes_first(audited: Scores, odd_folder: Odd) -> None:
    _, places = odd_folder
    first = audited.sorted()[0]
    assert Path(first.path).stem == "stripes"
    assert first.p_value == pytest.approx(1 / 43)
    assert first.is_ood
    assert np.nanargmax(audited.ood_score) == places["stripes"]


def test_what_is_unlike_all_others_stands_apart(look: dict[str, Any]) -> None:
    pictures = np.random.default_rng(0).integers(100, 156, (60, 32, 32, 3), dtype=np.uint8)
    pictures[7] = 255 * (np.arange(32) % 8 < 4)[:, None, None]
    scores = audit(pictures, **look)
    assert scores.ood_score[7] > 2 * STANDS_APART
    assert (scores.ood_score > STANDS_APART).sum() <= 3
    assert scores.sorted()[0].path == "array[0][7]"


def test_p_values_are_ranks_of_the_images_themselves(audited: Scores) -> None:
    scores = audited.ood_score
    ok = np.isfinite(scores)
    expected = [np.mean(scores[ok] >= score) for score in scores[ok]]
    np.testing.assert_allclose(audited.p_value[ok], expected, rtol=1e-12)
    assert audited.p_value[ok].max() == 1
    assert audited.p_value[ok].min() == 1 / 43
    assert np.array_equal(audited.is_ood[ok], audited.p_value[ok] <= 0.05)
    assert audited.is_ood.sum() == 2  # 2 of 43, for a twentieth
    assert abs(np.median(scores[ok])) < 0.1


def test_unreadable_images_have_a_row_and_a_reason(audited: Scores, odd_folder: Odd) -> None:
    row = audited[odd_folder[1]["torn"]]
    assert (row.status, row.is_ood) == ("unreadable", False)
    assert row.reason
    assert np.isnan(row.ood_score) and np.isnan(row.p_value)
    assert row.extra == {"group": "", "nearest": "", "duplicate_of": ""}
    assert audited.status.count("unreadable") == 1
    assert Path(audited.sorted()[43].path).stem == "torn"


def test_copies_name_the_first_of_them_and_score_alike(audited: Scores, odd_folder: Odd) -> None:
    paths, places = odd_folder
    copy, original = places["copy"], places["05"]
    assert original < copy
    assert audited[copy].extra["duplicate_of"] == paths[original]
    assert audited[original].extra["duplicate_of"] == ""
    assert audited.ood_score[copy] == audited.ood_score[original]
    assert audited.extra["group"][copy] == audited.extra["group"][original] != ""
    assert sum(map(bool, audited.extra["duplicate_of"])) == 1


def test_near_copies_have_one_group_and_are_not_each_others_nearest(audited: Scores, odd_folder: Odd) -> None:
    paths, places = odd_folder
    near, original = places["near"], places["03"]
    group = audited.extra["group"][near]
    assert group == audited.extra["group"][original] != ""
    assert audited.extra["nearest"][near] not in ("", paths[original], paths[near])
    for row in audited:
        if row.status != "ok":
            continue
        other = audited[paths.index(row.extra["nearest"])]
        assert row.extra["group"] == "" or other.extra["group"] != row.extra["group"]


def test_groups_are_numbered_in_order(audited: Scores) -> None:
    numbers = [int(text) for text in audited.extra["group"] if text]
    firsts = list(dict.fromkeys(numbers))
    assert firsts == list(range(1, len(firsts) + 1))
    assert len(numbers) >= 4
    assert min(np.bincount(numbers)[1:]) >= 2


def test_groups_may_be_given(odd_folder: Odd, look: dict[str, Any]) -> None:
    paths, places = odd_folder
    none = audit(paths, groups="none", **look)
    copies = {places["copy"], places["05"]}
    assert {i for i, group in enumerate(none.extra["group"]) if group} == copies
    assert none.extra["nearest"][places["near"]] == paths[places["03"]]  # each other's nearest, as none are left out
    assert none.extra["nearest"][places["03"]] == paths[places["near"]]

    labels = [f"part {i // 11}" for i in range(44)]
    given = audit(paths, groups=labels, **look)
    parts: dict[str, set[str]] = {}
    for label, group in zip(labels, given.extra["group"], strict=True):
        parts.setdefault(label, set()).add(group)
    # the copy joins the first two; the unreadable one has no group
    assert parts == {"part 0": {"1", ""}, "part 1": {"1"}, "part 2": {"2"}, "part 3": {"3"}}
    for i, nearest in enumerate(given.extra["nearest"]):
        if nearest:
            assert given.extra["group"][paths.index(nearest)] != given.extra["group"][i]
    by_name = audit(paths, groups=r"(\w)\w*\.png", **look)
    assert len(by_name.extra["group"]) == 44
    by_array = audit(paths, groups=np.array(labels), **look)
    np.testing.assert_array_equal(by_array.ood_score, given.ood_score)


def test_the_order_of_the_images_does_not_matter(audited: Scores, odd_folder: Odd, look: dict[str, Any]) -> None:
    paths, _ = odd_folder
    other = audit(paths[::-1], **look)
    assert other.path == paths[::-1]
    np.testing.assert_allclose(other.ood_score[::-1], audited.ood_score, atol=1e-4)


def test_the_share_that_is_marked(odd_folder: Odd, look: dict[str, Any]) -> None:
    assert audit(odd_folder[0], fpr=0.2, **look).is_ood.sum() == 8  # of 43
    with pytest.raises(UsageError, match="^fpr 0.01 needs at least 99 other images") as caught:
        audit(odd_folder[0], fpr=0.01, **look)
    assert caught.value.argument == "fpr"


@pytest.mark.parametrize("count", [1, 5, FEWEST - 1])
def test_fewer_than_20_different_images_are_refused(odd_folder: Odd, look: dict[str, Any], count: int) -> None:
    given = [path for path in odd_folder[0] if Path(path).stem.isdigit()][:count]
    torn = [path for path in odd_folder[0] if Path(path).stem == "torn"]
    with pytest.raises(UsageError, match=rf"needs at least 20 different ones that can be read, not {count}$"):
        audit(given + torn, **look)


def test_20_images_are_enough(odd_folder: Odd, look: dict[str, Any]) -> None:
    given = [path for path in odd_folder[0] if Path(path).stem.isdigit()][:FEWEST]
    scores = audit(given, **look)
    assert scores.is_ood.sum() == 1
    assert np.isfinite(scores.ood_score).all()


def test_arguments_are_checked_before_any_work(odd_folder: Odd, look: dict[str, Any]) -> None:
    def no_work(*_: object) -> None:
        pytest.fail("nothing should be read")

    for arguments, words in (
        ({"groups": "no brackets"}, "has no brackets"),
        ({"fpr": 0}, "must lie between 0 and 1"),
        ({"backbon": "x"}, "backbon"),
    ):
        with pytest.raises((UsageError, TypeError), match=words):
            audit(odd_folder[0], progress=no_work, **look | arguments)


def test_features_come_from_the_cache(odd_folder: Odd, look: dict[str, Any], tmp_path: Path) -> None:
    calls: list[str] = []
    for _ in range(2):
        audit(odd_folder[0], progress=lambda stage, *_: calls.append(stage), cache=tmp_path, **look)
    assert set(calls) == {"features"}
    assert list(tmp_path.glob("features/*/*.npy"))


def test_digits_among_tiles_are_odd(sample_folders: dict[str, Path]) -> None:
    """With the embedded backbone: images that a detector trained on all of them would find ordinary."""
    tiles = sorted(sample_folders["train"].iterdir())[::4][:90]
    digits = sorted(sample_folders["digits"].iterdir())[::20][:8]
    given = [str(file) for file in (*tiles[:30], *digits, *tiles[30:])]
    scores = audit(given)
    top = [Path(row.path).parent.name for row in scores.sorted()[:8]]
    assert top.count("digits") >= 6
    is_digit = np.array([Path(path).parent.name == "digits" for path in scores.path])
    assert auroc(scores.ood_score[~is_digit], scores.ood_score[is_digit]) > 0.98


def test_what_it_looks_with_is_that_of_a_detector() -> None:
    with pytest.raises(UsageError):
        audit([], backbone="resnet_of_nobody")
    assert Detector().settings.view == "whole"
