"""``FEATDIFF_*`` variables: those that mean something work, and a misspelt one is named."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
from click.testing import Result
from helpers import FEATDIFF, ROOT
from pages import read

(_script,) = entry_points(group="console_scripts", name="featdiff")
MAIN: click.Group = _script.load()


@pytest.fixture
def warnings_of(featdiff_cli: Callable[..., Result], tiny_model: Path) -> Callable[..., list[str]]:
    """What ``featdiff info`` says on standard error with these variables."""

    def run(**variables: str) -> list[str]:
        done = featdiff_cli("info", tiny_model, env=variables)
        assert done.exit_code == 0, done.stderr
        assert "backbone" in done.stdout
        return done.stderr.splitlines()

    return run


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("FEATDIFF_CAHCE", "; did you mean FEATDIFF_CACHE?"),
        ("FEATDIFF_INFO_JASON", "; did you mean FEATDIFF_INFO_JSON?"),
        ("FEATDIFF_SCORRE_FPR", ""),  # no such command; options of others are not known
        ("FEATDIFF_ZZZZZZZZZZZZ", ""),
    ],
)
def test_unknown_ones_are_named_once(warnings_of: Callable[..., list[str]], variable: str, hint: str) -> None:
    (line,) = warnings_of(**{variable: "1"})
    assert line.startswith(f"WARNING: nothing reads the environment variable {variable}")
    assert not hint or hint in line


@pytest.mark.parametrize(
    "variable",
    ["FEATDIFF_CACHE", "FEATDIFF_LOG_SECONDS", "FEATDIFF_VERSION", "FEATDIFF_SCORE_FPR", "FEATDIFF_SCORE_ANYTHING"],
)
def test_known_ones_are_not(warnings_of: Callable[..., list[str]], variable: str, tmp_path: Path) -> None:
    """Options of other commands are not looked at; a version is not taken for the option ``--version``."""
    assert warnings_of(**{variable: str(tmp_path)}) == []


def test_the_command_that_is_run_knows_its_options(featdiff_cli: Callable[..., Result]) -> None:
    done = featdiff_cli("backbones", "nothing-is-called-so", env={"FEATDIFF_BACKBONES_PATERN": "x"})
    assert "FEATDIFF_BACKBONES_PATERN" in done.stderr


def test_a_variable_is_called_as_the_option_is(
    featdiff_cli: Callable[..., Result], tiny_model: Path, few_images: Path
) -> None:
    """``--format`` and ``--batch-size`` are parameters of other names."""
    variables = {"FEATDIFF_SCORE_FORMAT": "jsonl", "FEATDIFF_SCORE_BATCH_SIZE": "3"}
    done = featdiff_cli("score", few_images, "-m", tiny_model, "-q", env=variables)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith('{"path"')
    done = featdiff_cli("score", few_images, "-m", tiny_model, "-q", env={"FEATDIFF_SCORE_BATCH_SIZE": "0"})
    assert done.exit_code == 2 and "--batch-size" in done.stderr
    done = featdiff_cli("score", few_images, "-m", tiny_model, "-q", "--format", "csv", env=variables)
    assert done.stdout.startswith("path,")  # the command line wins


def test_no_command_takes_a_variable_of_another() -> None:
    """``FEATDIFF_LOG_SECONDS`` would be an option of a command ``log``."""
    context = click.Context(MAIN)
    names: dict[str, str] = {}
    for name in MAIN.list_commands(context):
        assert not any(variable.startswith(f"FEATDIFF_{name.upper()}_") for variable in documented())
        command = MAIN.get_command(context, name)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option) and isinstance(option.envvar, str):
                assert option.envvar in documented() or names.setdefault(option.envvar, name) == name


def documented() -> set[str]:
    """Variables in the table of the page."""
    table = read("cli/README.md").partition("## Environment variables")[2]
    return set(re.findall(r"^\| `(FEATDIFF_[A-Z_]+)`", table, flags=re.M))


def test_the_page_lists_all_that_are_read() -> None:
    """Whatever the code calls by its whole name."""
    files = [file for room in ("cli", "featdiff") for file in (ROOT / room).rglob("*.py")]
    named = {name for file in files for name in re.findall(r'"(FEATDIFF_[A-Z_]*[A-Z])"', file.read_text())}
    assert named - {"FEATDIFF_VERSION"} == documented()
    from featdiff_cli.environment import VARIABLES

    assert set(VARIABLES) == documented()


def test_help_is_as_fast_with_a_variable_that_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of it, and nothing more is imported."""
    monkeypatch.setenv("FEATDIFF_CAHCE", "x")
    code = """
import sys
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="featdiff")
main = script.load()
try:
    main(["--help"])
finally:
    print(sorted({"torch", "difflib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""
    start = time.perf_counter()
    subprocess.run([FEATDIFF, "--help"], check=True, capture_output=True)
    assert time.perf_counter() - start < 5  # on a busy machine; half a second on an idle one
