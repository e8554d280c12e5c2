"""The joining room: fit, score, verdict, and what must never change a score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from featdiff import Detector


def test_scores_do_not_depend_on_batch_or_order(tiny_detector: Detector, tiny_model: Path, sample_folders: dict[str, Path]) -> None:
    files = [str(file) for file in sorted(sample_folders["test"].iterdir())]
    reference = dict(zip(files, tiny_detector.score(files).ood_score, strict=True))
    spread = np.std(list(reference.values()))
    shuffled = list(np.random.default_rng(0).permutation(files))
    for size in (1, 7, 64):
        detector = Detector.from_pretrained(tiny_model, image_batch=size)
        scores = dict(zip(shuffled, detector.score(shuffled).ood_score, strict=True))
        assert max(abs(scores[file] - reference[file]) for file in files) < 1e-4 * spread


def test_digits_are_flagged_and_tiles_are_not(tiny_detector: Detector, sample_folders: dict[str, Path]) -> None:
    assert tiny_detector.score(sample_folders["digits"]).is_ood.mean() > 0.9
    assert tiny_detector.score(sample_folders["test"]).is_ood.mean() < 0.2


def test_unfitted_detector_says_so(sample_folders: dict[str, Path]) -> None:
    from featdiff.exceptions import NotFittedError

    with pytest.raises(NotFittedError, match="fit"):
        Detector().score(sample_folders["test"])
