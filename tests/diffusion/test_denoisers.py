"""LFDN and one LFDN per layer: size, structure, tensor names, and that layers do not mix."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from featdiff.diffusion.lfdn import LFDN, LayerwiseLFDN, TimeEmbedding

#: Weights of the released network: 720 features, width 1440, 16 blocks, time embedding 720 from 1440 waves.
PAPER_WEIGHTS = 86_740_560


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded random weights everywhere, also in the layers that start at zero."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=source))
    return module.eval()


def by_hand(network: LFDN, x: Tensor, t: Tensor) -> Tensor:
    """The forward pass written out from the weights alone."""
    w = network.state_dict()

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        z = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        return z * w[f"{name}.weight"] + w[f"{name}.bias"]

    angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(32) / 32)
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    time = F.silu(linear("time_embedding.linear_2", F.silu(linear("time_embedding.linear_1", waves))))
    h = linear("project_in", x)
    for i in range(len(network.residual_blocks)):
        block = f"residual_blocks.{i}"
        inner = linear(f"{block}.linear_in", F.silu(norm(f"{block}.norm_in", h)))
        inner = inner + linear(f"{block}.time", time)
        h = h + linear(f"{block}.linear_out", F.silu(norm(f"{block}.norm_out", inner)))
    return linear("project_out", F.silu(norm("norm_out", h)))


def test_lfdn_of_the_papers_size_is_one_percent_smaller_than_the_released_one() -> None:
    with torch.device("meta"):
        network = LFDN(width=720, hidden=1440, blocks=16, time_width=720)
    weights = sum(p.numel() for p in network.parameters())
    assert weights == 85_749_840
    assert weights / PAPER_WEIGHTS == pytest.approx(0.9886, abs=1e-4)
    # all that is missing is the first time layer, which sees 64 waves in place of 1440
    assert PAPER_WEIGHTS - weights == (1440 - 64) * 720


def test_forward_is_the_documented_network() -> None:
    network = randomised(LFDN(width=6, hidden=16, blocks=3, time_width=8))
    x, t = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 20, 60, 99])
    with torch.no_grad():
        torch.testing.assert_close(network(x, t), by_hand(network, x, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["joint", "layerwise"])
def test_output_is_zero_before_training(kind: str) -> None:
    network = (
        LFDN(width=9, hidden=16, blocks=2)
        if kind == "joint"
        else LayerwiseLFDN(widths=[4, 5], hidden_ratio=2, hidden_max=64, blocks=2)
    )
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(network(x, torch.tensor([0, 50, 99])), torch.zeros(3, 9))


def test_each_block_starts_as_the_identity() -> None:
    network = LFDN(width=9, hidden=16, blocks=2)
    h, time = torch.randn(3, 16), torch.randn(3, 128)
    for block in network.residual_blocks:
        assert torch.equal(block(h, time), h)


def test_output_depends_on_the_time() -> None:
    network = randomised(LFDN(width=6, hidden=16, blocks=1))
    x = torch.ones(2, 6)
    early, late = network(x, torch.tensor([1, 95]))
    assert (early - late).abs().max() > 1e-3


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    network = randomised(LFDN(width=6, hidden=32, blocks=2))
    x, t = torch.randn(8, 6, generator=torch.Generator().manual_seed(2)), torch.arange(8) * 12
    with torch.no_grad():
        together, alone = network(x, t), torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("widths", "ratio", "largest", "smallest", "expected"),
    [
        ([8, 100, 1000], 2.0, 640, 64, [64, 200, 640]),
        ([8, 100, 1000], 0.5, 640, 16, [16, 50, 500]),
        ([8], 2.0, 32, 64, [32]),  # the upper bound wins
    ],
)
def test_hidden_widths_follow_the_channels(
    widths: list[int], ratio: float, largest: int, smallest: int, expected: list[int]
) -> None:
    with torch.device("meta"):
        network = LayerwiseLFDN(widths, ratio, largest, blocks=1, hidden_min=smallest)
    assert [layer.project_in.out_features for layer in network.layers] == expected
    assert [layer.project_in.in_features for layer in network.layers] == widths


def test_layerwise_equals_its_networks_side_by_side() -> None:
    network = randomised(LayerwiseLFDN(widths=[3, 7, 5], hidden_ratio=2, hidden_max=64, blocks=2))
    x, t = torch.randn(4, 15, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 7, 50, 99])
    with torch.no_grad():
        parts = [layer(part, t) for layer, part in zip(network.layers, x.split([3, 7, 5], 1), strict=True)]
        assert torch.equal(network(x, t), torch.cat(parts, dim=1))


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_layer_sees_only_its_own_input(changed: int) -> None:
    widths = [3, 7, 5]
    network = randomised(LayerwiseLFDN(widths=widths, hidden_ratio=2, hidden_max=64, blocks=2))
    x, t = torch.randn(4, 15, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 7, 50, 99])
    other = [part.clone() for part in x.split(widths, 1)]
    other[changed] += 1
    with torch.no_grad():
        before = network(x, t).split(widths, 1)
        after = network(torch.cat(other, 1), t).split(widths, 1)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i != changed for i in range(3)]


def test_layerwise_is_far_smaller_than_joint() -> None:
    """At the default sizes, on the stages of the default backbone: the promised 40 MB hold two networks."""
    widths = [16, 24, 40, 112, 320]
    with torch.device("meta"):
        layerwise = LayerwiseLFDN(widths, hidden_ratio=2.0, hidden_max=640, blocks=3)
        joint = LFDN(sum(widths), hidden=1440, blocks=16)
    small, large = (sum(p.numel() for p in network.parameters()) for network in (layerwise, joint))
    assert 2 * 4 * small < 40e6  # bytes of the trained and the early network
    assert small < large / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_time_embedding_is_bit_by_bit_that_of_diffusers(dtype: torch.dtype) -> None:
    actual = randomised(TimeEmbedding(24)).to(dtype)
    expected = TimestepEmbedding(64, 24).to(dtype)
    expected.load_state_dict(actual.state_dict())
    waves = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
    t = torch.arange(1000)
    with torch.no_grad():
        assert torch.equal(actual(t, dtype), expected(waves(t).to(dtype)))


def test_saved_models_know_their_tensors_by_these_names() -> None:
    names = LayerwiseLFDN(widths=(3,), hidden_ratio=1.5, hidden_max=32, blocks=1).state_dict()
    layers = (
        "project_in",
        "residual_blocks.0.norm_in",
        "residual_blocks.0.linear_in",
        "residual_blocks.0.time",
        "residual_blocks.0.norm_out",
        "residual_blocks.0.linear_out",
        "norm_out",
        "project_out",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
    )
    assert set(names) == {f"layers.0.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_kept(dtype: torch.dtype) -> None:
    network = randomised(LFDN(width=6, hidden=16, blocks=1))
    x, t = torch.ones(2, 6), torch.tensor([3, 90])
    with torch.no_grad():
        expected, actual = network(x, t), network.to(dtype)(x.to(dtype), t)
    assert actual.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)
