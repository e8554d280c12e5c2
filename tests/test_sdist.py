"""The source distribution is complete: the tests run from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import ROOT

#: a link for checkouts; an installation knows the folder by pyproject.toml
NOT_NEEDED = {"featdiff_cli"}


def _files() -> list[str]:
    """What the repository tracks, without what was deleted and not yet committed."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone: its files are those of the distribution")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def _copy(names: list[str], folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)


def _build(kind: str, source: Path, target: Path) -> Path:
    """Build with the backend that pip would call, in a process of its own."""
    target.mkdir()
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(target)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = target.iterdir()
    return file


def test_source_distribution_holds_every_tracked_file(tmp_path: Path) -> None:
    names = _files()
    _copy(names, tmp_path / "clone")
    with tarfile.open(_build("sdist", tmp_path / "clone", tmp_path / "dist")) as archive:
        packed = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert set(names) - NOT_NEEDED - packed == set()

    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in packed - set(names) - made if ".egg-info/" not in name} == set()


def test_a_wheel_from_the_source_distribution_holds_commands_and_presets(tmp_path: Path) -> None:
    _copy(_files(), tmp_path / "clone")
    sdist = _build("sdist", tmp_path / "clone", tmp_path / "dist")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):  # not before Python 3.11.4
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    wheel = _build("wheel", source, tmp_path / "wheels")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    for folder, name in (("featdiff", "featdiff"), ("cli", "featdiff_cli"), ("configs", "featdiff_cli/configs")):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".toml", ".html", ".css", ".js") or file.name == "py.typed":
                assert (tmp_path / "site" / name / file.relative_to(ROOT / folder)).is_file(), file
