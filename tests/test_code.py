"""The code is clean by the pages' own command, and the benchmarks and fuzzers start."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
from helpers import ROOT, shell
from pages import LINT, SCRIPT, commands_at


def test_code_is_clean_by_the_command_of_the_page() -> None:
    (line,) = commands_at(LINT)
    for tool in ("ruff check", "ruff format --check", "mypy"):
        assert tool in line
    done = shell(line.replace(".venv/bin/", f"{Path(sys.executable).parent}{os.sep}"), ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


BENCHMARKS = sorted(f"benchmarks/{file.name}" for file in (ROOT / "tests" / "benchmarks").glob("*.py"))
FUZZERS = ["fuzz/run.py", "fuzz/kills.py", "fuzz/soak.py"]


@pytest.mark.parametrize("script", BENCHMARKS + FUZZERS)
def test_commands_of_the_pages_start(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each script stands on a page, and knows the options that are given there."""
    lines = [command for command in commands_at(SCRIPT) if script in command]
    assert lines, f"no page says how to run {script}"
    for line in lines:
        _, file, *options = line.split()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [file, "--help"])
            patch.syspath_prepend(str((ROOT / file).parent))  # as when it is run
            with pytest.raises(SystemExit) as left:
                runpy.run_path(str(ROOT / file), run_name="__main__")
        assert left.value.code == 0
        told = capsys.readouterr().out
        assert all(option in told for option in options if option.startswith("--"))
