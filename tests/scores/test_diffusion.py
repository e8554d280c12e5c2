"""Four scores from the same reconstructions, and what a saved detector holds of the model that they share."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featdiff.diffusion.lfdn import LFDN, LayerwiseLFDN
from featdiff.diffusion.reconstruction import reconstruct
from featdiff.diffusion.schedules import add_noise, draw_noise
from featdiff.diffusion.training import Recipe
from featdiff.exceptions import UsageError
from featdiff.features.layout import FeatureLayout, block_normalise
from featdiff.features.store import Rows
from featdiff.scores import diffusion
from featdiff.scores.diffusion import DIFFUSION, Diffusion
from featdiff.scores.fused import Heads
from featdiff.scores.registry import Context

LAYOUT = FeatureLayout.of_stages({"a": 6, "b": 20, "c": 10})
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


def make(fitted: bool = True, **changes: Any) -> Diffusion:
    """A model whose two networks have seeded random weights, as if trained, and whose statistics are set."""
    model = Diffusion(LAYOUT, **(SETTINGS | changes))
    source = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.copy_((0.2 * torch.randn(parameter.shape, generator=source)).half())
    if fitted:
        model.fit_statistics(model.errors(model.stages(features(64, seed=9))))
    return model


@torch.inference_mode()
def all_scores(model: Diffusion, features: Tensor) -> dict[str, Tensor]:
    """Each of the four scores (B,), by name."""
    return {name: kind(model)(features) for name, kind in DIFFUSION.items()}


def layer_mse(x: np.ndarray, x_hat: np.ndarray) -> np.ndarray:
    return np.stack([np.mean((x[:, i:j] - x_hat[:, i:j]) ** 2, axis=1) for i, j in ENDS], axis=1)


class CountedRows(Rows):
    """Rows in memory that count how many of them were read."""

    read = 0

    def __getitem__(self, indices: np.ndarray | slice) -> Tensor:
        rows = super().__getitem__(indices)
        self.read += len(rows)
        return rows


# ---- fit ----


def test_rows_that_fit_into_memory_are_read_once_and_train_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(epochs=3, batch_size=16, min_steps=1)
    weights, counts = [], []
    for most in (1 << 28, 0):
        monkeypatch.setattr(diffusion, "_MOST_BYTES", most)
        model, training = Diffusion(LAYOUT, **SETTINGS), CountedRows(features(64))
        model.fit(Context(training, Rows(features(20, seed=1)), recipe))
        weights.append(model.denoiser.state_dict())
        counts.append(training.read)
    assert counts == [64, 3 * 64]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-5)


def test_a_finished_training_reads_no_rows(tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=16, min_steps=1)
    for expected in (64, 0):
        training = CountedRows(features(64))
        context = Context(training, Rows(features(20, seed=1)), recipe, checkpoint=tmp_path / "training.pt")
        Diffusion(LAYOUT, **SETTINGS).fit(context)
        assert training.read == expected


# ---- construction ----


@pytest.mark.parametrize("joint", [False, True])
def test_kind_and_size_of_the_network(joint: bool) -> None:
    model = Diffusion(LAYOUT, **(SETTINGS | {"joint": joint, "hidden_max": 48, "blocks": 2}))
    for network in (model.denoiser, model.early):
        assert isinstance(network, LFDN if joint else LayerwiseLFDN)
    if joint:
        assert model.denoiser.project_in.in_features == 36
        assert model.denoiser.project_in.out_features == 48
        assert len(model.denoiser.residual_blocks) == 2
    else:
        assert [layer.project_in.in_features for layer in model.denoiser.layers] == [6, 20, 10]
        assert [layer.project_in.out_features for layer in model.denoiser.layers] == [48, 48, 48]


def test_a_new_model_is_frozen_and_in_evaluation_mode() -> None:
    model = Diffusion(LAYOUT, **SETTINGS)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_stored_noise_is_drawn_from_the_seed() -> None:
    model = Diffusion(LAYOUT, **(SETTINGS | {"seed": 5, "draws": 4}))
    assert model.noise.shape == (3, 4, 36)
    assert torch.equal(model.noise.flatten(0, 1), draw_noise(12, 36, seed=5))
    assert torch.equal(model.noise.mean(1), torch.zeros(3, 36))  # pairs of opposite sign at every start time


@pytest.mark.parametrize("draws", [1, 3])
def test_odd_numbers_of_noise_samples_work(draws: int) -> None:
    model = make(draws=draws)
    assert model.noise.shape == (3, draws, 36)
    assert all(torch.isfinite(values).all() for values in all_scores(model, features(4)).values())


def test_same_seed_same_module_other_seed_another() -> None:
    first, again, other = (Diffusion(LAYOUT, **(SETTINGS | {"seed": seed})).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["noise"], other["noise"])
    name = "denoiser.layers.0.project_in.weight"
    assert not torch.equal(first[name], other[name])


def test_building_leaves_the_global_random_states_untouched() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    all_scores(make(), features(3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_building_leaves_the_random_state_of_the_gpu_untouched() -> None:
    torch.cuda.manual_seed(123)
    before = torch.cuda.get_rng_state()
    Diffusion(LAYOUT, **SETTINGS)
    assert torch.equal(torch.cuda.get_rng_state(), before)


# ---- the four scores ----


def test_reconstructions_are_means_over_the_stored_noise_samples() -> None:
    model = make(draws=4)
    x = model.normalised(features(5))
    x_hats = model.reconstructions(model.denoiser, x)
    assert len(x_hats) == 3
    for x_hat, start, samples in zip(x_hats, (20, 60, 95), model.noise, strict=True):
        each = [reconstruct(model.denoiser, model.scheduler, x, sample[None], start)[:, 0] for sample in samples]
        torch.testing.assert_close(x_hat, torch.stack(each).mean(0), rtol=1e-4, atol=1e-5)


def test_stride_is_handed_on() -> None:
    model = make(stride=5)
    x = model.normalised(features(5))
    expected = reconstruct(model.denoiser, model.scheduler, x, model.noise[1], 60, stride=5).mean(1)
    torch.testing.assert_close(model.reconstructions(model.denoiser, x)[1], expected)
    assert not torch.allclose(expected, make().reconstructions(make().denoiser, x)[1], atol=1e-3)


def test_every_score_follows_its_formula() -> None:
    """All from the reconstructions, in NumPy."""
    model = make()
    raw = features(7)
    x_tensor = model.normalised(raw)
    torch.testing.assert_close(x_tensor, block_normalise(raw, WIDTHS))
    assert torch.equal(x_tensor, model.stages(raw))
    x = x_tensor.double().numpy()
    late = [part.double().numpy() for part in model.reconstructions(model.denoiser, x_tensor)]
    early = [part.double().numpy() for part in model.reconstructions(model.early, x_tensor)]
    errors = np.stack([layer_mse(x, part) for part in late], axis=1)  # (B, T, L)
    channels = np.array(WIDTHS)

    z = (np.log(errors) - model.mean.double().numpy()) / model.deviation.double().numpy()
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

    scores = all_scores(model, raw)
    layers = model.layer_scores(raw)
    assert tuple(scores) == ("layerwise", "mse", "mfsim", "lr")
    torch.testing.assert_close(model.join(layers), scores["layerwise"])
    np.testing.assert_allclose(layers.numpy(), by_layer, rtol=2e-3, atol=2e-3)
    for name in DIFFUSION:
        assert scores[name].shape == (7,)
        np.testing.assert_allclose(scores[name].numpy(), expected[name], rtol=2e-3, atol=2e-3, err_msg=name)
        assert np.std(expected[name]) > 0.01  # the comparison above is not one of constants


def test_statistics_make_in_domain_log_errors_standard() -> None:
    model, held_out = make(fitted=False), features(3000, seed=9)
    assert torch.equal(model.mean, torch.zeros(3, 3))
    assert torch.equal(model.deviation, torch.ones(3, 3))
    model.fit_statistics(model.errors(model.stages(held_out)))
    z = (model.errors(model.normalised(held_out)).log() - model.mean) / model.deviation
    torch.testing.assert_close(z.mean(0), torch.zeros(3, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(3, 3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", DIFFUSION)
def test_a_detector_s_own_score_is_one_of_the_four(name: str) -> None:
    """With no members beside it, nothing else is computed, and layers score as they always do."""
    model = make()
    expected = all_scores(model, features(4))[name]
    unscaled = Heads(model, head=name).unscaled(features(4))
    torch.testing.assert_close(unscaled[:, 0], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(unscaled[:, 1:], model.layer_scores(features(4)))


def test_only_likelihood_regret_uses_the_early_network() -> None:
    model = make()
    for name in ("layerwise", "mse", "mfsim"):
        DIFFUSION[name](model)(features(4))
    assert list(model._prepared) == [model.denoiser]
    before = all_scores(model, features(4))
    assert list(model._prepared) == [model.denoiser, model.early]
    for parameter in model.early.parameters():
        parameter.mul_(0.5)
    after = all_scores(model, features(4))
    assert [name for name in DIFFUSION if not torch.equal(before[name], after[name])] == ["lr"]


@pytest.mark.parametrize("joint", [False, True])
def test_prepared_denoisers_are_the_network_itself(joint: bool) -> None:
    """Against noising, the network's own pass and a mean; again after its weights have changed, and for a copy."""
    model = make(joint=joint)
    x = model.stages(features(5))

    def expected(network: nn.Module) -> Tensor:
        t = torch.tensor(model.start_times).repeat_interleave(model.noise.shape[1])
        x_hat = network(add_noise(model.scheduler, x[None], model.noise.flatten(0, 1)[:, None], t), t)
        return x_hat.unflatten(0, model.noise.shape[:2]).mean(1)

    with torch.inference_mode():
        torch.testing.assert_close(model.reconstructions(model.denoiser, x), expected(model.denoiser))
        for weight in model.denoiser.parameters():
            weight.mul_(1.1)
        torch.testing.assert_close(model.reconstructions(model.denoiser, x), expected(model.denoiser))

        other = copy.deepcopy(model)
        other.denoiser.load_state_dict(model.early.state_dict())
        torch.testing.assert_close(other.reconstructions(other.denoiser, x), expected(model.early))
        torch.testing.assert_close(model.reconstructions(model.denoiser, x), expected(model.denoiser))


