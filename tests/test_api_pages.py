"""The docstrings make pages, without a warning, by the command of the pages."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from helpers import ROOT
from pages import API, commands_at

import featdiff


def test_api_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    (command,) = commands_at(API)
    _, script, folder = shlex.split(command)
    assert not Path(folder).is_absolute()
    run = [sys.executable, str(ROOT / script), str(tmp_path / folder)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    pages = {page.relative_to(tmp_path / folder).as_posix() for page in (tmp_path / folder).rglob("*.html")}
    for file in (ROOT / "featdiff").rglob("*.py"):
        module = file.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__")
        assert f"{module}.html" in pages
    front = (tmp_path / folder / "featdiff.html").read_text()
    for name in featdiff.__all__:
        assert f'id="{name}"' in front
