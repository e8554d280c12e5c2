"""Which of its scores is the detector's own, and how they are joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_detectors import pictures

from featdiff import Detector
from featdiff.features.layout import block_normalise


@pytest.mark.parametrize("head", ["fused", "layerwise", "mse", "mfsim", "lr"])
@pytest.mark.parametrize("joint", [False, True])
def test_every_head_can_be_the_score(
    small: dict[str, Any], files: list[str], fresh: list[str], tmp_path: Path, head: str, joint: bool
) -> None:
    detector = Detector(**small, head=head, joint=joint).fit(files)
    detector.save_pretrained(tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model")
    scores = loaded.score(fresh)
    np.testing.assert_array_equal(scores.ood_score, detector.score(fresh).ood_score)
    assert np.isfinite(scores.ood_score).all()
    assert len(set(scores.ood_score)) == 20
    pixels = torch.stack([detector.extractor_.transform(picture) for picture in pictures(fresh)])
    heads = detector.all_heads(detector.extractor_(pixels))
    named = {"layerwise", "mse", "mfsim", "lr", "layer_layer1", "layer_layer2"}
    neighbours = {"neighbors"} if head == "fused" else set()  # diffusion alone keeps no bank
    assert set(heads) == (named | neighbours) - {head} | {"featdiff"}
    np.testing.assert_allclose(heads["featdiff"], scores.ood_score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["mahalanobis", "mahalanobis_all", "pca"])
def test_every_registered_head_can_be_the_score(
    small: dict[str, Any], files: list[str], fresh: list[str], tmp_path: Path, head: str
) -> None:
    detector = Detector(**small, head=head).fit(files)
    detector.save_pretrained(tmp_path / "model")
    scores = Detector.from_pretrained(tmp_path / "model").score(fresh).ood_score
    np.testing.assert_array_equal(scores, detector.score(fresh).ood_score)
    assert len(set(scores)) == 20 and np.isfinite(scores).all()

    features = detector.features(fresh)[1][:]
    own = detector.heads_.unscaled(features)[:, 0]
    (member,) = detector.heads_.members
    np.testing.assert_allclose(own, member(features), rtol=1e-4, atol=1e-5)


def test_further_heads_join_the_fused_score(small: dict[str, Any], files: list[str], fresh: list[str]) -> None:
    detector = Detector(**small, extra_heads=["pca"]).fit(files)
    assert [score.name for score in detector.heads_.members] == ["neighbors", "pca"]
    features = detector.features(fresh)[1][:]
    z = [detector.all_heads(features)[name] for name in ("layerwise", "neighbors", "pca")]
    logs = np.stack([z[0], np.log(z[1]), np.log(z[2])], 1)
    z_scores = (logs - detector.heads_.mean.numpy()) / detector.heads_.deviation.numpy()
    weights = np.array([1, 4 / 3, 1])
    expected = z_scores @ weights / np.linalg.norm(weights)
    np.testing.assert_allclose(detector.heads_.unscaled(features)[:, 0], expected, rtol=1e-3, atol=1e-3)


def test_mse_head_is_the_mean_squared_error_of_the_averaged_reconstruction(
    small: dict[str, Any], files: list[str], fresh: list[str]
) -> None:
    """Computed again by hand from the denoiser, the schedule and the stored noise."""
    detector = Detector(**small, head="mse").fit(files)
    extractor, heads = detector.extractor_, detector.heads_.diffusion
    pixels = torch.stack([extractor.transform(picture) for picture in pictures(fresh)])
    x = block_normalise(extractor(pixels)[:, :80], [part.width for part in extractor.layout.stages])
    kept = heads.scheduler.alphas_cumprod
    errors = []
    with torch.inference_mode():
        for start, draws in zip((70, 95), heads.noise, strict=True):
            t = torch.full((len(x),), start)
            noisy = [kept[start].sqrt() * x + (1 - kept[start]).sqrt() * draw for draw in draws]
            mean = torch.stack([heads.denoiser(x_t, t) for x_t in noisy]).mean(0)
            errors.append((x - mean).square().mean(1))
    expected = torch.stack(errors).mean(0).numpy()
    np.testing.assert_allclose(detector.heads_.unscaled(extractor(pixels))[:, 0], expected, rtol=1e-4)
    location, scale = (float(values[0]) for values in (detector.heads_.location, detector.heads_.scale))
    np.testing.assert_allclose(detector.score(fresh).ood_score, (expected - location) / scale, rtol=1e-3, atol=1e-3)


def test_joint_is_one_network_over_all_layers(small: dict[str, Any], files: list[str]) -> None:
    names = list(Detector(**small, joint=True).fit(files).heads_.state_dict())
    assert "diffusion.denoiser.project_in.weight" in names
    assert not any(name.startswith("diffusion.denoiser.layers.") for name in names)


def test_several_steps_and_other_times_work(small: dict[str, Any], files: list[str], fresh: list[str]) -> None:
    one = Detector(**small, start_times=(9,), draws=1).fit(files).score(fresh)
    many = Detector(**small, start_times=(9,), draws=1, stride=3).fit(files).score(fresh)
    assert np.isfinite(many.ood_score).all()
    assert not np.allclose(one.ood_score, many.ood_score, rtol=1e-3)
