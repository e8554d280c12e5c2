"""How images of several requests become batches of a real model, seen from within."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from http_servers import rows_of, same

from featdiff import Scores
from featdiff.data.batches import LoadedImage
from featdiff.data.references import HeldRef, ImageRef
from featdiff.serving.batching import Batcher, Busy
from featdiff.serving.metrics import Metrics
from featdiff.serving.served import Served, open_served
from featdiff.serving.settings import Settings

T = TypeVar("T")


@pytest.fixture(scope="module")
def served(exported_model: Path) -> Served:
    return open_served(Settings(model=str(exported_model)))


@pytest.fixture(scope="module")
def refs(pictures: Path) -> list[ImageRef]:
    return [HeldRef(str(file), file.read_bytes()) for file in sorted(pictures.glob("*_*.png"))[:8]]


def batched(served: Served, use: Callable[[Batcher], Awaitable[T]], **options: Any) -> T:
    """What comes of using a batcher."""

    async def run() -> T:
        settings = Settings(model="any", **options)
        batcher = Batcher(served, settings, Metrics(served.calibration))
        batcher.start()
        try:
            return await use(batcher)
        finally:
            await batcher.stop()

    return asyncio.run(run())


def noting(served: Served, sizes: list[int]) -> Served:
    """The same model, which notes how many images it is given at once."""

    def score(images: Sequence[LoadedImage]) -> Scores:
        sizes.append(len(images))
        return served.score(images)

    return replace(served, score=score)


def test_a_batch_waits_for_images_that_are_being_decoded(
    served: Served, refs: list[ImageRef], exported_model: Path, pictures: Path
) -> None:
    sizes: list[int] = []

    def slow(ref: ImageRef) -> LoadedImage:
        time.sleep(0.05)
        return served.load(ref)

    noted = replace(noting(served, sizes), load=slow)
    rows = batched(noted, lambda batcher: batcher.score(refs), max_wait=20.0, options={"workers": 2})
    assert sizes == [len(refs)]
    expected = {row["path"]: row for row in rows_of(exported_model, pictures)}
    for row in rows:
        same(row, expected[row["path"]])


def test_a_batch_does_not_wait_for_ever_nor_grow_beyond_its_size(served: Served, refs: list[ImageRef]) -> None:
    sizes: list[int] = []
    batched(noting(served, sizes), lambda batcher: batcher.score(refs), max_batch=3, max_wait=0.0)
    assert sum(sizes) == len(refs) and max(sizes) <= 3


def test_a_lone_image_does_not_wait(served: Served, refs: list[ImageRef]) -> None:
    begun = time.monotonic()
    (row,) = batched(served, lambda batcher: batcher.score(refs[:1]), max_wait=60.0)
    assert row["status"] == "ok"
    assert time.monotonic() - begun < 30


def test_an_image_that_the_model_fails_on_costs_no_other_its_row(served: Served, refs: list[ImageRef]) -> None:
    def failing(images: Sequence[LoadedImage]) -> Scores:
        if any(image.ref.path == refs[2].path for image in images):
            raise MemoryError
        return served.score(images)

    async def ask(batcher: Batcher) -> list[Any]:
        each = [batcher.score([ref]) for ref in refs]
        return await asyncio.gather(*each, return_exceptions=True)

    answers = batched(replace(served, score=failing), ask, max_wait=1.0)
    assert isinstance(answers[2], MemoryError)
    assert all(rows[0]["status"] == "ok" for i, rows in enumerate(answers) if i != 2)


def test_images_that_are_taken_back_are_not_scored(served: Served, refs: list[ImageRef]) -> None:
    sizes: list[int] = []

    async def ask(batcher: Batcher) -> list[Any]:
        gone = asyncio.create_task(batcher.score(refs[1:]))
        await asyncio.sleep(0)
        gone.cancel()
        return await batcher.score(refs[:1])

    (row,) = batched(noting(served, sizes), ask)
    assert row["path"] == refs[0].path
    assert sizes == [1]


def test_there_is_room_for_so_many(served: Served, refs: list[ImageRef]) -> None:
    async def ask(batcher: Batcher) -> list[Any]:
        return await asyncio.gather(*(batcher.score(refs[:4]) for _ in range(3)), return_exceptions=True)

    answers = batched(served, ask, max_queue=8)
    assert [isinstance(answer, Busy) for answer in answers] == [False, False, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"max_wait": -1.0}, "max_wait must be 0"),
        ({"name": "a b"}, "'a b'"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(model="any", **options)
