"""Freed memory stays in the process once there is a detector, and only where that can be set."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from featdiff.runtime.allocator import keep_freed_memory

#: Frees a block of 24 MiB (glibc would map and unmap it on its own) and prints how much stayed, in MiB.
PROGRAM = """
import ctypes, sys
from featdiff.runtime.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() is True
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
before = resident()
block = libc.malloc(ctypes.c_size_t(24 << 20))
ctypes.memset(ctypes.c_void_p(block), 1, 24 << 20)
assert resident() > before + 20
libc.free(ctypes.c_void_p(block))
print(resident() - before)
assert "torch" not in sys.modules
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")


def kept(mode: str) -> float:
    run = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return float(run.stdout)


@glibc
def test_freed_memory_is_kept_only_when_asked() -> None:
    assert kept("plain") < 5
    assert kept("keep") > 20


@glibc
def test_the_library_never_sets_it_by_itself() -> None:
    """Importing featdiff and its rooms must not change the process."""
    program = PROGRAM.replace("import ctypes, sys", "import ctypes, sys, featdiff, featdiff.exceptions")
    run = subprocess.run([sys.executable, "-c", program, "plain"], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 5


#: Scores images with a small network, each layer of which gives 4 MiB for a batch of 4, and prints how many pages of
#: memory the kernel had to clear for each image.
SCORING = """
import resource
import torch
from torch import nn
from featdiff import Detector
from featdiff.data.splits import Split
stage = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1))
images = torch.rand(24, 3, 128, 128)
part = list(range(8))
split = Split(part, [i + 8 for i in part], [i + 16 for i in part])
small = {"hidden_max": 8, "blocks": 1, "neighbors": 0, "recipe": {"epochs": 1, "min_steps": 1, "batch_size": 8}}
detector = Detector(stage.eval(), layers=["4"], fpr=0.2, device="cpu", **small)
detector.fit(iter(images.split(4)), split=split)
detector.score(iter(images.split(4)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    detector.score(iter(images.split(4)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (3 * len(images)))
"""


def faults(cache: Path, **variables: str) -> float:
    """Page faults for each image of :data:`SCORING`."""
    environment = os.environ | {"FEATDIFF_CACHE": str(cache), "OMP_NUM_THREADS": "1"} | variables
    run = subprocess.run([sys.executable, "-c", SCORING], capture_output=True, text=True, env=environment, check=True)
    return float(run.stdout)


@glibc
def test_scoring_through_the_library_reuses_memory(tmp_path: Path) -> None:
    """Some tens of pages an image; more than a thousand where each layer's output is new memory from the kernel, as
    with a threshold of the user's own, which is respected."""
    assert faults(tmp_path) < 300
    assert faults(tmp_path, MALLOC_MMAP_THRESHOLD_="131072") > 1000


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TOP_PAD_", "0"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072")]
)
def test_a_setting_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    keep_freed_memory.cache_clear()
    assert keep_freed_memory() is False
    keep_freed_memory.cache_clear()


@pytest.mark.parametrize("name", ["darwin", "win32"])
def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "platform", name)
    keep_freed_memory.cache_clear()
    assert keep_freed_memory() is False
    keep_freed_memory.cache_clear()