def test_likelihood_regret_is_zero_when_training_changed_nothing() -> None:
    model = make()
    model.early.load_state_dict(model.denoiser.state_dict())
    assert torch.equal(DIFFUSION["lr"](model)(features(4)), torch.zeros(4))


def test_sizes_are_those_of_the_shared_model() -> None:
    """Only likelihood regret needs the early network, which is as large as the denoiser."""
    model = make()
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert model.early is not None
    early = sum(2 * weight.numel() for weight in model.early.parameters())  # kept in float16
    assert 0 < 2 * early < whole + 1
    assert {name: kind(model).nbytes for name, kind in DIFFUSION.items()} == {
        **dict.fromkeys(("layerwise", "mse", "mfsim"), whole - early),
        "lr": whole,
    }


def test_a_score_keeps_nothing_of_its_own_and_is_trained_with_a_context() -> None:
    model = make()
    for kind in DIFFUSION.values():
        score = kind(model)
        assert score.model is model and not score.state_dict()
        with pytest.raises(UsageError, match="it needs a context that says how"):
            score.fit(features(4))


# ---- what must not change a score ----


@pytest.mark.parametrize(("joint", "stride"), [(False, None), (True, None), (True, 20)])
def test_a_row_does_not_depend_on_its_batch(joint: bool, stride: int | None) -> None:
    model = make(joint=joint, stride=stride)
    batch = features(16)
    together = all_scores(model, batch)
    layers = model.layer_scores(batch)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    for size in (1, 7):
        parts = [all_scores(model, part) for part in batch[order].split(size)]
        for name in DIFFUSION:
            apart = torch.cat([part[name] for part in parts])
            assert (apart - together[name][order]).abs().max() < 1e-4 * together[name].std(), (name, size)
        layers_apart = torch.cat([model.layer_scores(part) for part in batch[order].split(size)])
        assert (layers_apart - layers[order]).abs().max() < 1e-3


