"""Images are loaded in order and in parallel; what fails gets a reason."""

from __future__ import annotations

import io
import os
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from image_files import (
    encoded,
    grey_refs,
    never,
    noise,
    pixels_of,
    to_tensor,
)
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from featdiff.data import batches
from featdiff.data.batches import Batch, LoadedImage, iter_batches, iter_loaded, load
from featdiff.data.loaders import batches_from_loader, is_loader
from featdiff.data.references import HeldRef, ImageRef, MissingRef, TarMemberRef, list_images
from featdiff.exceptions import UnreadableImage, UsageError
from featdiff.runtime.waiting import Stopwatch

# ---- load ----


def test_load_gives_transformed_pixels_and_the_given_reference(tmp_path: Path) -> None:
    image = noise(3, 5)
    (tmp_path / "a.png").write_bytes(encoded(image))
    (ref,) = list_images(tmp_path / "a.png")
    loaded = load(ref, lambda picture: to_tensor(picture) / 255)
    assert loaded.ref is ref
    assert loaded.reason == ""
    assert loaded.pixels is not None
    assert torch.equal(loaded.pixels, to_tensor(image) / 255)


def digest(content: bytes | Image.Image) -> bytes:
    return load(HeldRef("x", content), to_tensor).digest


def test_digest_depends_on_the_content_alone(tmp_path: Path) -> None:
    data = encoded(noise())
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(data)
    found = {load(ref, to_tensor).digest for ref in list_images(tmp_path)}
    assert found == {digest(data)}
    assert len(digest(data)) == 16
    assert digest(encoded(noise(seed=1))) != digest(data)


def _palette(*colours: int) -> Image.Image:
    image = Image.new("P", (2, 2))
    image.putpalette(colours)
    return image


def _turned(orientation: int) -> Image.Image:
    image = noise(4, 4)
    image.getexif()[0x0112] = orientation
    return image


def _clear(index: int) -> Image.Image:
    image = _palette(255, 0, 0)
    image.info["transparency"] = index
    return image


