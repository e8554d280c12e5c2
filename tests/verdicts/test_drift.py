"""The test of drift: its money is counted again by hand, its promise is tried on many streams."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from online_cp.betting import PiecewiseConstantBetting
from online_cp.martingale import PluginMartingale
from scipy.stats import beta, binomtest, kstest

from featdiff.exceptions import UsageError
from featdiff.verdicts import drift
from featdiff.verdicts.calibration import Calibration
from featdiff.verdicts.drift import NORMAL, SIDES, STRANGE, DriftTest


def stream(held_out: int, count: int, seed: int, share: float = 0.0, start: int = 0) -> np.ndarray:
    """p-values behind a calibration set of their own; from ``start`` on, a share lies beyond all held-out scores."""
    rng = np.random.default_rng([held_out, seed])
    calibration = Calibration(rng.standard_normal(held_out))
    scores = rng.standard_normal(count)
    scores[start:][rng.random(count - start) < share] = 10.0
    return calibration.p_values(scores)


def alarm_of(test: DriftTest, p_values: np.ndarray) -> int:
    test.update(p_values)
    return min(test.alarms.values(), default=0)


# ---- money ----


@pytest.mark.parametrize("side", SIDES)
def test_the_money_is_that_of_all_bets_from_all_times(side: str) -> None:
    """In plain numbers: each bet (level, rate) begins anew before each image with what is laid out for it."""
    held_out, alpha, delta = 60, 0.05, 0.02
    levels = {STRANGE: (0.05, 0.2), NORMAL: (0.05, 0.2, 0.5)}[side]  # 0.01 needs 99
    p_values = stream(held_out, 80, seed=1, share=0.2)

    def waiting(count: int) -> float:
        return 1 / math.log2(count + 2)

    total = 0.0
    for level in levels:
        below = math.floor(level * (held_out + 1))
        quantile = 1 - delta / len(levels) if side == STRANGE else delta / len(levels)
        bound = beta(below, held_out + 1 - below).ppf(quantile)
        for times in (1.5, 3.0, 8.0, 30.0):
            odds = bound / (1 - bound) * (times if side == STRANGE else 1 / times)
            rate = odds / (1 + odds)
            for begin in range(len(p_values)):
                hits = (p_values[begin:] <= level).sum()
                misses = len(p_values) - begin - hits
                laid_out = waiting(begin) - waiting(begin + 1)
                total += laid_out * (rate / bound) ** hits * ((1 - rate) / (1 - bound)) ** misses / (4 * len(levels))
    total += waiting(len(p_values))

    test = DriftTest(held_out, alpha, delta, sides=[side])
    test.update(p_values)
    expected = max(0.0, math.log(total) / math.log(1 / alpha))
    assert test.evidence == pytest.approx({side: expected}, rel=1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_each_bet_is_the_piecewise_martingale_of_online_cp(side: str) -> None:
    """It bets a share b on [0, a]: here a is the bound of the share of small p-values, and b the rate."""
    p_values = stream(200, 150, seed=2, share=0.1)
    bets = drift._Bets(side, 200, 0.01)
    money = np.zeros(len(p_values))
    for level, hit, miss in zip(bets._levels, bets._hit, bets._miss, strict=True):
        bound = (1 - math.exp(miss)) / (math.exp(hit) - math.exp(miss))
        as_uniform = np.where(p_values <= level, bound / 2, (1 + bound) / 2)
        for begin in range(len(p_values)):
            martingale = PluginMartingale(PiecewiseConstantBetting(bound, bound * math.exp(hit)))
            for p_value in as_uniform[begin:]:
                martingale.update(p_value)
            laid_out = 1 / math.log2(begin + 2) - 1 / math.log2(begin + 3)
            money[begin:] += laid_out * np.exp(martingale.log_martingale_values[-(len(p_values) - begin) :])
    waiting = 1 / np.log2(np.arange(len(p_values)) + 3)
    np.testing.assert_allclose(bets.update(p_values, 0), np.log(money / len(bets._levels) + waiting), rtol=1e-9)


def test_a_bet_at_the_bound_is_fair() -> None:
    """Where the share of small p-values is as large as it may be, a stake gains nothing on average."""
    for side in SIDES:
        bets = drift._Bets(side, 1600, 0.01)
        for level, hit, miss in zip(bets._levels, bets._hit, bets._miss, strict=True):
            share = (1 - math.exp(miss)) / (math.exp(hit) - math.exp(miss))
            below = math.floor(level * 1601)
            exceeded = beta.cdf(share, below, 1601 - below)
            assert (1 - exceeded if side == STRANGE else exceeded) == pytest.approx(0.01 / 3)
            assert (hit > 0) == (side == STRANGE)


@pytest.mark.parametrize("cuts", [[1] * 400, [3, 97, 300], [400]])
def test_how_a_stream_is_cut_does_not_matter(cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "_AT_ONCE", 64)
    p_values = stream(500, 400, seed=0, share=0.05)
    whole, parts = DriftTest(500, sides=SIDES), DriftTest(500, sides=SIDES)
    whole.update(p_values)
    for part in np.split(p_values, np.cumsum(cuts)[:-1]):
        parts.update(part)
    assert parts.evidence == pytest.approx(whole.evidence, rel=1e-9)
    assert (parts.alarms, parts.count, parts.distance) == (whole.alarms, 400, whole.distance)


# ---- the promise ----


@pytest.mark.parametrize("held_out", [100, 500, 1600])
def test_normal_streams_give_few_alarms(held_out: int) -> None:
    """At most alpha + delta = 10 % of them, both sides together; each looks at all of its 3,000 images."""
    streams = 100
    alarms = sum(
        bool(alarm_of(DriftTest(held_out, 0.05, 0.05, SIDES), stream(held_out, 3000, seed))) for seed in range(streams)
    )
    assert binomtest(alarms, streams, 0.1, alternative="greater").pvalue > 1e-3, alarms


@pytest.mark.parametrize(("share", "most"), [(0.05, 400), (0.1, 100), (0.3, 25)])
def test_strange_images_are_noticed(share: float, most: int) -> None:
    found = [alarm_of(DriftTest(1600), stream(1600, 3000, seed, share)) for seed in range(40)]
    assert all(found)
    assert np.median(found) < most


def test_a_late_change_is_noticed_nearly_as_soon() -> None:
    late = [alarm_of(DriftTest(1600), stream(1600, 102_000, seed, 0.1, start=100_000)) - 100_000 for seed in range(10)]
    assert 0 < np.median(late) < 300


@pytest.mark.parametrize("p_value", [1.0, 0.6, 0.3])
def test_a_frozen_camera_is_noticed(p_value: float) -> None:
    """One picture again and again, or pictures that were in training: no p-value is small."""
    test = DriftTest(1600, sides=SIDES)
    assert test.update([p_value] * 100)
    assert set(test.alarms) == {NORMAL}
    assert test.alarms[NORMAL] < 100


# ---- what it says ----


def test_an_alarm_comes_once_and_stays_until_restart() -> None:
    test = DriftTest(1000)
    assert test.update([0.001] * 5 + [0.5] * 100) is True
    first = dict(test.alarms)
    assert 1 < first[STRANGE] <= 5
    assert test.evidence[STRANGE] < 1  # the evidence has gone, the alarm has not
    assert test.update([0.001] * 50) is False
    assert test.alarms == first
    test.restart()
    assert (test.alarms, test.count, test.evidence) == ({}, 0, {STRANGE: 0.0})
    assert test.update([0.001] * 5)


def test_effect_sizes() -> None:
    test = DriftTest(1000)
    assert math.isnan(test.distance)
    assert test.share(0.05)[1:] == (0.0, 1.0)
    p_values = stream(1000, 1500, seed=0, share=0.1)
    test.update(p_values)
    latest = p_values[-1000:]
    assert test.distance == pytest.approx(kstest(latest, "uniform").statistic, abs=0.002)
    flagged = int((latest <= 0.05).sum())
    interval = binomtest(flagged, 1000).proportion_ci(method="exact")
    assert test.share(0.05) == pytest.approx((flagged / 1000, interval.low, interval.high))


# ---- state ----


def test_state_goes_through_json() -> None:
    p_values = stream(500, 600, seed=3, share=0.1)
    whole, first = DriftTest(500, 0.02, 0.03, SIDES), DriftTest(500, 0.02, 0.03, SIDES)
    whole.update(p_values)
    first.update(p_values[:250])
    second = DriftTest.from_json(json.loads(json.dumps(first.to_json())))
    second.update(p_values[250:])
    assert second.evidence == pytest.approx(whole.evidence, rel=1e-9)
    assert (second.alarms, second.count, second.distance) == (whole.alarms, 600, whole.distance)
    for test in (second, DriftTest(500)):
        kept = json.dumps(test.to_json(), allow_nan=False)
        assert DriftTest.from_json(json.loads(kept)).to_json() == test.to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"held_out": "many"},
        {"count": None},
        {"sides": ["up"]},
        {"log_stakes": {}},
        {"log_stakes": {STRANGE: [0.0]}},
        {"latest": ["a"]},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(change: dict[str, Any]) -> None:
    test = DriftTest(500)
    test.update([0.5])
    with pytest.raises(UsageError):
        DriftTest.from_json(test.to_json() | change)
    with pytest.raises(UsageError, match="no state"):
        DriftTest.from_json({})


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan])
def test_p_values_are_checked(value: float) -> None:
    test = DriftTest(500)
    with pytest.raises(UsageError, match="p-values must lie in"):
        test.update([0.5, value])
    assert test.count == 0


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="needs at least 4 held-out images, and there are 3"):
        DriftTest(3)
    assert DriftTest(4).update([0.2] * 100)
    for name in ("alpha", "delta"):
        with pytest.raises(UsageError, match=name):
            DriftTest(500, **{name: 1.0})
    for sides in ((), ("up",)):
        with pytest.raises(UsageError, match="sides"):
            DriftTest(500, sides=sides)
