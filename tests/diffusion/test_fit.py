"""Fitting a denoiser with checkpoints: a stopped run goes on, a finished one is not repeated, progress is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_training import SHORT, data, network, same
from torch import Tensor

from featdiff.diffusion.fit import fit_denoiser
from featdiff.diffusion.lfdn import LFDN
from featdiff.diffusion.schedules import make_scheduler
from featdiff.diffusion.training import Recipe, Step, TrainingState, start, train
from featdiff.runtime import checkpoints

COUNT = 96
RECIPE = Recipe(**SHORT)  # 6 steps an epoch


class Stopped(Exception):
    """Stands for a user who ends the run."""


def read(indices: np.ndarray) -> Tensor:
    return data(COUNT)[torch.from_numpy(indices)]


def fit(denoiser: LFDN, **options: Any) -> TrainingState:
    arguments = {"read": read, "validation": data(32, seed=9), "seed": 0} | options
    return fit_denoiser(denoiser, make_scheduler(), count=COUNT, recipe=RECIPE, **arguments)


def stop_after(number: int) -> Callable[[Step, TrainingState], None]:
    def watch(step: Step, state: TrainingState) -> None:
        if step.step == number:
            raise Stopped

    return watch


def test_it_is_the_training_loop_to_its_end() -> None:
    expected = start(network(), RECIPE, COUNT)
    for _ in train(expected, read, COUNT, data(32, seed=9), make_scheduler(), RECIPE, 0):
        pass

    denoiser = network()
    state = fit(denoiser)
    assert state.done
    assert state.seconds > 0
    assert state.best_loss == expected.best_loss
    assert same(denoiser.state_dict(), expected.best)
    assert same(state.early, expected.early)


@pytest.mark.parametrize("threads", [2, 3])
def test_a_small_network_trains_on_one_thread_whatever_the_program_uses(threads: int) -> None:
    """Then its weights are the same to the last bit: other numbers of threads add in another order."""
    samples = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))

    def trained() -> tuple[LFDN, set[int]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            denoiser = LFDN(width=128, hidden=128, blocks=2, time_width=8)
        used: set[int] = set()
        fit_denoiser(
            denoiser,
            make_scheduler(),
            lambda indices: samples[indices],
            512,
            samples[:64],
            Recipe(epochs=1, batch_size=256, min_steps=3, max_steps=3),
            seed=0,
            progress=lambda *_: used.add(torch.get_num_threads()),
        )
        return denoiser, used

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected, _ = trained()
        torch.set_num_threads(threads)
        denoiser, used = trained()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert used == {1}
    assert same(denoiser.state_dict(), expected.state_dict())


def test_a_fitted_network_is_ready_for_use() -> None:
    denoiser = network().requires_grad_(False)  # as it comes from a detector that was fitted before
    fit(denoiser)
    assert not denoiser.training
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    first = network()
    state = fit(first, checkpoint=file)
    assert file.exists()

    def fail(indices: np.ndarray) -> Tensor:
        raise AssertionError("nothing is to be trained")

    second = network(seed=77)  # other weights: all must come from the file
    again = fit(second, checkpoint=file, read=fail)
    assert same(second.state_dict(), first.state_dict())
    assert (again.best_loss, again.seconds) == (state.best_loss, state.seconds)
    assert not any(parameter.requires_grad for parameter in second.parameters())


@pytest.mark.parametrize("number", [6, 20])
def test_a_stopped_run_goes_on_from_its_last_checkpoint(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints are written at the end of an epoch; a run that goes on ends with the same weights."""
    seconds = [0.0]

    def read_slowly(indices: np.ndarray) -> Tensor:
        seconds[0] += checkpoints.CHECKPOINT_SECONDS
        return read(indices)

    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    file = tmp_path / "run.pt"
    with pytest.raises(Stopped):
        fit(network(), checkpoint=file, read=read_slowly, watch=stop_after(number))
    assert file.exists()

    seen: list[int] = []
    resumed = network(seed=77)
    fit(resumed, checkpoint=file, watch=lambda step, state: seen.append(step.step))
    assert seen == list(range(number // 6 * 6 + 1, 25))

    whole = network()
    fit(whole)
    assert same(resumed.state_dict(), whole.state_dict())


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(network())
    assert not list(tmp_path.iterdir())


def test_progress_and_watch_see_every_step() -> None:
    shown: list[tuple[str, int, int]] = []
    watched: list[tuple[int, int]] = []
    fit(
        network(),
        progress=lambda *report: shown.append(report),
        watch=lambda step, state: watched.append((step.step, state.epoch)),
    )
    assert shown == [("training", number, 24) for number in range(1, 25)]
    assert watched == [(number, number // 6) for number in range(1, 25)]


class OneOfTwo(SimpleNamespace):
    """What a process sees of ``accelerate``, without the other process."""

    def __init__(self, is_main_process: bool) -> None:
        super().__init__(
            num_processes=1,
            process_index=0,
            device=torch.device("cpu"),
            is_main_process=is_main_process,
        )

    def gather(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, _: str) -> Tensor:
        return value

    def prepare(self, *parts: Any) -> tuple[Any, ...]:
        return parts

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unwrap_model(self, model: Any, keep_fp32_wrapper: bool) -> Any:
        return model


@pytest.mark.parametrize("is_main", [True, False])
def test_only_the_main_process_writes_and_reports(is_main: bool, tmp_path: Path) -> None:
    reports: list[Any] = []
    denoiser = network()
    fit(
        denoiser,
        checkpoint=tmp_path / "run.pt",
        progress=lambda *report: reports.append(report),
        watch=lambda step, state: reports.append(step),
        accelerator=OneOfTwo(is_main),
    )
    assert bool(reports) is is_main
    assert (tmp_path / "run.pt").exists() is is_main
    assert not denoiser.training
