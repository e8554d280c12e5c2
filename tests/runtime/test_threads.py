"""Threads of a training: few for small networks, and the rest of the program keeps its own."""

from __future__ import annotations

import doctest
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from featdiff.diffusion.lfdn import LFDN, LayerwiseLFDN
from featdiff.runtime import threads
from featdiff.runtime.threads import choose_threads, operation_work, training_threads

SMALL = nn.Linear(4, 4)
VECTOR = torch.ones(4)


@pytest.fixture(autouse=True)
def _four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of 16 CPUs whose threads spin, and a program that uses four of them in each of its threads."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "available_cpus", lambda: 16)
    monkeypatch.setattr(threads, "threads_sleep", lambda: False)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def in_new_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


# ---- how many ----


def test_work_is_the_mean_of_all_operations() -> None:
    """Each weight is used once at each position."""
    linear = nn.Linear(10, 3)
    assert operation_work(linear, 8, torch.ones(10)) == 30 * 8
    assert operation_work(nn.Sequential(linear, nn.Linear(3, 10)), 8, torch.ones(10)) == 30 * 8
    assert operation_work(nn.Sequential(linear, nn.Linear(3, 20)), 8, torch.ones(10)) == 45 * 8
    assert operation_work(nn.Conv2d(3, 5, 1, bias=False), 2, torch.ones(3, 6, 7)) == 15 * 2 * 42
    assert operation_work(linear.requires_grad_(False), 8, torch.ones(10)) == 0


@pytest.mark.parametrize(
    ("work", "sleeping", "spinning"), [(0, 1, 1), (5e6, 1, 1), (6e6, 2, 1), (4.5e7, 15, 1), (1e8, 16, 2), (1e9, 16, 16)]
)
def test_more_work_has_more_threads(monkeypatch: pytest.MonkeyPatch, work: float, sleeping: int, spinning: int) -> None:
    assert choose_threads(work) == spinning
    monkeypatch.setattr(threads, "threads_sleep", lambda: True)
    assert choose_threads(work) == sleeping


def test_the_default_networks_train_on_one_thread_that_spins_or_on_two_that_sleep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vector = torch.ones(496)
    with torch.device("meta"):
        default = LayerwiseLFDN([24, 40, 112, 320], hidden_ratio=2.0, hidden_max=320, blocks=3)
        joint = LFDN(496, hidden=320, blocks=3, time_width=160)
        paper = LFDN(496, hidden=1440, blocks=16, time_width=720)
    works = [operation_work(network, 256, vector) for network in (default, joint, paper)]
    assert [choose_threads(work) for work in works] == [1, 1, 8]
    monkeypatch.setattr(threads, "threads_sleep", lambda: True)
    assert [choose_threads(work) for work in works] == [2, 7, 16]


def test_never_more_than_there_are_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "available_cpus", lambda: 3)
    assert choose_threads(1e15) == 3


def test_never_more_than_torch_would_use() -> None:
    with training_threads(nn.Conv2d(64, 64, 3), 1000, torch.ones(64, 512, 512)) as number:
        assert number == torch.get_num_threads() == 4


def test_networks_elsewhere_than_on_the_cpu_are_left_alone() -> None:
    with training_threads(nn.Linear(4, 4, device="meta"), 16, VECTOR) as number:
        assert number == torch.get_num_threads() == 4


# ---- for this thread, for this time ----


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_number_is_as_before_afterwards(error: type[BaseException] | None) -> None:
    if error is None:
        with training_threads(SMALL, 16, VECTOR) as number:
            assert number == torch.get_num_threads() == 1
    else:
        with pytest.raises(error), training_threads(SMALL, 16, VECTOR):
            raise error
    assert torch.get_num_threads() == 4
    assert in_new_thread(torch.get_num_threads) == 4


def test_other_threads_keep_theirs() -> None:
    """Threads that are there already, that come in the meantime, and that have a number of their own."""
    with ThreadPoolExecutor(1) as there, ThreadPoolExecutor(1) as special:
        assert there.submit(torch.get_num_threads).result() == 4
        special.submit(torch.get_num_threads).result()  # a thread's first use of torch would undo what was set
        special.submit(torch.set_num_threads, 3).result()
        torch.set_num_threads(4)
        with training_threads(SMALL, 16, VECTOR):
            assert torch.get_num_threads() == 1
            assert there.submit(torch.get_num_threads).result() == 4
            assert special.submit(torch.get_num_threads).result() == 3
            assert in_new_thread(torch.get_num_threads) == 4
        assert special.submit(torch.get_num_threads).result() == 3


def test_a_new_default_of_the_program_outlives_the_training() -> None:
    with training_threads(SMALL, 16, VECTOR):
        in_new_thread(lambda: torch.set_num_threads(2))
    assert in_new_thread(torch.get_num_threads) == 2
    assert torch.get_num_threads() == 4


def test_many_trainings_at_once() -> None:
    barrier = threading.Barrier(8)

    def run(number: int) -> tuple[int, int]:
        barrier.wait()
        for _ in range(20):
            with training_threads(SMALL, 16, VECTOR):
                inside = torch.get_num_threads()
        return inside, torch.get_num_threads()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(8))) == [(1, 4)] * 8
    assert in_new_thread(torch.get_num_threads) == 4


def test_the_example_is_true() -> None:
    assert doctest.testmod(threads).failed == 0