DIFFERENT: dict[str, tuple[Callable[[], Image.Image], Callable[[], Image.Image]]] = {
    "pixels": (lambda: noise(), lambda: noise(seed=1)),
    "shape": (lambda: Image.new("L", (2, 8)), lambda: Image.new("L", (4, 4))),
    "palette": (lambda: _palette(255, 0, 0), lambda: _palette(0, 0, 255)),
    "orientation": (lambda: _turned(1), lambda: _turned(6)),
    "transparency": (lambda: _clear(0), lambda: _clear(1)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_pictures_in_memory_that_look_different_have_different_digests(what: str) -> None:
    """Features are stored by digest: an equal one would give this picture the features of the other."""
    first, second = DIFFERENT[what]
    assert not np.array_equal(pixels_of(first()), pixels_of(second()))
    assert digest(first()) != digest(second())
    assert digest(first()) == digest(first())


@pytest.mark.parametrize("content", [encoded(noise()), b"text", encoded(noise())[:900]], ids=["good", "text", "cut"])
def test_known_content_is_not_decoded(content: bytes) -> None:
    known = {digest(content)}
    loaded = load(HeldRef("x", content), never, known=known)
    assert (loaded.pixels, loaded.reason, loaded.digest) == (None, "", *known)


def test_known_pictures_in_memory_are_not_transformed() -> None:
    known = {digest(noise())}
    loaded = load(HeldRef("x", noise()), never, known=known)
    assert (loaded.pixels, loaded.reason, loaded.digest) == (None, "", *known)


def test_known_is_asked_while_others_are_loaded() -> None:
    refs = grey_refs(6)
    known = {load(ref, to_tensor).digest for ref in refs[::2]}
    loaded = list(iter_loaded(refs, to_tensor, workers=3, known=known))
    assert [item.pixels is None for item in loaded] == [True, False] * 3
    assert [item.reason for item in loaded] == [""] * 6


class Failing:
    """A transform that fails as it is told to."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, image: Image.Image) -> torch.Tensor:
        raise self.error


ERRORS: list[tuple[Exception, str]] = [
    (ValueError("no such\nsize"), "no such size"),
    (OSError(28, "No space left on device"), "no space left"),
    (OSError("broken"), "broken"),
    (MemoryError(), "not enough memory"),
    (KeyError(), "KeyError"),
    (zlib.error("Error -3"), "Error -3"),
    (UnreadableImage("too dark"), "too dark"),
    (OSError(), ""),
    (OSError("two\nlines"), "two lines"),
]


@pytest.mark.parametrize(("error", "words"), ERRORS, ids=[repr(error) for error, _ in ERRORS])
def test_every_failure_is_a_reason_of_one_line(error: Exception, words: str) -> None:
    """An empty reason would mean that the features of the image are known."""
    loaded = load(HeldRef("x", noise()), Failing(error))
    assert loaded.pixels is None
    assert loaded.reason
    assert "\n" not in loaded.reason
    assert words in loaded.reason


def test_missing_reference_keeps_its_reason() -> None:
    assert load(MissingRef("x", "gone"), to_tensor) == LoadedImage(MissingRef("x", "gone"), reason="gone")


# ---- iter_loaded ----


def decode_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("featdiff-decode")]


@pytest.mark.parametrize("workers", [1, 3, 16, None])
@pytest.mark.parametrize("ahead", [1, 5, 64])
def test_order_is_kept(workers: int | None, ahead: int) -> None:
    """The first images take longest."""

    def slow(image: Image.Image) -> torch.Tensor:
        value = to_tensor(image)
        time.sleep(0.01 if int(value[0, 0, 0]) % 8 == 0 else 0)
        return value

    refs = grey_refs(40)
    loaded = list(iter_loaded(refs, slow, workers=workers, ahead=ahead))
    assert [item.ref for item in loaded] == refs
    assert [int(item.pixels[0, 0, 0]) for item in loaded] == list(range(40))  # type: ignore[index]
    assert decode_threads() == []


def test_no_references() -> None:
    assert list(iter_loaded([], to_tensor)) == []


def test_images_are_decoded_at_the_same_time() -> None:
    """Three transforms that wait for each other."""
    barrier = threading.Barrier(3, timeout=20)

    def meet(image: Image.Image) -> torch.Tensor:
        barrier.wait()
        return to_tensor(image)

    assert [item.reason for item in iter_loaded(grey_refs(6), meet, workers=3)] == [""] * 6


def test_the_time_that_is_waited_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller does with images is not; what is decoded meanwhile is not waited for."""
    watch = Stopwatch()
    monkeypatch.setattr(batches, "WAITED", watch)

    def slow(picture: Image.Image) -> torch.Tensor:
        time.sleep(0.1)
        return to_tensor(picture)

    for _ in iter_loaded(grey_refs(4), slow, workers=1):
        pass
    assert watch.seconds > 0.35

    waited = watch.seconds
    images = iter_loaded(grey_refs(4), slow, workers=4)
    next(images)
    waited = watch.seconds - waited
    assert waited > 0.05
    time.sleep(0.5)
    before = watch.seconds
    assert len(list(images)) == 3
    assert watch.seconds - before < 0.1


def test_reading_in_order_is_waited_for(compressed_tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch()
    monkeypatch.setattr(batches, "WAITED", watch)
    held = TarMemberRef.held

    def slow(self: TarMemberRef, max_bytes: int) -> ImageRef:
        time.sleep(0.02)
        return held(self, max_bytes)

    monkeypatch.setattr(TarMemberRef, "held", slow)
    refs = list_images(compressed_tar)
    assert len(list(iter_loaded(refs, to_tensor))) == len(refs)
    assert watch.seconds > 0.02 * len(refs)


def test_there_are_as_many_threads_as_cpus_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(batches, "available_cpus", lambda: 2)
    seen: set[str] = set()

    def slow(image: Image.Image) -> torch.Tensor:
        seen.add(threading.current_thread().name)
        time.sleep(0.005)
        return to_tensor(image)

    assert len(list(iter_loaded(grey_refs(40), slow))) == 40
    assert len(seen) == 2


@dataclass(frozen=True)
class CountedRef(ImageRef):
    """A reference that tells when, and on which thread, it was read."""

    log: list[tuple[str, int]] = field(compare=False)

    def read(self) -> Image.Image:
        self.log.append((self.path, threading.get_ident()))
        return Image.new("L", (2, 2))


class SequentialRef(CountedRef):
    sequential: ClassVar[bool] = True


@pytest.mark.parametrize("kind", [CountedRef, SequentialRef])
@pytest.mark.parametrize("ahead", [1, 4, 16])
def test_at_most_ahead_images_are_held(kind: type[CountedRef], ahead: int) -> None:
    log: list[tuple[str, int]] = []
    refs = [kind(str(i), log) for i in range(60)]
    for given, _ in enumerate(iter_loaded(refs, to_tensor, workers=8, ahead=ahead)):
        time.sleep(0.001)  # time enough for the workers to run too far
        assert len(log) <= given + ahead
    assert len(log) == 60


@pytest.mark.parametrize("way", ["close", "interrupt", "forget"])
def test_threads_end_and_work_stops_when_the_caller_stops(way: str) -> None:
    log: list[tuple[str, int]] = []
    refs = [CountedRef(str(i), log) for i in range(500)]
    stream: Iterator[LoadedImage] | None = iter_loaded(refs, to_tensor, workers=4, ahead=20)
    assert [next(stream).ref.path for _ in range(3)] == ["0", "1", "2"]  # type: ignore[arg-type]
    assert decode_threads()
    if way == "close":
        stream.close()  # type: ignore[union-attr]
    elif way == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            stream.throw(KeyboardInterrupt())  # type: ignore[union-attr]
    else:
        stream = None
    assert decode_threads() == []
    assert len(log) <= 3 + 20


def test_waiting_images_are_not_decoded_once_the_caller_stops() -> None:
    started: list[Image.Image] = []

    def slow(image: Image.Image) -> torch.Tensor:
        started.append(image)
        time.sleep(0.05)
        return to_tensor(image)

    stream = iter_loaded(grey_refs(40), slow, workers=1, ahead=30)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(started) < 20


def test_nothing_is_read_before_the_first_image_is_asked_for() -> None:
    log: list[tuple[str, int]] = []
    stream = iter_loaded([CountedRef("0", log)], to_tensor)
    assert (log, decode_threads()) == ([], [])
    stream.close()  # type: ignore[attr-defined]


def test_sequential_references_are_read_in_order_on_one_thread() -> None:
    log: list[tuple[str, int]] = []
    refs = [SequentialRef(str(i), log) for i in range(30)]
    assert len(list(iter_loaded(refs, to_tensor, workers=8))) == 30
    assert log == [(str(i), threading.get_ident()) for i in range(30)]


@pytest.fixture
def compressed_tar(tmp_path: Path) -> Path:
    """30 grey pictures 0, 1 ..., whose names are not sorted, and one that is text."""
    file = tmp_path / "data.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for i in range(31):
            data = encoded(Image.new("L", (2, 2), i)) if i != 7 else b"text"
            info = tarfile.TarInfo(f"{i * 7 % 31:02d}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def test_compressed_tar_is_read_in_its_order(compressed_tar: Path) -> None:
    refs = list_images(compressed_tar)
    loaded = list(iter_loaded(refs, to_tensor, workers=8, ahead=5))
    assert [Path(item.ref.path).name for item in loaded] == [f"{i * 7 % 31:02d}.png" for i in range(31)]
    values = [None if item.pixels is None else int(item.pixels[0, 0, 0]) for item in loaded]
    assert values == [i if i != 7 else None for i in range(31)]
    assert "not an image" in loaded[7].reason


def test_images_of_a_compressed_tar_do_not_keep_its_bytes(compressed_tar: Path) -> None:
    """A batch holds 16 times as many known images as decoded ones; their file contents must be gone."""
    refs = list_images(compressed_tar)
    loaded = list(iter_loaded(refs, to_tensor))
    assert [type(item.ref) for item in loaded] == [TarMemberRef] * 31
    assert [item.ref for item in loaded] == refs


def test_compressed_tar_that_vanishes_becomes_rows(tmp_path: Path) -> None:
    refs = [TarMemberRef(f"x/{i}.png", str(tmp_path / "x.tar.gz"), f"{i}.png") for i in range(3)]
    loaded = list(iter_loaded(refs, to_tensor))
    assert [item.ref.path for item in loaded] == ["x/0.png", "x/1.png", "x/2.png"]
    assert all("no such file" in item.reason.lower() for item in loaded)


def test_kinds_may_be_mixed(compressed_tar: Path) -> None:
    refs: list[ImageRef] = []
    for sequential, other in zip(list_images(compressed_tar)[:6], grey_refs(6), strict=True):
        refs += [sequential, other, MissingRef(f"gone{len(refs)}", "gone")]
    loaded = list(iter_loaded(refs, to_tensor, workers=4, ahead=3))
    values = [item.reason or int(item.pixels[0, 0, 0]) for item in loaded]  # type: ignore[index]
    assert values == [value for i in range(6) for value in (i, i, "gone")]


# ---- iter_batches ----


def loaded_images(kinds: str) -> Iterator[LoadedImage]:
    """``d`` decoded, ``k`` known, ``x`` unreadable; decoded pixels tell their place."""
    for i, kind in enumerate(kinds):
        pixels = torch.full((3, 2, 2), float(i)) if kind == "d" else None
        yield LoadedImage(MissingRef(str(i), ""), b"", pixels, "bad" if kind == "x" else "")


def shapes(batches: Iterator[Batch]) -> list[tuple[int, int]]:
    """(images, decoded ones) of each batch, after checking that they fit together."""
    found = []
    place = 0
    for batch in batches:
        assert [item.ref.path for item in batch.loaded] == [str(place + i) for i in range(len(batch.loaded))]
        assert all(item.pixels is None for item in batch.loaded)  # they are held once, in the stacks
        assert len(batch.stacks) == min(1, len(batch.decoded))
        for stack in batch.stacks:
            assert stack.positions == batch.decoded
            assert stack.pixels[:, 0, 0, 0].tolist() == [place + i for i in stack.positions]
        found.append((len(batch.loaded), len(batch.decoded)))
        place += len(batch.loaded)
    return found


@pytest.mark.parametrize(
    ("kinds", "size", "expected"),
    [
        ("", 4, []),
        ("d", 4, [(1, 1)]),
        ("dddd", 4, [(4, 4)]),
        ("ddddd", 4, [(4, 4), (1, 1)]),
        ("ddd", 1, [(1, 1)] * 3),
        ("xdkdxdx", 2, [(4, 2), (3, 1)]),
        ("x" * 33, 2, [(32, 0), (1, 0)]),
        ("k" * 31 + "dd", 2, [(32, 1), (1, 1)]),
        ("d" + "k" * 40, 2, [(32, 1), (9, 0)]),
    ],
)
def test_batch_sizes(kinds: str, size: int, expected: list[tuple[int, int]]) -> None:
    assert shapes(iter_batches(loaded_images(kinds), size)) == expected


def test_batches_come_as_soon_as_they_are_full() -> None:
    source = loaded_images("d" * 10)
    next(iter_batches(source, 3))
    assert next(source).ref.path == "3"


# ---- batches of several shapes ----


def mixed_images(kinds: str) -> Iterator[LoadedImage]:
    """A letter is a shape, ``k`` known, ``x`` unreadable; decoded pixels tell their place."""
    for i, kind in enumerate(kinds):
        side = ord(kind) - ord("A") + 1
        pixels = torch.full((3, 2, side), float(i)) if kind.isupper() else None
        yield LoadedImage(MissingRef(str(i), ""), b"", pixels, "bad" if kind == "x" else "")


def stacks(batch: Batch, kinds: str) -> list[str]:
    """Each stack as letters, after checking that every image is where it belongs."""
    found = []
    first = int(batch.loaded[0].ref.path)
    for stack in batch.stacks:
        assert stack.positions == sorted(stack.positions)
        assert stack.pixels[:, 0, 0, 0].tolist() == [first + i for i in stack.positions]
        found.append("".join(kinds[first + i] for i in stack.positions))
    return found


@pytest.mark.parametrize(
    ("kinds", "size", "expected"),
    [
        ("AAAA", 2, [["AA"], ["AA"]]),
        ("AB", 2, [["A", "B"]]),
        ("ABABABAB", 2, [["AA", "AA", "BB", "BB"]]),
        ("ABABABABA", 2, [["AA", "AA", "BB", "BB"], ["A"]]),
        ("AAABAAAAA", 4, [["AAAA", "AAAA", "B"]]),
        ("AAAABAAAA", 4, [["AAAA"], ["B", "AAAA"]]),
        ("ABCDE", 1, [["A"], ["B"], ["C"], ["D"], ["E"]]),
        ("xAkBxA", 2, [["AA", "B"]]),
        ("x" * 31 + "AB", 2, [["A"], ["B"]]),
    ],
)
def test_stacks_of_a_batch(kinds: str, size: int, expected: list[list[str]]) -> None:
    """A batch of one shape is as large as ever; one of several shapes waits for up to four times as many."""
    batches = list(iter_batches(mixed_images(kinds), size))
    assert [stacks(batch, kinds) for batch in batches] == expected
    assert [item.ref.path for batch in batches for item in batch.loaded] == [str(i) for i in range(len(kinds))]
    decoded = [i for i, kind in enumerate(kinds) if kind.isupper()]
    starts = np.cumsum([0, *(len(batch.loaded) for batch in batches)])
    found = [start + i for start, batch in zip(starts, batches, strict=False) for i in batch.decoded]
    assert found == decoded


@pytest.mark.parametrize("size", [1, 2, 5, 32])
def test_memory_of_mixed_shapes_is_bounded(size: int) -> None:
    kinds = "".join("ABCDEFGHI"[i * 7 % 9] for i in range(500))
    for batch in iter_batches(mixed_images(kinds), size):
        assert sum(len(stack.pixels) for stack in batch.stacks) <= 4 * size
        assert max(len(stack.pixels) for stack in batch.stacks) <= size
        assert all(item.pixels is None for item in batch.loaded)


# ---- loaders ----

TILES = torch.randn(10, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def check_loader_batches(batches: Sequence[Batch], sizes: list[int]) -> None:
    assert [len(batch.loaded) for batch in batches] == sizes
    names = [item.ref.path for batch in batches for item in batch.loaded]
    assert names == [f"loader[{i}]" for i in range(10)]
    assert torch.equal(torch.cat([stack.pixels for batch in batches for stack in batch.stacks]), TILES)
    assert all(batch.decoded == list(range(len(batch.loaded))) for batch in batches)


def test_data_loader_of_tensors() -> None:
    images: Any = TILES
    check_loader_batches(list(batches_from_loader(DataLoader(images, batch_size=4))), [4, 4, 2])


def test_data_loader_with_labels() -> None:
    loader = DataLoader(TensorDataset(TILES, torch.arange(10)), batch_size=4)
    check_loader_batches(list(batches_from_loader(loader)), [4, 4, 2])


def test_generator_of_batches() -> None:
    check_loader_batches(list(batches_from_loader(part for part in TILES.split(3))), [3, 3, 3, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_loader_batches_of_every_float_type_become_float32(dtype: torch.dtype) -> None:
    (batch,) = batches_from_loader([TILES.to(dtype)])
    (stack,) = batch.stacks
    assert stack.pixels.dtype == torch.float32
    assert torch.equal(stack.pixels, TILES.to(dtype).float())
    assert len({item.digest for item in batch.loaded}) == 10


def test_loader_batches_that_need_a_gradient_or_are_not_contiguous() -> None:
    strange = TILES.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_()
    (batch,) = batches_from_loader([strange])
    (plain,) = batches_from_loader([TILES])
    assert [item.digest for item in batch.loaded] == [item.digest for item in plain.loaded]


def test_known_images_of_a_loader_are_not_passed_on() -> None:
    (batch,) = batches_from_loader([TILES])
    digests = [item.digest for item in batch.loaded]
    assert len(set(digests)) == 10
    first, second = batches_from_loader(TILES.split(5), known=set(digests[:6]))
    assert (first.stacks, first.decoded, len(first.loaded)) == ([], [], 5)
    assert second.decoded == [1, 2, 3, 4]
    assert torch.equal(second.stacks[0].pixels, TILES[6:])
    assert [item.reason for item in second.loaded] == [""] * 5


def test_empty_loader_and_empty_batch() -> None:
    assert list(batches_from_loader([])) == []
    (batch,) = batches_from_loader([torch.zeros(0, 3, 4, 4)])
    assert (batch.loaded, batch.stacks, batch.decoded) == ([], [], [])


def test_batches_of_a_mapping_and_of_grey_images() -> None:
    grey = torch.rand(2, 1, 4, 4)
    named, plain = batches_from_loader([{"pixel_values": grey, "labels": [0, 1]}, grey])
    assert torch.equal(named.stacks[0].pixels, grey)
    assert [item.digest for item in named.loaded] == [item.digest for item in plain.loaded]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (torch.zeros(3, 4, 4), r"\(3, 4, 4\)"),
        (torch.zeros(2, 1, 3, 4, 4), r"\(2, 1, 3, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"uint8"),
        ({"pixels": torch.zeros(2, 3, 4, 4)}, "dict"),
        ((torch.arange(2), torch.zeros(2, 3, 4, 4)), r"\(2,\)"),
        ([torch.zeros(3, 4, 4)] * 2, r"\(3, 4, 4\)"),
        (np.zeros((2, 3, 4, 4), np.float32), "ndarray"),
        ((), "tuple"),
        ("a.png", "str"),
        (Path("a.png"), "Path"),
        (None, "None"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_other_batches_are_usage_errors_that_say_what_is_taken(item: object, words: str) -> None:
    with pytest.raises(UsageError, match=rf"\(B, C, H, W\).*{words}"):
        list(batches_from_loader([TILES, item]))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (DataLoader(TensorDataset(TILES)), True),
        ((batch for batch in [TILES]), True),
        ("images/", False),
        (Path("images"), False),
        (["a.png"], False),
        (("a.png",), False),
        (np.zeros((4, 4)), False),
        (TILES, False),
        (Image.new("L", (2, 2)), False),
        (None, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_a_loader(source: object, expected: bool) -> None:
    assert is_loader(source) is expected
