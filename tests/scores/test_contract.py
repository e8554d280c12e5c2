"""What every registered score keeps to, those of other packages too where they are installed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featdiff.diffusion.training import Recipe
from featdiff.features.layout import LOGITS, PRE_LOGITS, FeatureLayout, Kind
from featdiff.features.store import FeatureTable
from featdiff.scores.registry import Context, Options, Score, baselines, heads, make_scores

LAYOUT = FeatureLayout.of(
    {
        ("early", Kind.MEAN): 8,
        ("last", Kind.MEAN): 24,
        (PRE_LOGITS, Kind.PRE_LOGITS): 20,
        ("last", Kind.SPATIAL_STD): 24,
        (PRE_LOGITS, Kind.SPATIAL_STD): 20,
        (LOGITS, Kind.LOGITS): 5,
    }
)
ROWS = 400
ALL = sorted({*heads(), *baselines()})


def classifier() -> nn.Linear:
    """Logits are large where pre-logits look like one of five prototypes."""
    last = nn.Linear(20, 5)
    with torch.no_grad():
        last.weight.copy_(prototypes()[LAYOUT.pre_logits.columns].T)  # type: ignore[union-attr]
        last.bias.fill_(0.1)
    return last


def prototypes() -> Tensor:
    """What each of five classes looks like (D, 5)."""
    source = torch.Generator().manual_seed(0)
    return torch.rand(LAYOUT.width, 5, generator=source) * (torch.rand(LAYOUT.width, 5, generator=source) > 0.6)


def features(rows: int, seed: int, strange: bool = False) -> Tensor:
    """Positive rows near a prototype each; strange ones are like none of them, on the same scale."""
    source = torch.Generator().manual_seed(seed)
    noise = 0.1 * torch.rand(rows, LAYOUT.width, generator=source)
    if strange:
        values = prototypes().mean(1) * 2 * torch.rand(rows, LAYOUT.width, generator=source)
    else:
        values = prototypes().T[torch.randint(5, (rows,), generator=source)]
    x = values + noise
    assert LAYOUT.logits is not None and LAYOUT.pre_logits is not None
    with torch.no_grad():
        x[:, LAYOUT.logits.columns] = classifier()(x[:, LAYOUT.pre_logits.columns])
    return x


def table(x: Tensor) -> FeatureTable:
    where = np.stack([np.zeros(len(x), dtype=np.int64), np.arange(len(x))], 1)
    return FeatureTable([x.numpy()], where, x.shape[1])


def unfitted(name: str) -> list[Score]:
    return make_scores(name, LAYOUT, Options(rows=ROWS))


@pytest.fixture(scope="module")
def fitted() -> dict[str, list[Score]]:
    """Scores by the name they are registered under."""
    training = table(features(ROWS, seed=1))
    context = Context(training, table(features(60, seed=2)), Recipe(), classifier=classifier())
    return {name: [score.fit(training, context) for score in unfitted(name)] for name in ALL}


def test_all_are_tested() -> None:
    assert {"mahalanobis", "knn", "neighbors", "energy", "msp", "vim", "pca"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_names_and_kinds(name: str, fitted: dict[str, list[Score]]) -> None:
    names = [score.name for score in fitted[name]]
    assert names and all(names) and len(set(names)) == len(names)
    for score in fitted[name]:
        assert isinstance(score, Score) and score.layout == LAYOUT
        assert not any(parameter.requires_grad for parameter in score.parameters())
        assert score.nbytes >= 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [1, 7])
def test_one_finite_number_a_row(name: str, rows: int, fitted: dict[str, list[Score]]) -> None:
    x = features(rows, seed=3)
    for score in fitted[name]:
        values = score(x)
        assert values.shape == (rows,) and values.is_floating_point()
        assert torch.isfinite(values).all()
        if score.log_scale:
            assert (values >= 0).all()
        assert not values.requires_grad
    assert torch.equal(x, features(rows, seed=3))


@pytest.mark.parametrize("name", ALL)
def test_a_row_does_not_depend_on_its_batch(name: str, fitted: dict[str, list[Score]]) -> None:
    x = torch.cat([features(20, seed=4), features(5, seed=5, strange=True)])
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    for score in fitted[name]:
        together = score(x)
        for size in (1, 7):
            apart = torch.cat([score(part) for part in x[order].split(size)])
            assert (apart - together[order]).abs().max() < 1e-4 * together.std(), (score.name, size)
        assert torch.equal(score(x), together)


@pytest.mark.parametrize("name", ALL)
def test_strange_rows_rank_higher(name: str, fitted: dict[str, list[Score]]) -> None:
    """Among fresh rows of both kinds: the sign is right."""
    x = torch.cat([features(100, seed=6), features(100, seed=7, strange=True)])
    for score in fitted[name]:
        ranks = score(x).argsort().argsort().double()
        assert ranks[100:].mean() > ranks[:100].mean() + 20, score.name


@pytest.mark.parametrize("name", [name for name in ALL if name in heads()])
def test_state_is_all_that_a_head_has_learned(name: str, fitted: dict[str, list[Score]]) -> None:
    x = features(9, seed=8)
    for score, other in zip(fitted[name], unfitted(name), strict=True):
        other.load_state_dict(copy.deepcopy(score.state_dict()))
        assert torch.equal(other(x), score(x))
        assert {key: value.shape for key, value in other.state_dict().items()} == {
            key: value.shape for key, value in score.state_dict().items()
        }
