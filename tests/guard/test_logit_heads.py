"""Heads that look at the logits of a guarded classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from classifiers import (
    OWN_LAYERS,
    RECIPE,
    loader,
    own_code,
    seeded,
    some_images,
)
from torch import Tensor, nn

from featdiff import Detector, Guard
from featdiff.diffusion.training import Recipe
from featdiff.exceptions import UsageError
from featdiff.features.layout import LOGITS, PRE_LOGITS, FeatureLayout, Kind
from featdiff.scores.logits import VirtualLogit
from featdiff.scores.registry import Context


def test_logit_heads_are_what_their_papers_say(guard: Guard, images: Tensor) -> None:
    extractor = guard.detector.extractor_
    rows = extractor(images)
    logits = rows[:, extractor.layout.logits.columns]
    torch.testing.assert_close(logits, guard.classifier(images).detach(), rtol=1e-4, atol=1e-5)
    found = guard.detector.all_heads(rows)
    np.testing.assert_allclose(found["energy"], -torch.logsumexp(logits, 1).numpy(), rtol=1e-5)
    np.testing.assert_allclose(np.exp(found["msp"]), 1 - logits.softmax(1).amax(1).numpy(), rtol=1e-4)


def test_vim_equals_another_project_s() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    source = torch.Generator().manual_seed(0)
    pre_logits = torch.randn(500, 24, generator=source) * torch.linspace(2, 0.1, 24) + 1
    last = seeded(lambda: nn.Linear(24, 5))
    rows = torch.cat([pre_logits, last(pre_logits)], 1).detach()
    layout = FeatureLayout.of({(PRE_LOGITS, Kind.PRE_LOGITS): 24, (LOGITS, Kind.LOGITS): 5})
    context = Context(rows[:400], rows[:400], Recipe(), classifier=last)
    ours = VirtualLogit(layout).fit(rows[:400], context)
    theirs = detectors.ViM(None, 12, last.weight, last.bias).fit_features(pre_logits[:400], torch.zeros(400))
    expected = theirs.predict_features(pre_logits[400:])
    torch.testing.assert_close(ours(rows[400:]), expected, rtol=1e-4, atol=1e-4)


def test_logit_heads_join_the_fusion(guard: Guard, images: Tensor) -> None:
    heads = guard.detector.heads_
    assert list(heads.scores)[-3:] == ["energy", "msp", "vim"]
    rows = guard.detector.extractor_(images)
    changed = rows.clone()
    changed[:, guard.detector.extractor_.layout.logits.columns] *= 0.5
    before, after = (heads.all_scores(features)["layerwise"] for features in (rows, changed))
    assert torch.equal(before, after)
    assert (heads(rows)[0] - heads(changed)[0]).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"extra_heads": ("odin",)}, "unknown score 'odin'.*known: .*energy, msp, vim"),
        ({"extra_heads": ("energy", "energy")}, "list of different names"),
        ({"extra_heads": ("energy",), "head": "mse"}, "head='fused' only"),
        ({"extra_heads": ("energy",), "backbone": "test_resnet"}, "give a classifier"),
        ({"input_size": (3, 8)}, "three whole numbers"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Detector(**{"backbone": own_code(), "layers": OWN_LAYERS} | arguments)


def test_vim_without_a_last_linear_layer() -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    guard = Guard(network, layers=["0", "1"], extra_heads=("vim",), recipe=RECIPE, fpr=0.1)
    few = loader(some_images(60, seed=1))
    with pytest.raises(UsageError, match="vim looks at the layer pre_logits"):
        guard.fit(few)
    fitted = Guard(network, layers=["0", "1"], extra_heads=("energy",), recipe=RECIPE, fpr=0.1).fit(few)
    assert list(fitted.detector.heads_.scores)[-1] == "energy"