def test_a_score_does_not_depend_on_the_global_seed_or_on_earlier_calls() -> None:
    model = make()
    torch.manual_seed(1)
    first = all_scores(model, features(5))
    all_scores(model, features(9, seed=4))
    torch.manual_seed(2)
    again = all_scores(model, features(5))
    assert all(torch.equal(first[name], again[name]) for name in DIFFUSION)


def test_scores_ignore_shift_and_scale_of_a_layer() -> None:
    """Features are normalised for each image and layer."""
    model = make()
    moved = features(5)
    moved[:, 6:26] = 7 * moved[:, 6:26] + 3
    first = all_scores(model, features(5))
    again = all_scores(model, moved)
    for name in DIFFUSION:
        torch.testing.assert_close(again[name], first[name], rtol=1e-3, atol=1e-3)


def test_features_are_left_as_they_are() -> None:
    batch = features(5)
    all_scores(make(), batch)
    assert torch.equal(batch, features(5))


def test_dead_layers_give_finite_scores() -> None:
    batch = features(3)
    batch[:, :6] = 0.25
    model = make()
    assert torch.isfinite(model.layer_scores(batch)).all()
    assert all(torch.isfinite(values).all() for values in all_scores(model, batch).values())


@pytest.mark.filterwarnings("ignore:var")
def test_no_rows_give_no_scores() -> None:
    model = make()
    assert model.layer_scores(features(0)).shape == (0, 3)
    assert {name: tuple(values.shape) for name, values in all_scores(model, features(0)).items()} == dict.fromkeys(
        DIFFUSION, (0,)
    )


# ---- state ----


@pytest.mark.parametrize("joint", [False, True])
def test_state_dict_holds_everything_that_decides_a_score(joint: bool) -> None:
    model = make(joint=joint)
    names = set(model.state_dict())
    assert {"noise", "mean", "deviation"} < names
    rest = names - {"noise", "mean", "deviation"}
    assert {name.split(".")[0] for name in rest} == {"denoiser", "early"}
    other = Diffusion(LAYOUT, **(SETTINGS | {"joint": joint, "seed": 99}))
    other.load_state_dict(model.state_dict())
    first = all_scores(model, features(6))
    again = all_scores(other, features(6))
    assert all(torch.equal(first[name], again[name]) for name in DIFFUSION)


@pytest.mark.parametrize(
    "name", ["noise", "mean", "denoiser.layers.1.project_out.bias", "early.layers.0.norm_out.weight"]
)
def test_state_dict_is_strict(name: str) -> None:
    model = make()
    lacking = {key: value for key, value in model.state_dict().items() if key != name}
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        make().load_state_dict(lacking)
    with pytest.raises(RuntimeError, match="Unexpected key.*extra"):
        make().load_state_dict(model.state_dict() | {"extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        make().load_state_dict(model.state_dict() | {name: torch.zeros(1, 2, 3, 4)})


def test_joint_state_does_not_fit_a_model_of_one_network_a_layer() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        make().load_state_dict(make(joint=True).state_dict())
