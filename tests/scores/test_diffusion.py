"""The fitted middle: four heads from the same reconstructions, and what a saved detector holds of it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featdiff.diffusion.lfdn import LFDN, LayerwiseLFDN
from featdiff.diffusion.reconstruction import reconstruct
from featdiff.diffusion.schedules import draw_noise
from featdiff.features.layout import block_normalise
from featdiff.scores.diffusion import DIFFUSION, DiffusionHeads

WIDTHS = (6, 20, 10)
ENDS = ((0, 6), (6, 26), (26, 36))
SETTINGS: dict[str, Any] = {
    "joint": False,
    "hidden_ratio": 2.0,
    "hidden_max": 32,
    "blocks": 1,
    "timesteps": 100,
    "start_times": (20, 60, 95),
    "draws": 2,
    "stride": None,
    "seed": 0,
}


def features(rows: int, seed: int = 0) -> Tensor:
    """Like pooled features: positive, each layer on its own scale."""
    source = torch.Generator().manual_seed(seed)
    scale = torch.cat([torch.full((6,), 0.01), torch.full((20,), 1.0), torch.full((10,), 300.0)])
    return torch.rand(rows, 36, generator=source) * scale


def make(fitted: bool = True, **changes: Any) -> DiffusionHeads:
    """Heads whose two networks have seeded random weights, as if trained, and whose statistics are set."""
    heads = DiffusionHeads(WIDTHS, **(SETTINGS | changes))
    source = torch.Generator().manual_seed(1)
    for parameter in heads.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=source))
    if fitted:
        heads.fit_statistics(features(64, seed=9))
    return heads


def layer_mse(x: np.ndarray, x_hat: np.ndarray) -> np.ndarray:
    return np.stack([np.mean((x[:, i:j] - x_hat[:, i:j]) ** 2, axis=1) for i, j in ENDS], axis=1)


# ---- construction ----


@pytest.mark.parametrize("joint", [False, True])
def test_kind_and_size_of_the_network(joint: bool) -> None:
    heads = DiffusionHeads(WIDTHS, **(SETTINGS | {"joint": joint, "hidden_max": 48, "blocks": 2}))
    for network in (heads.denoiser, heads.early):
        assert isinstance(network, LFDN if joint else LayerwiseLFDN)
    if joint:
        assert heads.denoiser.config.width == 36
        assert heads.denoiser.config.hidden == 48
        assert heads.denoiser.config.blocks == 2
    else:
        assert [layer.config.width for layer in heads.denoiser.layers] == [6, 20, 10]
        assert [layer.config.hidden for layer in heads.denoiser.layers] == [48, 48, 48]


def test_new_heads_are_frozen_and_in_evaluation_mode() -> None:
    heads = DiffusionHeads(WIDTHS, **SETTINGS)
    assert not any(parameter.requires_grad for parameter in heads.parameters())
    assert not any(module.training for module in heads.modules())


def test_stored_noise_is_drawn_from_the_seed() -> None:
    heads = DiffusionHeads(WIDTHS, **(SETTINGS | {"seed": 5, "draws": 4}))
    assert heads.noise.shape == (3, 4, 36)
    assert torch.equal(heads.noise.flatten(0, 1), draw_noise(12, 36, seed=5))
    assert torch.equal(heads.noise.mean(1), torch.zeros(3, 36))  # pairs of opposite sign at every start time


@pytest.mark.parametrize("draws", [1, 3])
def test_odd_numbers_of_draws_work(draws: int) -> None:
    heads = make(draws=draws)
    assert heads.noise.shape == (3, draws, 36)
    assert all(torch.isfinite(values).all() for values in heads(features(4))[0].values())


def test_same_seed_same_module_other_seed_another() -> None:
    first, again, other = (DiffusionHeads(WIDTHS, **(SETTINGS | {"seed": seed})).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["noise"], other["noise"])
    name = "denoiser.layers.0.project_in.weight"
    assert not torch.equal(first[name], other[name])


def test_building_leaves_the_global_random_states_untouched() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    make()(features(3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_building_leaves_the_random_state_of_the_gpu_untouched() -> None:
    torch.cuda.manual_seed(123)
    before = torch.cuda.get_rng_state()
    DiffusionHeads(WIDTHS, **SETTINGS)
    assert torch.equal(torch.cuda.get_rng_state(), before)


# ---- the four heads ----


def test_reconstructions_are_means_over_the_stored_draws() -> None:
    heads = make(draws=4)
    x = heads.normalised(features(5))
    found = heads.reconstructions(heads.denoiser, x)
    assert len(found) == 3
    for x_hat, start, draws in zip(found, (20, 60, 95), heads.noise, strict=True):
        each = [reconstruct(heads.denoiser, heads.scheduler, x, draw[None], start)[:, 0] for draw in draws]
        torch.testing.assert_close(x_hat, torch.stack(each).mean(0), rtol=1e-4, atol=1e-5)


def test_stride_is_handed_on() -> None:
    heads = make(stride=5)
    x = heads.normalised(features(5))
    expected = reconstruct(heads.denoiser, heads.scheduler, x, heads.noise[1], 60, stride=5).mean(1)
    torch.testing.assert_close(heads.reconstructions(heads.denoiser, x)[1], expected)
    assert not torch.allclose(expected, make().reconstructions(make().denoiser, x)[1], atol=1e-3)


def test_every_head_follows_its_formula() -> None:
    """All from the reconstructions, in NumPy."""
    heads = make()
    raw = features(7)
    x_tensor = heads.normalised(raw)
    torch.testing.assert_close(x_tensor, block_normalise(raw, WIDTHS))
    x = x_tensor.double().numpy()
    late = [part.double().numpy() for part in heads.reconstructions(heads.denoiser, x_tensor)]
    early = [part.double().numpy() for part in heads.reconstructions(heads.early, x_tensor)]
    errors = np.stack([layer_mse(x, part) for part in late], axis=1)  # (B, T, L)
    channels = np.array(WIDTHS)

    z = (np.log(errors) - heads.mean.double().numpy()) / heads.deviation.double().numpy()
    by_layer = z.mean(1)
    cosines = np.array(
        [
            [
                np.sum(x[:, i:j] * part[:, i:j], 1)
                / np.linalg.norm(x[:, i:j], axis=1)
                / np.linalg.norm(part[:, i:j], axis=1)
                for i, j in ENDS
            ]
            for part in late
        ]
    )
    whole_late = np.stack([np.mean((x - part) ** 2, axis=1) for part in late])
    whole_early = np.stack([np.mean((x - part) ** 2, axis=1) for part in early])
    expected = {
        "layerwise": by_layer @ channels**0.75 / np.linalg.norm(channels**0.75),
        "mse": whole_late.mean(0),
        "mfsim": 1 - cosines.mean((0, 1)),
        "lr": (whole_late - whole_early).mean(0),
    }

    scores, layers = heads(raw)
    assert tuple(scores) == DIFFUSION
    np.testing.assert_allclose(layers.numpy(), by_layer, rtol=2e-3, atol=2e-3)
    for name in DIFFUSION:
        assert scores[name].shape == (7,)
        np.testing.assert_allclose(scores[name].numpy(), expected[name], rtol=2e-3, atol=2e-3, err_msg=name)
        assert np.std(expected[name]) > 0.01  # the comparison above is not one of constants


def test_statistics_make_in_domain_log_errors_standard() -> None:
    heads, held_out = make(fitted=False), features(3000, seed=9)
    assert torch.equal(heads.mean, torch.zeros(3, 3))
    assert torch.equal(heads.deviation, torch.ones(3, 3))
    heads.fit_statistics(held_out)
    z = (heads.errors(heads.normalised(held_out)).log() - heads.mean) / heads.deviation
    torch.testing.assert_close(z.mean(0), torch.zeros(3, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(3, 3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("names", [("layerwise",), ("mse",), ("mfsim",), ("lr",), ("mse", "lr"), ()])
def test_only_what_is_asked_for_comes_and_is_the_same(names: tuple[str, ...]) -> None:
    heads = make()
    everything, all_layers = heads(features(4))
    some, layers = heads(features(4), names)
    assert set(some) == set(names)
    assert torch.equal(layers, all_layers)
    assert all(torch.equal(some[name], everything[name]) for name in names)


def test_only_likelihood_regret_uses_the_early_network() -> None:
    heads = make()
    before, _ = heads(features(4))
    calls: list[int] = []
    heads.early.register_forward_hook(lambda *_: calls.append(1))
    heads(features(4), ("layerwise", "mse", "mfsim"))
    assert not calls
    heads(features(4), ("lr",))
    assert len(calls) == 1  # all start times in one pass
    for parameter in heads.early.parameters():
        parameter.mul_(0.5)
    after, _ = heads(features(4))
    assert [name for name in DIFFUSION if not torch.equal(before[name], after[name])] == ["lr"]


def test_likelihood_regret_is_zero_when_training_changed_nothing() -> None:
    heads = make()
    heads.early.load_state_dict(heads.denoiser.state_dict())
    assert torch.equal(heads(features(4))[0]["lr"], torch.zeros(4))


# ---- what must not change a score ----


@pytest.mark.parametrize(("joint", "stride"), [(False, None), (True, None), (True, 20)])
def test_a_row_does_not_depend_on_its_batch(joint: bool, stride: int | None) -> None:
    heads, rows = make(joint=joint, stride=stride), features(16)
    together, layers = heads(rows)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    for size in (1, 7):
        parts = [heads(part) for part in rows[order].split(size)]
        found = {name: torch.cat([scores[name] for scores, _ in parts]) for name in DIFFUSION}
        for name in DIFFUSION:
            spread = together[name].std()
            assert (found[name] - together[name][order]).abs().max() < 1e-4 * spread, (name, size)
        assert (torch.cat([part for _, part in parts]) - layers[order]).abs().max() < 1e-3


def test_a_score_does_not_depend_on_the_global_seed_or_on_earlier_calls() -> None:
    heads, rows = make(), features(5)
    torch.manual_seed(1)
    first = heads(rows)[0]
    heads(features(9, seed=4))
    torch.manual_seed(2)
    again = heads(rows)[0]
    assert all(torch.equal(first[name], again[name]) for name in DIFFUSION)


def test_scores_ignore_shift_and_scale_of_a_layer() -> None:
    """Features are normalised for each image and layer."""
    heads, rows = make(), features(5)
    moved = rows.clone()
    moved[:, 6:26] = 7 * moved[:, 6:26] + 3
    first, again = heads(rows)[0], heads(moved)[0]
    for name in DIFFUSION:
        torch.testing.assert_close(again[name], first[name], rtol=1e-3, atol=1e-3)


def test_features_are_left_as_they_are() -> None:
    rows = features(5)
    make()(rows)
    assert torch.equal(rows, features(5))


def test_dead_layers_give_finite_scores() -> None:
    rows = features(3)
    rows[:, :6] = 0.25
    scores, layers = make()(rows)
    assert torch.isfinite(layers).all()
    assert all(torch.isfinite(values).all() for values in scores.values())


@pytest.mark.filterwarnings("ignore:var")
def test_no_rows_give_no_scores() -> None:
    scores, layers = make()(features(0))
    assert layers.shape == (0, 3)
    assert {name: tuple(values.shape) for name, values in scores.items()} == dict.fromkeys(DIFFUSION, (0,))


# ---- state ----


@pytest.mark.parametrize("joint", [False, True])
def test_state_dict_holds_everything_that_decides_a_score(joint: bool) -> None:
    heads = make(joint=joint)
    names = set(heads.state_dict())
    assert {"noise", "mean", "deviation"} < names
    rest = names - {"noise", "mean", "deviation"}
    assert {name.split(".")[0] for name in rest} == {"denoiser", "early"}
    other = DiffusionHeads(WIDTHS, **(SETTINGS | {"joint": joint, "seed": 99}))
    other.load_state_dict(heads.state_dict())
    first, again = heads(features(6))[0], other(features(6))[0]
    assert all(torch.equal(first[name], again[name]) for name in DIFFUSION)


@pytest.mark.parametrize(
    "name", ["noise", "mean", "denoiser.layers.1.project_out.bias", "early.layers.0.norm_out.weight"]
)
def test_state_dict_is_strict(name: str) -> None:
    heads = make()
    lacking = {key: value for key, value in heads.state_dict().items() if key != name}
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        make().load_state_dict(lacking)
    with pytest.raises(RuntimeError, match="Unexpected key.*extra"):
        make().load_state_dict(heads.state_dict() | {"extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        make().load_state_dict(heads.state_dict() | {name: torch.zeros(1, 2, 3, 4)})


def test_joint_state_does_not_fit_layerwise_heads() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        make().load_state_dict(make(joint=True).state_dict())
