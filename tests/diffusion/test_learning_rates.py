"""What the optimiser does with a recipe: learning rates, weight decay, long gradients, the moving average."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from small_training import SHORT, data, network, run
from torch import Tensor

from featdiff.diffusion.schedules import make_scheduler
from featdiff.diffusion.training import Recipe, start, train


@cache
def rates(schedule: str, count: int = 96) -> tuple[list[float], list[float]]:
    """(rates that the optimiser really used, rates in the records)."""
    recipe = Recipe(**{**SHORT, "epochs": 10}, learning_rate=2e-3, lr_schedule=schedule, patience=100)
    state, x, used = start(network(), recipe, count), data(count), []

    def read(indices: np.ndarray) -> Tensor:
        used.append(state.optimizer.param_groups[0]["lr"])
        return x[torch.from_numpy(indices)]

    steps = list(train(state, read, count, data(32), make_scheduler(), recipe, 0))
    return used, [step.lr for step in steps]


def test_constant_rate() -> None:
    assert rates("constant") == ([2e-3] * 60, [2e-3] * 60)


def test_cosine_rate() -> None:
    expected = [1e-3 * (1 + math.cos(math.pi * k / 60)) for k in range(60)]
    assert rates("cosine")[0] == pytest.approx(expected, rel=1e-6)


def test_one_cycle_rate_warms_up_for_a_tenth_and_ends_near_zero() -> None:
    used, _ = rates("one-cycle")
    assert used[0] == pytest.approx(2e-3 / 25)
    peak = int(np.argmax(used))
    assert peak == pytest.approx(6, abs=1)
    assert max(used) == pytest.approx(2e-3, rel=0.02)
    assert used[: peak + 1] == sorted(used[: peak + 1])
    assert used[peak:] == sorted(used[peak:], reverse=True)
    assert used[-1] < 2e-3 / 100


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
def test_records_say_the_rate_that_the_step_was_taken_with(schedule: str) -> None:
    used, recorded = rates(schedule)
    assert recorded == used


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_schedule": "constant"}, [1.0] * 8),
        ({"lr_schedule": "constant", "warmup_steps": 3}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"lr_schedule": "cosine"}, [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]),
        (
            {"lr_schedule": "cosine", "warmup_steps": 1},
            [0.5, *(0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(1, 8))],
        ),
    ],
)
def test_learning_rates(settings: dict[str, Any], expected: list[float]) -> None:
    recipe = Recipe(**{**SHORT, "epochs": 2, "batch_size": 24, "learning_rate": 0.01, "min_steps": 8}, **settings)
    steps = list(run(start(network(), recipe, 96), recipe, data()))
    assert [step.lr for step in steps] == pytest.approx([0.01 * value for value in expected])


def test_one_cycle_is_at_its_top_when_the_warm_up_ends() -> None:
    recipe = Recipe(epochs=1, batch_size=8, min_steps=100, learning_rate=0.01, warmup_steps=30, patience=99)
    rates = [step.lr for step in run(start(network(), recipe, 96), recipe, data())]
    assert abs(int(np.argmax(rates)) - 30) <= 1
    assert max(rates) == pytest.approx(0.01, rel=0.01)


def test_long_gradients_are_cut() -> None:
    """With plain SGD in place of AdamW, a step is as long as its gradient times the rate."""
    lengths = []
    for clip in (0.0, 1e-3):
        recipe = Recipe(**{**SHORT, "epochs": 1, "batch_size": 96}, clip_norm=clip, lr_schedule="constant")
        state = start(network(), recipe, 96)
        state.optimizer = torch.optim.SGD(state.denoiser.parameters(), lr=1.0)
        state.schedule = torch.optim.lr_scheduler.ConstantLR(state.optimizer, factor=1.0)
        before = [p.detach().clone() for p in state.denoiser.parameters()]
        steps = run(state, recipe, data())
        next(steps)
        now = [p.detach() for p in state.denoiser.parameters()]
        lengths.append(math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(before, now, strict=True))))
    assert lengths[1] == pytest.approx(1e-3, rel=0.01) and lengths[0] > 0.01


def test_optimiser_is_adamw_with_the_settings_of_the_recipe() -> None:
    recipe = Recipe(weight_decay=0.03, learning_rate=0.02, lr_schedule="constant")
    optimizer = start(network(), recipe, 96).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["weight_decay"] == 0.03
    assert optimizer.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize("decay", [0.999, 0.3])
def test_moving_average_has_a_warm_up(decay: float) -> None:
    """m = w_1, then m <- d m + (1 - d) w with d = min(decay, (1 + n) / (10 + n)) for the n-th w after it."""
    recipe = Recipe(**SHORT, ema_decay=decay, learning_rate=0.05)
    state = start(network(), recipe, 96)
    expected: list[Tensor] = []
    for n, _ in enumerate(run(state, recipe, data())):
        live = [p.detach().double().clone() for p in state.denoiser.parameters()]
        if n == 0:
            expected = live
        else:
            d = min(decay, (1 + n) / (10 + n))
            expected = [d * m + (1 - d) * w for m, w in zip(expected, live, strict=True)]
        if n == 22:
            break
    for actual, wanted in zip(state.average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-6)
