"""The recipe of a training: how long it takes, and which settings are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from featdiff.diffusion.training import Recipe
from featdiff.exceptions import UsageError


@pytest.mark.parametrize(
    ("settings", "count", "expected"),
    [
        ({"epochs": 3, "batch_size": 10, "min_steps": 1}, 100, (3, 10)),
        ({"epochs": 3, "batch_size": 10, "min_steps": 1}, 109, (3, 10)),  # the rest sits out an epoch
        ({"epochs": 3, "batch_size": 10, "min_steps": 31}, 100, (4, 10)),  # stretched
        ({"epochs": 3, "batch_size": 10, "min_steps": 600}, 5, (600, 1)),  # fewer rows than a batch
        ({"epochs": 100, "batch_size": 10, "min_steps": 1, "max_steps": 50}, 100, (5, 10)),  # cut
        (
            {"epochs": 1, "batch_size": 10, "min_steps": 600, "max_steps": 50},
            100,
            (5, 10),
        ),  # the upper bound wins
        ({}, 6000, (15, 46)),
    ],
)
def test_plan(settings: dict[str, Any], count: int, expected: tuple[int, int]) -> None:
    assert Recipe(**settings).plan(count) == expected


@pytest.mark.parametrize(
    ("count", "max_steps"), [(100, 15), (100, 3), (100, 1), (10_000_000, 20_000), (1_281_167, 20_000)]
)
def test_plan_never_exceeds_max_steps(count: int, max_steps: int) -> None:
    epochs, per_epoch = Recipe(max_steps=max_steps, batch_size=10 if count == 100 else 256).plan(count)
    assert epochs >= 1
    assert per_epoch >= 1
    assert epochs * per_epoch <= max_steps


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 99, 5000])
def test_plan_reaches_min_steps(count: int) -> None:
    epochs, per_epoch = Recipe(epochs=1, batch_size=10, min_steps=77).plan(count)
    assert 77 <= epochs * per_epoch < 77 + per_epoch or epochs == 1


def test_long_epochs_are_cut() -> None:
    assert Recipe(epochs=3, batch_size=10, min_steps=0, epoch_steps=4).plan(100) == (3, 4)
    assert Recipe(epochs=1, batch_size=10, min_steps=9, epoch_steps=4).plan(100) == (3, 4)


def test_unknown_lr_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"lr_schedule 'linear'.*one-cycle, cosine, constant"):
        Recipe(lr_schedule="linear")


@pytest.mark.parametrize("name", ["epochs", "batch_size", "learning_rate", "patience", "max_steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_settings_must_be_positive(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"{name} must be above 0, not {value}"):
        Recipe(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", "3"),
        ("epochs", 2.5),
        ("batch_size", 16.5),
        ("max_steps", None),
        ("min_steps", "600"),
        ("patience", math.nan),
        ("learning_rate", "1e-3"),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("weight_decay", -1.0),
        ("ema_decay", -0.5),
        ("ema_decay", 1.5),
        ("ema_decay", math.nan),
    ],
)
def test_settings_of_a_wrong_kind_or_range_are_refused_by_name(name: str, value: object) -> None:
    """As they may come from a TOML file."""
    with pytest.raises(UsageError, match=name):
        Recipe(**{name: value})


@pytest.mark.parametrize(
    "setting", [{"clip_norm": -1}, {"warmup_steps": -1}, {"warmup_steps": 1.5}, {"epoch_steps": 0}]
)
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(setting))):
        Recipe(**setting)


@pytest.mark.parametrize(("count", "epochs"), [(5, 20), (256, 10), (6_000, 1)])
def test_few_samples_have_several_epochs_between_two_checks(count: int, epochs: int) -> None:
    assert Recipe().epochs_of_a_check(count) == epochs
    assert Recipe(check_steps=1).epochs_of_a_check(count) == 1
