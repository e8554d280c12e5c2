"""The score of places: what it learns from maps of normal pictures, and what it makes of a small defect."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from featdiff.scores import local as local_score
from featdiff.scores.joint import Joint
from featdiff.scores.local import Local, worst

CHANNELS = (12, 20)


def normal_maps(count: int, seed: int, size: tuple[int, int] = (8, 6)) -> list[Tensor]:
    """Maps of a fine and a coarse layer that follow from three smooth causes, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.Generator().manual_seed(99)
    causes = torch.randn(count, 3, 4, 3, generator=generator)
    maps = []
    for channels, (height, width) in zip(CHANNELS, (size, (size[0] // 2, size[1] // 2)), strict=True):
        mix = torch.randn(channels, 3, generator=mixing)
        grown = torch.nn.functional.interpolate(causes, (height, width), mode="bilinear")
        clean = torch.einsum("cd,bdhw->bchw", mix, grown)
        maps.append(clean + 0.1 * torch.randn(clean.shape, generator=generator))
    return maps


def with_defect(maps: list[Tensor], row: int, column: int) -> list[Tensor]:
    """One place of the fine map, and the one of the coarse map that covers it, as no normal picture has them."""
    fine, coarse = (values.clone() for values in maps)
    fine[:, ::2, row, column] += 4
    coarse[:, ::2, row // 2, column // 2] += 2
    return [fine, coarse]


@pytest.fixture(scope="module")
def local() -> Local:
    found = Local(CHANNELS, seed=0)
    maps = normal_maps(60, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_score, "RECIPE", replace(local_score.RECIPE, min_steps=1000, max_steps=1000))  # all steps
        found.fit(found.sample(maps, 32, range(60)))
    found.fit_statistics(list(found.errors(normal_maps(40, seed=1))))
    return found


def test_the_worst_places_make_the_score() -> None:
    heat = torch.arange(100.0).reshape(1, 10, 10)
    assert worst(heat, 0.03).item() == pytest.approx((99 + 98 + 97) / 3)
    assert worst(heat, 0.025).item() == pytest.approx((99 + 98 + 0.5 * 97) / 2.5)
    assert worst(heat[:, :2, :2], 0.03).item() == 11.0  # at least one place


def test_a_defect_is_the_hottest_place_and_raises_the_score(local: Local) -> None:
    maps = normal_maps(20, seed=2)
    ordinary, _ = local(maps)
    score, heat = local(with_defect(maps, row=5, column=1))
    assert heat.shape == (20, 8, 6)
    assert torch.equal(score, worst(heat))

    places = heat.flatten(1).argmax(1)
    distance = torch.maximum((places // 6 - 5).abs(), (places % 6 - 1).abs())
    assert (distance <= 1).sum() >= 15  # by chance it would be 3 of 20
    assert (score > ordinary).sum() >= 18
    assert (score[:, None] > ordinary).float().mean() >= 0.85  # of all pairs


def test_heat_of_normal_pictures_is_about_0_with_deviation_1(local: Local) -> None:
    views = local.errors(normal_maps(200, seed=3))
    size = views.shape[2:]
    mean = torch.nn.functional.interpolate(local.mean[None], size, mode="bilinear")
    deviation = torch.nn.functional.interpolate(local.deviation[None], size, mode="bilinear")
    z = (views - mean) / deviation
    assert z.mean().abs() < 0.2
    assert 0.7 < z.std() < 1.3
    assert torch.equal(local(normal_maps(200, seed=3))[1], z.amax(1))


def test_statistics_of_older_and_further_pictures_are_those_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = torch.randn(80, 2, 16, 16, generator=generator) * (1 + torch.rand(2, 16, 16, generator=generator))
    errors[50:] += 0.5
    older, further, every = Local(CHANNELS), Local(CHANNELS), Local(CHANNELS)
    older.fit_statistics(list(errors[:50]))
    every.fit_statistics(list(errors))
    same = [(values, values) for values in errors[:3]]
    further.fit_statistics_further(older, same, list(errors[50:]), share=30 / 80)
    assert torch.allclose(further.mean, every.mean, atol=1e-5)
    assert torch.allclose(further.deviation, every.deviation, atol=1e-5)

    moved = [(values, values + 0.3) for values in errors[:3]]
    further.fit_statistics_further(older, moved, list(errors[50:] + 0.3), share=30 / 80)
    assert torch.allclose(further.mean, every.mean + 0.3, atol=1e-5)
    assert torch.allclose(further.deviation, every.deviation, atol=1e-5)


def test_contrast_does_not_see_gain_and_offset(local: Local) -> None:
    maps = normal_maps(4, seed=4)
    changed = [3 * values + 7 for values in maps]
    raw, contrast = local.views
    for before, after in zip(contrast.prepare(maps), contrast.prepare(changed), strict=True):
        assert torch.allclose(before, after, atol=1e-4)
    assert not torch.allclose(raw.prepare(maps)[0], raw.prepare(changed)[0])
    even = contrast.prepare([torch.full((1, 12, 8, 6), 5.0)])[0]
    assert even.abs().max() == 0


def test_a_score_does_not_depend_on_the_batch_and_takes_other_sizes(local: Local) -> None:
    maps = normal_maps(6, seed=5)
    alone = torch.cat([local([values[i : i + 1] for values in maps])[0] for i in range(6)])
    assert torch.allclose(alone, local(maps)[0], atol=1e-4)
    score, heat = local(normal_maps(2, seed=5, size=(12, 10)))
    assert (score.shape, heat.shape) == ((2,), (2, 12, 10))


def test_places_of_an_image_follow_from_its_seed_alone(local: Local) -> None:
    maps = normal_maps(3, seed=6)
    together = local.sample(maps, 5, [10, 11, 12])
    alone = local.sample([values[1:2] for values in maps], 5, [11])
    for view in range(2):
        for layer, channels in enumerate(CHANNELS):
            assert together[view][layer].shape == (15, channels)
            assert torch.equal(together[view][layer][5:10], alone[view][layer])
    assert len(local.sample(maps, 1000, [0, 1, 2])[0][0]) == 3 * 48  # all places, if fewer are there


def test_the_joint_score_adds_what_either_has_above_the_usual() -> None:
    rng = np.random.default_rng(0)
    whole, places = 5 + 2 * rng.standard_normal(500), -3 + 0.1 * rng.standard_normal(500)
    joint = Joint(Local(CHANNELS))
    joint.fit(whole, places)

    score, parts = joint(torch.from_numpy(whole).float(), torch.from_numpy(places).float())
    assert parts.shape == (500, 2)
    assert parts.mean(0).abs().max() < 1e-4 and (parts.std(0) - 1).abs().max() < 0.01
    assert score.mean().abs() < 1e-4 and score.std() == pytest.approx(1, abs=0.01)
    excess = parts.exp().log1p().sum(1)
    assert torch.equal(score.argsort(), excess.argsort())
    assert torch.allclose(score, (excess - excess.mean()) / excess.std(correction=0), atol=1e-4)

    only_local, _ = joint(torch.tensor([5.0]), torch.tensor([-2.0]))
    only_global, _ = joint(torch.tensor([25.0]), torch.tensor([-3.0]))
    assert only_local.item() > score.max() and only_global.item() > score.max()

    # a part below the usual takes hardly anything away, and two that are strange count for more than one
    ordinary, _ = joint(torch.tensor([-15.0]), torch.tensor([-2.0]))
    both, _ = joint(torch.tensor([25.0]), torch.tensor([-2.0]))
    assert 0 < only_local.item() - ordinary.item() < 1
    assert both.item() > max(only_local.item(), only_global.item()) + 4
