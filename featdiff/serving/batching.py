"""Images of many requests -> batches for the model, and each row back to its request."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ..data.batches import LoadedImage
from ..data.references import ImageRef
from ..runtime.cpus import available_cpus
from ..verdicts.explanation import Explanation
from ..verdicts.results import Scores
from .metrics import Metrics
from .served import Served
from .settings import Settings

#: A row of results, as :meth:`featdiff.Scores.rows` gives it.
Row = dict[str, Any]


class Busy(Exception):
    """There is no room for these images now."""


class _Waiting(NamedTuple):
    """An image that is decoded, and who wants its row."""

    image: LoadedImage
    row: asyncio.Future[Row]


class Batcher:
    """Decodes on several threads, and runs the model on one.

    While the model works on a batch, the next one gathers. A batch that is not full waits a few milliseconds, and only
    if there are accepted images that are still being decoded: a lone image never waits.

    Parameters
    ----------
    served : Served
    settings : Settings
    metrics : Metrics
    """

    def __init__(self, served: Served, settings: Settings, metrics: Metrics) -> None:
        self._served = served
        self._settings = settings
        self._metrics = metrics
        decoders = settings.options.get("workers") or min(available_cpus(), 16)
        self._decoders = ThreadPoolExecutor(decoders, thread_name_prefix="featdiff-decode")
        self._model = ThreadPoolExecutor(1, thread_name_prefix="featdiff-model")
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._held = 0  # images that are accepted and not answered
        self._decoding = 0  # those of them that are not waiting for the model yet
        self._worker: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether images are scored."""
        return self._worker is not None and not self._worker.done()

    def start(self) -> None:
        """Begin, in the running event loop."""
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """End; nobody waits for an answer any more."""
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._model.shutdown(wait=False, cancel_futures=True)

    async def score(self, refs: Sequence[ImageRef]) -> list[Row]:
        """A row for each image, in their order.

        Cancelling it takes images back that are not with the model yet.

        Raises
        ------
        Busy
            More images than there is room for.
        """
        with self._room(len(refs)):
            return list(await asyncio.gather(*map(self._row, refs)))

    async def explain(self, ref: ImageRef, nearest: int) -> Explanation:
        """The explanation of an image, between two batches; the model must have one.

        Raises
        ------
        Busy
            There is no room for it.
        """
        assert self._served.explain is not None
        with self._room(1):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._model, self._served.explain, ref, nearest)

    @contextlib.contextmanager
    def _room(self, images: int) -> Any:
        if self._held + images > self._settings.max_queue:
            raise Busy
        self._held += images
        self._metrics.held(self._held)
        try:
            yield
        finally:
            self._held -= images
            self._metrics.held(self._held)

    async def _row(self, ref: ImageRef) -> Row:
        loop = asyncio.get_running_loop()
        self._decoding += 1
        try:
            image = await loop.run_in_executor(self._decoders, self._served.load, ref)
        finally:
            self._decoding -= 1
            self._arrived.set()
        waiting = _Waiting(image, loop.create_future())
        self._waiting.append(waiting)
        return await waiting.row

    async def _work(self) -> None:
        """Batch after batch, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._gather()
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._settings.max_batch))]
            batch = [item for item in batch if not item.row.cancelled()]  # its client has gone
            if batch:
                await loop.run_in_executor(self._model, self._run, batch, loop)

    async def _gather(self) -> None:
        """Wait for an image, and then for others that are on their way."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.max_wait):
                while self._decoding and len(self._waiting) < self._settings.max_batch:
                    self._arrived.clear()
                    await self._arrived.wait()

    def _run(self, batch: list[_Waiting], loop: asyncio.AbstractEventLoop) -> None:
        """Score a batch on the thread of the model, and hand out its rows."""
        try:
            scores = self._served.score([item.image for item in batch])
        except Exception as error:
            if len(batch) > 1:  # an image that the model fails on must not cost the others their rows
                for item in batch:
                    self._run([item], loop)
            else:
                loop.call_soon_threadsafe(_fail, batch[0].row, error)
            return

        rows = list(scores.rows())
        loop.call_soon_threadsafe(self._hand_out, batch, scores, rows)

    def _hand_out(self, batch: list[_Waiting], scores: Scores, rows: list[Row]) -> None:
        self._metrics.scored(scores)
        for item, row in zip(batch, rows, strict=True):
            if not item.row.done():
                item.row.set_result(row)


def _fail(row: asyncio.Future[Row], error: Exception) -> None:
    if not row.done():
        row.set_exception(error)
