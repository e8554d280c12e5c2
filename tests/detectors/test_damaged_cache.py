"""A cache whose bits have flipped: said in a warning, computed again, and the scores are those of a whole cache."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featdiff import Detector
from featdiff.exceptions import DamagedCache
from featdiff.features import store
from featdiff.runtime import checkpoints


@pytest.fixture(scope="module")
def whole(small: dict[str, Any], files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a finished fit: one shard, and the result of a training."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    Detector(**small, cache=folder).fit(files)
    return folder


def flip(file: Path, share: float) -> None:
    """Flip one bit, that far into the file."""
    data = bytearray(file.read_bytes())
    place = round(share * (len(data) - 1))
    data[place] ^= 1 << place % 8
    file.write_bytes(data)


def only(folder: Path, pattern: str) -> Path:
    (file,) = folder.rglob(pattern)
    return file


@pytest.mark.parametrize("pattern", ["*.vectors.npy", "*.digests", "training-*.pt"])
@pytest.mark.parametrize("share", [0, 0.003, 0.1, 0.35, 0.5, 0.8, 0.99, 1])
def test_scores_do_not_depend_on_a_damaged_cache(
    pattern: str,
    share: float,
    whole: Path,
    fitted: Detector,
    small: dict[str, Any],
    files: list[str],
    fresh: list[str],
    tmp_path: Path,
) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    file = only(tmp_path / "cache", pattern)
    flip(file, share)
    with pytest.warns(DamagedCache, match=file.name) as caught:
        detector = Detector(**small, cache=tmp_path / "cache").fit(files)
    assert len(caught) == 1
    np.testing.assert_array_equal(detector.calibration_.scores, fitted.calibration_.scores)
    np.testing.assert_array_equal(detector.score(fresh).ood_score, fitted.score(fresh).ood_score)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        again = Detector(**small, cache=tmp_path / "cache").fit(files)
    np.testing.assert_array_equal(again.calibration_.scores, fitted.calibration_.scores)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 1])
def test_damaged_checkpoint_of_a_stopped_training(
    share: float,
    fitted: Detector,
    small: dict[str, Any],
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", -1)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "training" and done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Detector(**small, cache=tmp_path).fit(files, stop)
    flip(only(tmp_path, "training-*.pt"), share)
    with pytest.warns(DamagedCache, match="training starts anew"):
        detector = Detector(**small, cache=tmp_path).fit(files)
    np.testing.assert_array_equal(detector.calibration_.scores, fitted.calibration_.scores)


def test_one_damaged_shard_of_several(
    fitted: Detector, small: dict[str, Any], files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its own images go through the backbone again."""
    monkeypatch.setattr(store, "_SHARD_BYTES", 8 * 4 * fitted.extractor_.width)
    arguments = {**small, "image_batch": 8, "cache": tmp_path}
    first = Detector(**arguments).fit(files)
    shards = sorted(tmp_path.rglob("*.vectors.npy"))
    assert len(shards) == 5
    flip(shards[2], 0.7)

    with pytest.warns(DamagedCache, match=shards[2].name):
        again = Detector(**arguments).fit(files)
    assert set(shards) - set(tmp_path.rglob("*.vectors.npy")) == {shards[2]}
    np.testing.assert_array_equal(again.calibration_.scores, first.calibration_.scores)
