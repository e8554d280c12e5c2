"""The code is clean by the README's own commands, and the benchmark starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from helpers import ROOT, commands, shell


def test_code_is_clean_by_the_command_of_the_readme() -> None:
    (line,) = [command for command in commands() if "ruff" in command]
    done = shell(line.replace(".venv/bin/", f"{Path(sys.executable).parent}{os.sep}"), ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_benchmark_command_of_the_readme_starts() -> None:
    (line,) = [command for command in commands() if "benchmarks" in command]
    script = line.split()[1]
    done = shell(f"{sys.executable} {script} --help", ROOT)
    assert done.returncode == 0, done.stderr
    assert "--data" in done.stdout
