"""Images that were in training are recognised when they are scored, and need not meet themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result

from featdiff import Detector
from featdiff.exceptions import KnownImages
from featdiff.scores.nearest import NearestNeighbors


def test_training_images_are_known_and_a_warning_names_the_audit(
    tiny_detector: Detector, sample_folders: dict[str, Path]
) -> None:
    with pytest.warns(KnownImages, match=r"292 of 390 images were in training.*featdiff\.audit"):
        scores = tiny_detector.score(sample_folders["train"])
    assert scores.known is not None
    assert scores.known.sum() == len(tiny_detector.bank_digests_)
    assert not any("known" in column for column in scores.columns)  # it is not written to files


def test_without_themselves_training_images_are_farther_from_their_neighbours(
    tiny_detector: Detector, sample_folders: dict[str, Path]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KnownImages)
        together = tiny_detector.score(sample_folders["train"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", KnownImages)
        apart = tiny_detector.score(sample_folders["train"], exclude_known=True)

    assert together.known is not None
    known = together.known
    assert (apart.ood_score[known] > together.ood_score[known]).all()
    np.testing.assert_array_equal(apart.ood_score[~known], together.ood_score[~known])


def test_new_images_are_not_known_and_score_the_same_either_way(
    tiny_detector: Detector, sample_folders: dict[str, Path]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", KnownImages)
        scores = tiny_detector.score(sample_folders["digits"])
        apart = tiny_detector.score(sample_folders["digits"], exclude_known=True)
    assert scores.known is not None
    assert not scores.known.any()
    np.testing.assert_allclose(apart.ood_score, scores.ood_score, rtol=1e-5)


def test_a_neighbour_score_leaves_out_the_row_that_it_is_told(tiny_detector: Detector) -> None:
    (score, *_) = (member for member in tiny_detector.heads_.members if isinstance(member, NearestNeighbors))
    store = tiny_detector.feature_store()
    features = store.table([digest.tobytes() for digest in tiny_detector.bank_digests_])[:]

    own = torch.arange(len(features))
    bank = score.vectors.float() * score.scales
    distances = torch.cdist(score.view(features), bank, compute_mode="donot_use_mm_for_euclid_dist")
    distances[own, own] = torch.inf
    expected = distances.topk(score.k, largest=False).values.log().mean(1).exp()
    torch.testing.assert_close(score.without(features, own), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(score.without(features, torch.full_like(own, -1)), score(features))


def test_the_command_says_how_many_were_in_training(
    featdiff_cli: Callable[..., Result], tiny_model: Path, sample_folders: dict[str, Path], seeded_backbone: Path
) -> None:
    arguments = ["score", sample_folders["train"], "-m", tiny_model, "--weights", seeded_backbone]
    told = featdiff_cli(*arguments)
    assert told.exit_code == 0
    assert "WARNING: 292 of these images were in training" in told.stderr
    assert "featdiff audit" in told.stderr

    assert "WARNING" not in featdiff_cli(*arguments, "--exclude-known").stderr
