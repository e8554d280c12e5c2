"""Programs of OpenVINO: one for any size of images, or one for each of a few sizes, and which CPUs they are tied to."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featdiff.runtime import sessions
from featdiff.runtime.sessions import OpenVinoPasses, few_at_a_time, openvino_program

openvino = pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images (B, 3, H, W) -> their means (B, 4) after a convolution, and maps (B, 4, H, W)."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            maps = self.convolution(pixels).relu()
            return maps.mean((2, 3)), maps

    example = torch.zeros(2, 3, 8, 9)
    with torch.no_grad():
        script = torch.jit.trace(Network().eval(), example)
    model = openvino.convert_model(script, example_input=example, input=[-1, 3, -1, -1])
    place = tmp_path_factory.mktemp("network") / "model.xml"
    openvino.save_model(model, place, compress_to_fp16=False)
    return place


def images(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(width).normal(size=(count, 3, height, width)).astype(np.float32)


SIZES = [(8, 9), (9, 8), (16, 16), (8, 9), (5, 7)]


def test_programs_for_sizes_give_what_the_one_for_any_size_gives(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_MOST_SIZES", 3)
    any_size = OpenVinoPasses(file, threads=1)
    with few_at_a_time():
        few = OpenVinoPasses(file, threads=1)
    for height, width in SIZES:
        for count in (1, 3, 4, 5):
            pixels = images(count, height, width)
            for own, expected in zip(few(pixels), any_size(pixels), strict=True):
                assert own.shape == expected.shape and len(own) == count
                np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-6)
    assert set(few._of_size) == {(3, 8, 9), (3, 9, 8), (3, 16, 16)}
    assert not any_size._of_size


def test_a_large_network_has_no_such_programs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_MOST_WEIGHTS", 1)
    with few_at_a_time():
        passes = OpenVinoPasses(file, threads=1)
    assert passes(images(1, 8, 9))[0].shape == (1, 4)
    assert not passes._of_size


def test_several_threads_at_once(file: Path) -> None:
    with few_at_a_time():
        passes = OpenVinoPasses(file, threads=1)
    given = [images(2, *size) for size in SIZES] * 20
    expected = [OpenVinoPasses(file, threads=1)(pixels) for pixels in given[: len(SIZES)]]
    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(passes, given)):
            for own, wanted in zip(found, expected[i % len(SIZES)], strict=True):
                np.testing.assert_allclose(own, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("threads", "pinned"), [(1, False), (2, True)])
def test_a_program_that_leaves_cpus_to_others_is_tied_to_none(
    file: Path, monkeypatch: pytest.MonkeyPatch, threads: int, pinned: bool
) -> None:
    """Else all processes with one thread are tied to the same CPU, and share it."""
    monkeypatch.setattr(sessions, "available_cpus", lambda: 2)
    program = openvino_program(openvino.Core().read_model(file), threads)
    assert program.get_property("INFERENCE_NUM_THREADS") == threads
    assert not program.get_property("ENABLE_CPU_PINNING") or pinned
