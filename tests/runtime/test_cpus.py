"""CPUs that a process may use, and what the command line makes of them before torch is loaded."""

from __future__ import annotations

import doctest
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from featdiff.runtime import cpus
from featdiff.runtime.cpus import available_cpus, cgroup_quota, prepare_threads, thread_count, threads_sleep

linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity masks of Linux")


def process(folder: Path, groups: str, *mounts: str) -> Path:
    """A process of these cgroups and mounts (``root place type options``), as Linux would describe it."""
    described = folder / "self"
    described.mkdir()
    (described / "cgroup").write_text(groups)
    lines = ["23 1 8:1 / / rw,relatime - ext4 /dev/vda rw,discard"]
    for mount in mounts:
        root, place, kind, options = mount.split()
        lines.append(f"31 23 0:28 {root} {folder / place} rw,nosuid shared:9 - {kind} cgroup {options}")
    (described / "mountinfo").write_text("\n".join(lines) + "\n")
    return described


def limit(group: Path, quota: str, period: str = "100000", version: int = 2) -> None:
    group.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (group / "cpu.max").write_text(f"{quota} {period}\n")
    else:
        (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (group / "cpu.cfs_period_us").write_text(f"{period}\n")


# ---- cgroups ----


@pytest.mark.parametrize(
    ("quota", "expected"), [("max", math.inf), ("150000", 1.5), ("50000", 0.5), ("400000", 4.0)], ids=str
)
def test_version_2(tmp_path: Path, quota: str, expected: float) -> None:
    limit(tmp_path / "v2/jobs/ours", quota)
    assert cgroup_quota(process(tmp_path, "0::/jobs/ours\n", "/ v2 cgroup2 rw")) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", math.inf), ("150000", 3.0), ("25000", 0.5)], ids=str)
def test_version_1(tmp_path: Path, quota: str, expected: float) -> None:
    limit(tmp_path / "cpu/ours", quota, "50000", version=1)
    limit(tmp_path / "memory/ours", "1", version=1)  # not the folder that counts
    groups = "9:memory:/ours\n4:cpu,cpuacct:/ours\n0::/\n"
    mounts = ("/ memory cgroup rw,memory", "/ cpu cgroup rw,cpu,cpuacct", "/ unified cgroup2 rw")
    assert cgroup_quota(process(tmp_path, groups, *mounts)) == expected


def test_the_smallest_limit_up_to_the_root_counts(tmp_path: Path) -> None:
    limit(tmp_path / "v2/slice/service/scope", "max")
    limit(tmp_path / "v2/slice/service", "300000")
    limit(tmp_path / "v2/slice", "200000")
    described = process(tmp_path, "0::/slice/service/scope\n", "/ v2 cgroup2 rw")
    assert cgroup_quota(described) == 2.0


@pytest.mark.parametrize("path", ["/docker/abc", "/", "/docker/abc/worker", "/../other"])
def test_in_a_container_the_mount_begins_at_its_own_group(tmp_path: Path, path: str) -> None:
    limit(tmp_path / "cpu", "200000", version=1)
    assert cgroup_quota(process(tmp_path, f"4:cpu:{path}\n", "/docker/abc cpu cgroup rw,cpu")) == 2.0


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path) == math.inf
    assert cgroup_quota(process(tmp_path, "0::/gone\n", "/ v2 cgroup2 rw")) == math.inf
    assert available_cpus(tmp_path) == cpus.affinity()


# ---- CPUs ----


@pytest.mark.parametrize(("quota", "expected"), [("150000", 2), ("10000", 1), ("9900000", 8), ("max", 8)], ids=str)
def test_the_smaller_of_mask_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    monkeypatch.setattr(cpus, "affinity", lambda: 8)
    limit(tmp_path / "v2/ours", quota)
    assert available_cpus(process(tmp_path, "0::/ours\n", "/ v2 cgroup2 rw")) == expected


@linux
def test_the_mask_counts_and_not_the_machine() -> None:
    code = (
        "import os; from featdiff.runtime.cpus import available_cpus;"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(available_cpus())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "1\n"


def test_systems_without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cpus.affinity() == 6


# ---- the environment ----


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No thread settings, and torch not yet loaded."""
    for name in (*cpus.THREAD_COUNTS, *cpus.WAITING):
        monkeypatch.setenv(name, "")  # so that it is put back in any case
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return monkeypatch


def test_waiting_threads_sleep(bare: pytest.MonkeyPatch) -> None:
    assert not threads_sleep()
    prepare_threads()
    assert threads_sleep()
    assert os.environ["GOMP_SPINCOUNT"] == "5000"


@pytest.mark.parametrize("name", cpus.WAITING)
def test_how_threads_wait_is_left_to_the_user(bare: pytest.MonkeyPatch, name: str) -> None:
    bare.setenv(name, "active")
    prepare_threads()
    assert {other: os.environ.get(other) for other in cpus.WAITING if other in os.environ} == {name: "active"}
    assert not threads_sleep()


@pytest.mark.parametrize(("allowed", "expected"), [(3, "3"), (8, None)])
def test_openmp_is_told_of_a_quota(bare: pytest.MonkeyPatch, allowed: int, expected: str | None) -> None:
    bare.setattr(cpus, "affinity", lambda: 8)
    bare.setattr(cpus, "available_cpus", lambda: allowed)
    prepare_threads()
    assert os.environ.get("OMP_NUM_THREADS") == expected


@pytest.mark.parametrize("name", cpus.THREAD_COUNTS)
def test_the_number_of_threads_is_left_to_the_user(bare: pytest.MonkeyPatch, name: str) -> None:
    bare.setattr(cpus, "available_cpus", lambda: 0)
    bare.setenv(name, "7")
    prepare_threads()
    assert {other: os.environ[other] for other in cpus.THREAD_COUNTS if other in os.environ} == {name: "7"}


def test_nothing_is_set_once_torch_is_loaded(bare: pytest.MonkeyPatch) -> None:
    bare.setitem(sys.modules, "torch", object())
    prepare_threads()
    assert not any(name in os.environ for name in cpus.WAITING)


def test_the_command_line_sets_it_before_torch_is_loaded() -> None:
    """OpenMP tells what it has read when it is loaded; ``featdiff doctor`` loads torch."""
    environment = {key: value for key, value in os.environ.items() if key not in (*cpus.WAITING, "OMP_DISPLAY_ENV")}
    code = "from featdiff_cli import main; main(['doctor'])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, "OMP_DISPLAY_ENV": "true"}
    )
    if "OMP_WAIT_POLICY" not in run.stderr:
        pytest.skip("this OpenMP does not tell")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in run.stderr


def test_the_library_sets_nothing() -> None:
    code = (
        "import os; before = dict(os.environ); import featdiff, featdiff.detectors, featdiff.runtime.threads;"
        "print([name for name in os.environ if name not in before and name.startswith(('OMP', 'MKL', 'KMP', 'GOMP'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_the_example_is_true() -> None:
    assert doctest.testmod(cpus).failed == 0


@pytest.mark.parametrize(
    ("openmp", "mkl", "count"),
    [("3", "5", 3), ("", "5", 5), ("0", "two", available_cpus()), ("4,2", "", available_cpus())],
)
def test_threads_are_as_many_as_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, openmp: str, mkl: str, count: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", openmp)
    monkeypatch.setenv("MKL_NUM_THREADS", mkl)
    assert thread_count() == count
