"""Scores of a classifier's logits, against their formulas and another project."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featdiff.diffusion.training import Recipe
from featdiff.exceptions import UsageError
from featdiff.features.layout import LOGITS, PRE_LOGITS, FeatureLayout, Kind
from featdiff.scores.logits import Energy, MaximumSoftmax, VirtualLogit
from featdiff.scores.registry import Context

LAYOUT = FeatureLayout.of(
    {("layer4", Kind.MEAN): 6, (PRE_LOGITS, Kind.PRE_LOGITS): 24, (LOGITS, Kind.LOGITS): 5},
)
STAGES_ONLY = FeatureLayout.of_stages({"layer4": 6})


def linear(bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(24, 5, bias=bias).eval()


def features(rows: int, seed: int = 0, last: nn.Linear | None = None) -> Tensor:
    """A stage, pre-logits that fill some directions more than others, and the logits of ``last``."""
    source = torch.Generator().manual_seed(seed)
    pre_logits = torch.randn(rows, 24, generator=source) * torch.linspace(2, 0.1, 24) + 1
    logits = (last or linear())(pre_logits)
    return torch.cat([torch.rand(rows, 6, generator=source), pre_logits, logits], 1).detach()


def context(classifier: nn.Module | None) -> Context:
    return Context(training=None, validation=None, recipe=Recipe(), classifier=classifier)  # type: ignore[arg-type]


def vim(bank: Tensor, classifier: nn.Module) -> VirtualLogit:
    return VirtualLogit(LAYOUT).fit(bank, context(classifier))  # type: ignore[arg-type]


def test_energy() -> None:
    x = features(9)
    expected = -np.log(np.exp(x[:, 30:].double().numpy()).sum(1))
    np.testing.assert_allclose(Energy(LAYOUT)(x), expected, rtol=1e-5)


def test_maximum_softmax() -> None:
    x = features(9)
    score = MaximumSoftmax(LAYOUT)(x)
    np.testing.assert_allclose(score.exp(), 1 - x[:, 30:].softmax(1).amax(1).numpy(), rtol=1e-4)
    assert (score <= 0).all()


def test_maximum_softmax_tells_certain_images_apart() -> None:
    """Where 1 - p rounds to 0."""
    x = features(3)
    x[:, 30:] = 0
    x[:, 31] = torch.tensor([50.0, 100.0, 200.0])
    torch.testing.assert_close(MaximumSoftmax(LAYOUT)(x), np.log(4) - x[:, 31])


@pytest.mark.parametrize("bias", [True, False])
def test_vim_follows_its_formula(bias: bool) -> None:
    """In NumPy: the residual outside the 12 principal directions of 24, scaled to the mean of the largest logits."""
    last = linear(bias)
    bank, queries = features(400, last=last), features(30, seed=1, last=last)
    weight = last.weight.detach().double().numpy()
    origin = -np.linalg.pinv(weight) @ last.bias.detach().double().numpy() if bias else np.zeros(24)

    shifted = bank[:, 6:30].double().numpy() - origin
    values, vectors = np.linalg.eigh(shifted.T @ shifted)
    outside = vectors[:, np.argsort(values)[:12]]
    alpha = bank[:, 30:].amax(1).double().mean().item() / np.linalg.norm(shifted @ outside, axis=1).mean()

    residual = np.linalg.norm((queries[:, 6:30].double().numpy() - origin) @ outside, axis=1)
    expected = alpha * residual - torch.logsumexp(queries[:, 30:].double(), 1).numpy()
    np.testing.assert_allclose(vim(bank, last)(queries), expected, rtol=1e-4, atol=1e-4)


def test_vim_equals_another_project_s() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    last = linear()
    rows = features(500, last=last)
    theirs = detectors.ViM(None, 12, last.weight, last.bias).fit_features(rows[:400, 6:30], torch.zeros(400))
    expected = theirs.predict_features(rows[400:, 6:30])
    torch.testing.assert_close(vim(rows[:400], last)(rows[400:]), expected, rtol=1e-4, atol=1e-4)


def test_vim_takes_a_convolution_of_one_pixel_as_well() -> None:
    last, queries = linear(), features(9, seed=1)
    convolution = nn.Conv2d(24, 5, 1)
    with torch.no_grad():
        convolution.weight.copy_(last.weight[:, :, None, None])
        convolution.bias.copy_(last.bias)  # type: ignore[union-attr]
    bank = features(100)
    assert torch.equal(vim(bank, convolution)(queries), vim(bank, last)(queries))


def test_vim_of_images_that_are_all_alike_is_finite() -> None:
    bank = features(1).repeat(20, 1)
    score = vim(bank, linear())
    assert torch.isfinite(score(features(9, seed=1))).all()


@pytest.mark.parametrize("kind", [Energy, MaximumSoftmax, VirtualLogit])
def test_logits_are_needed(kind: type[Energy]) -> None:
    assert kind.reads_logits and not kind.log_scale
    words = rf"the score {kind.__name__} needs logits: give a classifier .*featdiff.Guard"
    with pytest.raises(UsageError, match=words):
        kind(STAGES_ONLY)


def test_what_else_is_refused() -> None:
    single = FeatureLayout.of({("layer4", Kind.MEAN): 6, (LOGITS, Kind.LOGITS): 1})
    with pytest.raises(UsageError, match="msp compares probabilities of classes.*a single logit"):
        MaximumSoftmax(single)
    with pytest.raises(UsageError, match="vim looks at the layer pre_logits: name it among the layers"):
        VirtualLogit(single)
    for missing in (None, context(None)):
        with pytest.raises(UsageError, match="vim needs the linear layer that gives the logits"):
            VirtualLogit(LAYOUT).fit(features(9), missing)  # type: ignore[arg-type]


def test_state_of_vim_is_all_that_it_has_learned() -> None:
    fitted, other = vim(features(100), linear()), VirtualLogit(LAYOUT)
    assert set(fitted.state_dict()) == {"origin", "basis", "scale"}
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other(features(9, seed=1)), fitted(features(9, seed=1)))
    assert not Energy(LAYOUT).state_dict() and not MaximumSoftmax(LAYOUT).state_dict()
