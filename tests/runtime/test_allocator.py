"""The memory setting of the command line: it really keeps freed memory, and only where it can."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from featdiff.runtime import allocator

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


@pytest.mark.parametrize("name", ["darwin", "win32"])
def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "platform", name)
    assert allocator.keep_freed_memory() is False
