"""Drift by layer: which one has changed, what it may cost in false alarms, and its state."""

from __future__ import annotations

import json

import numpy as np
import pytest

from featdiff.exceptions import UsageError
from featdiff.verdicts.calibration import Calibration
from featdiff.verdicts.drift import SIDES
from featdiff.verdicts.layer_drift import LayerDrift

NAMES = ("early", "middle", "late")


def drawn(seed: int, count: int, shift: float = 0.0, layer: str = "middle") -> dict[str, np.ndarray]:
    """Scores of the layers, one of which has moved."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(count) + shift * (name == layer) for name in NAMES}


def calibration(seed: int = 0, count: int = 500) -> Calibration:
    return Calibration(np.random.default_rng(seed).standard_normal(count), layers=drawn(seed, count))


@pytest.mark.parametrize("layer", NAMES)
def test_the_layer_that_changed_is_named(layer: str) -> None:
    drift = LayerDrift(calibration(), sides=SIDES)
    assert drift.update(drawn(1, 2000)) == []
    assert drift.update(drawn(2, 200, 2.0, layer)) == [layer]
    assert drift.update(drawn(3, 200, 2.0, layer)) == []  # its alarm was there before
    assert drift.strongest() == layer
    assert set(drift.tests[layer].alarms) == {"strange"}
    assert 2000 < drift.tests[layer].alarms["strange"] <= 2200
    assert drift.evidence[layer]["strange"] >= 1

    drift.restart()
    assert all(not test.alarms and test.count == 0 for test in drift.tests.values())
    assert drift.update(drawn(4, 200)) == []


def test_normal_streams_give_few_alarms() -> None:
    alarms = 0
    for seed in range(40):
        drift = LayerDrift(calibration(seed, 300), sides=SIDES)
        alarms += bool(drift.update(drawn(1000 + seed, 3000)))
    assert alarms <= 2  # at most 2 % on average


def test_each_layer_gets_a_part_of_the_chance() -> None:
    drift = LayerDrift(calibration(), alpha=0.03, delta=0.006)
    for test in drift.tests.values():
        assert (test.alpha, test.delta, test.held_out) == pytest.approx((0.01, 0.002, 500))


def test_state_goes_through_json() -> None:
    drift = LayerDrift(calibration(), sides=SIDES)
    drift.update(drawn(1, 300, 1.0))
    other = LayerDrift(calibration()).resumed(json.loads(json.dumps(drift.to_json())))
    assert other.update(drawn(2, 50, 1.0)) == drift.update(drawn(2, 50, 1.0))
    assert other.evidence == drift.evidence


@pytest.mark.parametrize(
    "state", [{}, {"version": 1}, {"version": 1, "layers": [1]}, {"version": 1, "layers": {"a": 1}}]
)
def test_a_damaged_state_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="no state of"):
        LayerDrift(calibration()).resumed(state)


def test_a_state_of_others_is_refused() -> None:
    state = LayerDrift(calibration()).to_json()
    with pytest.raises(UsageError, match="version 7, not 1"):
        LayerDrift(calibration()).resumed(state | {"version": 7})
    with pytest.raises(UsageError, match="of another model"):
        LayerDrift(calibration(count=400)).resumed(state)
    fewer = {name: state["layers"][name] for name in NAMES[:2]}
    with pytest.raises(UsageError, match="of another model"):
        LayerDrift(calibration()).resumed(state | {"layers": fewer})


def test_what_has_no_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="train the model again"):
        LayerDrift(Calibration([0.1, 0.2]))
    with pytest.raises(UsageError, match="layers are missing: middle, late"):
        LayerDrift(calibration()).update({"early": np.zeros(3)})
