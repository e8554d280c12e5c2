"""Checks that several test files share."""

from __future__ import annotations

from click.testing import Result


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
