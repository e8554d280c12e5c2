"""The code is clean by the README's own commands, and the benchmarks start."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
from helpers import ROOT, commands, shell


def test_code_is_clean_by_the_command_of_the_readme() -> None:
    (line,) = [command for command in commands() if "ruff" in command]
    done = shell(line.replace(".venv/bin/", f"{Path(sys.executable).parent}{os.sep}"), ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["costs.py", "lmd.py", "guard.py", "logit_heads.py", "outliers.py", "vectors.py"])
def test_benchmark_commands_of_the_readme_start(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = [command for command in commands() if script in command]
    _, file, *options = line.split()
    monkeypatch.setattr(sys, "argv", [file, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert all(option in told for option in options if option.startswith("--"))
