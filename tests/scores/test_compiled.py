"""Heads as one compiled graph: they give what the heads give, or are left alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from featdiff.features.layout import PRE_LOGITS, FeatureLayout, Kind
from featdiff.scores.compiled import CompiledHeads
from featdiff.scores.diffusion import Diffusion
from featdiff.scores.fused import Heads
from featdiff.scores.registry import Options, make_scores

LAYOUT = FeatureLayout.of(
    {("a", Kind.MEAN): 4, ("b", Kind.MEAN): 8, (PRE_LOGITS, Kind.PRE_LOGITS): 16, ("b", Kind.SPATIAL_STD): 8}
)
BANK = 60


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, LAYOUT.width, generator=torch.Generator().manual_seed(seed)).abs() + 1e-3


def fitted(backend: str = "torch") -> Heads:
    diffusion = Diffusion(
        LAYOUT,
        joint=False,
        hidden_ratio=2.0,
        hidden_max=16,
        blocks=1,
        timesteps=100,
        start_times=(70, 95),
        draws=2,
        stride=None,
        seed=0,
    )
    heads = Heads(diffusion, make_scores("neighbors", LAYOUT, Options(BANK, backend=backend)))
    for score in heads.members:
        score.fit(rows(BANK, 0))  # type: ignore[operator]
    return heads


def test_scores_are_those_of_the_heads() -> None:
    heads = fitted()
    compiled = CompiledHeads(heads)
    own = torch.arange(5)
    for count in (5, 1, 3):
        with torch.inference_mode():  # as the backbone gives them
            features = rows(count, 1) * 1
        for given, expected in (
            (compiled(features), heads(features)),
            (compiled(features, own[:count]), heads(features, own[:count])),
        ):
            for ours, theirs in zip(given, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert compiled.works
    assert not torch.equal(compiled(rows(5, 0))[0], compiled(rows(5, 0), own)[0])  # rows of the bank


def test_new_weights_count() -> None:
    heads = fitted()
    compiled = CompiledHeads(heads)
    before = compiled(rows(3, 1))[0]
    with torch.no_grad():
        heads.location += 2
        for weight in heads.diffusion.denoiser.parameters():
            weight *= 1.5
    after = compiled(rows(3, 1))[0]
    torch.testing.assert_close(after, heads(rows(3, 1))[0], rtol=1e-5, atol=1e-5)
    assert compiled.works and (after - before).abs().min() > 0.1


def test_what_cannot_be_compiled_is_left_alone() -> None:
    pytest.importorskip("faiss")
    heads = fitted("faiss")
    compiled = CompiledHeads(heads)
    for _ in range(2):
        assert torch.equal(compiled(rows(3, 1))[0], heads(rows(3, 1))[0])
        assert compiled.works is False


def test_a_graph_that_gives_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = fitted()
    compiled = CompiledHeads(heads)
    expected = heads(rows(3, 1))[0]
    monkeypatch.setattr(compiled, "_run", lambda features, own: heads(features + 1, own))
    assert torch.equal(compiled(rows(3, 1))[0], expected)
    assert compiled.works is False and torch.equal(compiled(rows(3, 1))[0], expected)


def test_copies_compile_their_own() -> None:
    compiled = CompiledHeads(fitted())
    expected = compiled(rows(2, 1))[0]
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert other.works is None and other.heads is not compiled.heads
        assert torch.equal(other.heads(rows(2, 1))[0], expected)
