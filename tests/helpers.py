"""What several test files share: checks of the command line, and the README as commands and blocks of code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from click.testing import Result

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fails(result: Result, code: int, *words: str) -> None:
    """One line on standard error, no traceback, not called a bug, nothing on standard output."""
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    for word in words:
        assert word in lines[0]
    assert "a bug" not in lines[0]
    assert result.stdout == ""


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def commands() -> list[str]:
    """Every line of the bash blocks."""
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line as a user would, with this environment's featdiff first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], check=False, **options)  # type: ignore[call-overload, no-any-return]
