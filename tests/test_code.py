"""The code is clean by the README's own commands, and the benchmarks start."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from helpers import ROOT, commands, shell


def test_code_is_clean_by_the_command_of_the_readme() -> None:
    (line,) = [command for command in commands() if "ruff" in command]
    done = shell(line.replace(".venv/bin/", f"{Path(sys.executable).parent}{os.sep}"), ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["costs.py", "lmd.py"])
def test_benchmark_commands_of_the_readme_start(script: str) -> None:
    (line,) = [command for command in commands() if script in command]
    options = re.findall(r"--[a-z-]+", line)
    done = shell(f"{sys.executable} {line.split()[1]} --help", ROOT)
    assert done.returncode == 0, done.stderr
    assert options and all(option in done.stdout for option in options)
