"""A GPU that is never idle: images arrive, and results are looked at, while the network computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor


def moved(pixels: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Images where the network is.

    A GPU fetches them in a stream of its own, so that it computes one batch while the next arrives, and the host does
    not wait. (Only pinned memory can be read that way.)

    Parameters
    ----------
    pixels : Tensor of shape (B, C, H, W)
    device : torch.device
    dtype : torch.dtype

    Returns
    -------
    Tensor of shape (B, C, H, W)
        Ready for the stream that is current.
    """
    if device.type != "cuda" or pixels.device.type != "cpu":
        return pixels.to(device, dtype)

    side = _stream(device, "arriving")
    with torch.cuda.stream(side):
        pixels = pixels.pin_memory().to(device, dtype, non_blocking=True)
    current = torch.cuda.current_stream(device)
    current.wait_stream(side)
    pixels.record_stream(current)  # or its memory might be given away before it was read
    return pixels


@contextmanager
def in_background(device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """Work that begins now, and that only those wait for who use its results.

    On a GPU it has a stream of its own: what is in the current stream, such as scores of images before, is not kept
    waiting by it. Elsewhere all is done at once.

    Parameters
    ----------
    device : torch.device

    Yields
    ------
    callable
        A result, to be used in the stream that was current before -> the same, ready for that.

    Examples
    --------
    >>> with in_background(torch.device("cpu")) as ready:
    ...     total = torch.ones(3).sum()
    >>> ready(total)
    tensor(3.)
    """
    if device.type != "cuda":
        yield lambda result: result
        return

    current = torch.cuda.current_stream(device)
    own = _stream(device, "network")
    own.wait_stream(current)  # what it reads may just be made there
    done = torch.cuda.Event()
    with torch.cuda.stream(own):
        yield partial(_after, done, current)
        done.record(own)


def _after(done: torch.cuda.Event, stream: torch.cuda.Stream, result: Tensor) -> Tensor:
    stream.wait_event(done)
    result.record_stream(stream)
    return result


@cache
def _stream(device: torch.device, what: str) -> torch.cuda.Stream:
    """The stream for one kind of work."""
    return torch.cuda.Stream(device)
