"""How many CPUs this process may use, and how its threads wait. Imports no torch: the command line asks before that."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

#: Environment variables with which users say how many threads there are, and how they wait.
THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# Rounds of GNU's OpenMP, tens of microseconds: measured (tests/benchmarks/RESULTS.md, threads).
_SPIN_COUNT = "5000"


def available_cpus(process: Path = Path("/proc/self")) -> int:
    """CPUs that this process may use: those of its affinity mask, or fewer where a cgroup limits their time.

    ``os.cpu_count()`` names all CPUs of the machine, also in a container that may use two of them.

    Parameters
    ----------
    process : Path, default "/proc/self"
        Where Linux describes the process.

    Returns
    -------
    int
        At least 1. A share of a CPU counts as one.

    Examples
    --------
    >>> 1 <= available_cpus() <= os.cpu_count()
    True
    """
    cpus = affinity()
    quota = cgroup_quota(process)
    return min(cpus, max(1, math.ceil(quota))) if math.isfinite(quota) else cpus


def affinity() -> int:
    """CPUs of the affinity mask; without such a mask (macOS, Windows), all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cgroup_quota(process: Path = Path("/proc/self")) -> float:
    """How many CPUs' time the cgroups of this process allow, version 1 or 2.

    Parameters
    ----------
    process : Path, default "/proc/self"
        Where Linux describes the process.

    Returns
    -------
    float
        The smallest of all limits from the process's group up to the root; inf without one.
    """
    try:
        groups = (process / "cgroup").read_text()
        mounts = (process / "mountinfo").read_text()
    except OSError:  # not Linux
        return math.inf
    return min((_limit(folder) for folder in _cpu_groups(groups, mounts)), default=math.inf)


def _cpu_groups(groups: str, mounts: str) -> Iterator[Path]:
    """Folders of the cgroups that limit CPU time, from ``/proc/self/cgroup`` and ``/proc/self/mountinfo``."""
    paths = {}
    for line in groups.splitlines():
        _, controllers, group = line.split(":", 2)
        for name in controllers.split(","):  # empty for version 2
            paths[name] = PurePosixPath(group)

    for line in mounts.splitlines():
        place, _, source = line.partition(" - ")
        kind, *_, options = source.split()
        if kind == "cgroup2":
            path = paths.get("")
        elif kind == "cgroup" and "cpu" in options.split(","):
            path = paths.get("cpu")
        else:
            continue

        root, mounted = place.split()[3:5]
        below = PurePosixPath()
        if path and path.is_relative_to(root) and ".." not in path.parts:
            below = path.relative_to(root)  # else a container sees nothing but its own group
        for folder in (below, *below.parents):
            yield Path(mounted, folder)


def _limit(group: Path) -> float:
    """CPUs' time of one cgroup; inf without a limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # the root has no such file; "max" and -1 mean no limit
        return math.inf


def prepare_threads() -> None:
    """Let waiting threads of this process sleep, and start no more of them than its cgroup has time for.

    By default OpenMP's threads spin for milliseconds while they wait for each other. On a machine whose cores are busy,
    they wait for a thread that waits for a core, and small networks train ten to a hundred times slower. A few
    microseconds of spinning cost little there, and bridge the gaps between operations on an idle machine.

    OpenMP reads these variables once, when torch is loaded. They hold for the whole process, so the command line sets
    them, and the library never does. What the user has set stays.
    """
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT

    cpus = available_cpus()
    if cpus < affinity() and not any(name in os.environ for name in THREAD_COUNTS):
        os.environ["OMP_NUM_THREADS"] = str(cpus)  # OpenMP knows the affinity mask, but not the cgroup


def thread_count() -> int:
    """Threads for numbers: as many as the environment says, else one for each usable CPU."""
    for name in THREAD_COUNTS:
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 0:
            return int(count)
    return available_cpus()


def threads_sleep() -> bool:
    """Whether OpenMP's threads sleep while they wait, as far as the environment says."""
    return os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive"
