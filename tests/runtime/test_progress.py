"""``progress=True``: bars for scripts and notebooks, closed whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featdiff import Detector, Guard, audit
from featdiff.detectors.estimator import FeatureDiffusion
from featdiff.exceptions import UsageError
from featdiff.runtime.progress import Bars, shown

PHOTOS = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
QUICK = {"epochs": 1, "min_steps": 5}


def detector(cache: Path) -> Detector:
    return Detector(
        "test_resnet", pretrained=False, layers=["layer1"], fpr=0.2, recipe=QUICK, device="cpu", cache=cache
    )


def test_each_stage_has_a_bar_and_a_round_has_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars() as bars:
        for done in (32, 64):
            bars("features", done, 64)
        bars("scoring", 7, 7)
        bars("scoring", 3, 5)
        bars("scoring", 5, 5)
    shown_bars = capsys.readouterr().err
    assert "loading the backbone" in shown_bars
    for text in ("features: 100%", "64/64", "scoring: 100%", "7/7", "5/5"):
        assert text in shown_bars


def test_an_error_closes_the_bar() -> None:
    bars = Bars()
    with pytest.raises(RuntimeError), bars:
        bars("features", 1, 9)
        raise RuntimeError
    assert bars._bar.disable  # as tqdm leaves a closed bar


def test_a_callable_is_used_as_it_is_and_nonsense_is_refused() -> None:
    calls: list[tuple[str, int, int]] = []

    def report(stage: str, done: int, total: int) -> None:
        calls.append((stage, done, total))

    with shown(report) as progress:
        assert progress is report
    for nothing in (None, False):
        with shown(nothing) as progress:
            assert progress is None
    with pytest.raises(UsageError, match="progress is True, or a callable .* not 7"), shown(7):  # type: ignore[arg-type]
        pass


def _fit(cache: Path) -> None:
    detector(cache).fit(PHOTOS, progress=True)


def _score(cache: Path) -> None:
    fitted = detector(cache).fit(PHOTOS)
    assert len(fitted.score(PHOTOS[:3], progress=True)) == 3
    fitted.features(PHOTOS[:5], progress=True)


def _audit(cache: Path) -> None:
    audit(PHOTOS, progress=True, backbone="test_resnet", pretrained=False, device="cpu", cache=cache)


def _guard(cache: Path) -> None:
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    classifier = nn.Sequential(stage, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    guard = Guard(classifier, layers=["0"], recipe=QUICK, hidden_max=16, cache=cache)
    guard.fit(torch.randn(100, 3, 16, 16), progress=True)


def _vectors(cache: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    FeatureDiffusion(recipe=QUICK, fpr=0.2).fit(rows, progress=True)


@pytest.mark.parametrize(
    ("work", "stages"),
    [
        (_fit, ("features: 100%", "40/40", "training: 100%")),
        (_score, ("scoring: 100%", "3/3", "5/5")),
        (_audit, ("features: 100%", "40/40")),
        (_guard, ("features: 100%", "training: 100%")),
        (_vectors, ("training: 100%",)),
    ],
)
def test_true_shows_bars(
    work: Callable[[Path], None], stages: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work(tmp_path)
    printed = capsys.readouterr()
    assert printed.out == ""
    for stage in stages:
        assert stage in printed.err


def test_parts_of_a_stream_have_bars_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = detector(tmp_path).fit(PHOTOS)
    parts = fitted.iter_scores(PHOTOS, progress=True)
    assert len(next(parts)) == 40
    parts.close()  # type: ignore[attr-defined]
    assert "scoring: 100%" in capsys.readouterr().err
