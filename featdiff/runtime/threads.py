"""How many threads train a network on the CPU; the threads of the rest of the program stay as they are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .cpus import available_cpus, threads_sleep

#: Multiplications of one operation for which another thread pays; measured (tests/benchmarks/RESULTS.md, threads).
WORK_PER_THREAD = 3_000_000
#: The same where waiting threads spin: on busy cores each of a step's operations then waits for many milliseconds.
WORK_PER_SPINNING_THREAD = 50_000_000

_changing = threading.Lock()


@contextmanager
def training_threads(network: nn.Module, batch_size: int, sample: Tensor) -> Iterator[int]:
    """Train in this block with as many threads as the operations of this network have work for.

    Parameters
    ----------
    network : nn.Module
        What is trained. Nothing changes unless it is on the CPU.
    batch_size : int
        Samples of a step.
    sample : Tensor of shape (D,) or (C, H, W)
        What the network takes, without the batch.

    Yields
    ------
    int
        The number of threads, never more than torch would use.

    Examples
    --------
    >>> before = torch.get_num_threads()
    >>> with training_threads(nn.Linear(4, 4), 16, torch.ones(4)) as threads:
    ...     threads, torch.get_num_threads()
    (1, 1)
    >>> torch.get_num_threads() == before
    True
    """
    with _changing:  # another training may be setting the number with which a new thread begins
        before = torch.get_num_threads()
    threads = before
    if all(parameter.device.type == "cpu" for parameter in network.parameters()):
        threads = min(before, choose_threads(operation_work(network, batch_size, sample)))
    if threads == before:
        yield before
        return

    set_own_threads(threads)
    try:
        yield threads
    finally:
        set_own_threads(before)


def choose_threads(work: float) -> int:
    """Threads for operations of this size: no more than they have work for, nor than there are CPUs.

    Parameters
    ----------
    work : float
        From :func:`operation_work`.

    Returns
    -------
    int
        At least 1. The load of the machine does not matter: with another number of threads sums are rounded
        differently, and a training that is repeated on the same CPUs must end with the same weights.
    """
    share = WORK_PER_THREAD if threads_sleep() else WORK_PER_SPINNING_THREAD
    return max(1, min(available_cpus(), int(work // share)))


def operation_work(network: nn.Module, batch_size: int, sample: Tensor) -> float:
    """About how many multiplications one operation (a matrix product, a convolution) takes in the forward pass.

    Threads wait for each other after each operation. Many small ones gain less from threads than a few large ones.

    Parameters
    ----------
    network : nn.Module
    batch_size : int
    sample : Tensor of shape (D,) or (C, H, W)
        A vector is one position, an image has H x W of them (too many for layers at a lower resolution).

    Returns
    -------
    float
        The mean over all weights that are trained, each of which is used once at each position.
    """
    matrices = [weight.numel() for weight in network.parameters() if weight.requires_grad and weight.dim() > 1]
    positions = sample.numel() / len(sample)
    return batch_size * positions * sum(matrices) / max(1, len(matrices))


def set_own_threads(number: int) -> None:
    """Set the number of threads of PyTorch for work that this thread starts.

    ``torch.set_num_threads`` does so, and also sets with how many all threads begin that first use torch afterwards.
    That is put back at once; no lasting harm is done to a server that starts threads while it trains.
    """
    with _changing, ThreadPoolExecutor(1) as newcomer:
        default = newcomer.submit(torch.get_num_threads).result()
        torch.set_num_threads(number)
        newcomer.submit(torch.set_num_threads, default).result()
