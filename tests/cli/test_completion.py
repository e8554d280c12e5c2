"""Completion in a shell: paths wherever a command takes one, by click's machinery and in a real bash."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from helpers import FEATDIFF
from pages import COMPLETION, commands_at

(_script,) = entry_points(group="console_scripts", name="featdiff")
MAIN: click.Group = _script.load()

#: Parameters of plain text that are no paths.
WORDS = {"backbone", "view", "layers", "device", "distances", "formats", "train_from", "pattern"}
WORDS |= {"license", "log_to", "message", "ray", "revision", "shard"}
WORDS |= {"api_key", "host", "name"}  # of serve
WORDS |= {"on_alarm"}  # of watch
OTHERS = (click.Choice, click.IntRange, type(click.INT), type(click.FLOAT))


def completed(*words: str) -> list[tuple[str, str]]:
    """(type, value) of what is offered for the last word."""
    items = ShellComplete(MAIN, {}, "featdiff", "_FEATDIFF_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [(item.type, item.value) for item in items]


def parameters() -> Iterator[tuple[str, click.Parameter]]:
    """All that take a value which is neither a number nor one of a few words."""
    context = click.Context(MAIN)
    for name in MAIN.list_commands(context):
        command = MAIN.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            is_flag = isinstance(parameter, click.Option) and parameter.is_flag
            if not is_flag and not isinstance(parameter.type, OTHERS) and parameter.name not in WORDS:
                yield name, parameter


def test_engines_are_those_of_the_library() -> None:
    from featdiff.features.engines import ENGINES

    context = click.Context(MAIN)
    commands = [MAIN.get_command(context, name) for name in MAIN.list_commands(context)]
    offered = [p.type.choices for command in commands if command for p in command.params if p.name == "engine"]
    assert len(offered) > 5
    assert set(map(tuple, offered)) == {ENGINES}


@pytest.mark.parametrize(("command", "parameter"), [pytest.param(*p, id=f"{p[0]}-{p[1].name}") for p in parameters()])
def test_every_parameter_that_is_a_path_completes_one(command: str, parameter: click.Parameter) -> None:
    option = [max(parameter.opts, key=len)] if isinstance(parameter, click.Option) else []
    ((kind, value),) = completed(command, *option, "pho")
    assert kind in ("file", "dir")
    assert value == "pho"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("score", "new_im"), ("file", "new_im")),
        (("score", "a.png", "b"), ("file", "b")),
        (("score", "-m", "mod"), ("dir", "mod")),
        (("score", "a.png", "-o", "sc"), ("file", "sc")),
        (("score", "--copy-to", "fl"), ("dir", "fl")),
        (("eval", "--ood", "digits=di"), ("file", "digits=di")),
        (("info", ""), ("dir", "")),
    ],
    ids=str,
)
def test_paths(words: tuple[str, ...], expected: tuple[str, str]) -> None:
    assert completed(*words) == [expected]


def test_commands_and_options() -> None:
    assert completed("sc") == [("plain", "score")]
    assert completed("score", "--only") == [("plain", "--only-ood")]
    assert ("plain", "csv") in completed("score", "--format", "")


def test_a_command_that_does_not_exist_is_no_error_while_completing() -> None:
    assert ("plain", "score") in completed("scroe", "")


@pytest.mark.parametrize(
    ("typed", "cursor", "completes"),
    [
        ("featdiff eval --ood digits = di", 5, True),
        ("featdiff eval --ood digits =", 4, True),
        ("featdiff train -o x --config = dl", 6, True),
        ("featdiff score --fpr = 0", 4, False),
    ],
)
def test_words_that_bash_takes_apart_at_an_equals_sign(typed: str, cursor: int, completes: bool) -> None:
    words = {**os.environ, "_FEATDIFF_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(cursor)}
    done = subprocess.run([FEATDIFF], env=words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("file,") == completes


# ---- as the page says ----


def environment(home: Path) -> dict[str, str]:
    """That of somebody who has no settings yet, and ``featdiff`` on the path."""
    path = f"{Path(FEATDIFF).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HOME": str(home), "PS1": "> ", "TERM": "dumb", "INPUTRC": "/dev/null"}


def typed_from_page(shell: str, home: Path) -> None:
    """Type the line of the page that is for this shell."""
    (line,) = [command for command in commands_at(COMPLETION) if f"={shell}_source" in command]
    subprocess.run(["bash", "-c", line], env=environment(home), check=True)


@pytest.mark.parametrize(
    ("shell", "file", "words"),
    [
        ("zsh", ".zshrc", 'eval "$(_FEATDIFF_COMPLETE=zsh_source featdiff)"\n'),
        ("fish", ".config/fish/completions/featdiff.fish", "complete --no-files --command featdiff"),
    ],
)
def test_lines_for_shells_that_are_not_here(tmp_path: Path, shell: str, file: str, words: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    typed_from_page(shell, tmp_path)
    assert words in (tmp_path / file).read_text()


def test_the_script_for_zsh_is_one() -> None:
    asked = {**os.environ, "_FEATDIFF_COMPLETE": "zsh_source"}
    done = subprocess.run([FEATDIFF], env=asked, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("#compdef featdiff\n")


@pytest.fixture
def bash(tmp_path: Path) -> Iterator[int]:
    """The terminal of an interactive bash in a folder with ``photographs/sea side.png`` and ``model/``."""
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "sea side.png").touch()
    (tmp_path / "model").mkdir()
    typed_from_page("bash", tmp_path)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "-i"], environment(tmp_path))
    try:
        type_in(terminal, 'echo rea""dy\r', "\nready")
        yield terminal
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def type_in(terminal: int, text: str, expected: str) -> str:
    """Press these keys and wait until the words are on the screen; returns the screen."""
    os.write(terminal, text.encode())
    screen = ""
    until = time.monotonic() + 120
    while expected not in screen.replace("\r", ""):
        assert time.monotonic() < until, f"{expected!r} never came: {screen!r}"
        if select.select([terminal], [], [], 1.0)[0]:
            screen += os.read(terminal, 4096).decode(errors="replace")
    return screen


def test_tab_in_a_real_bash(bash: int) -> None:
    for start, end in (
        ("featdiff score ph\t", "featdiff score photographs/"),
        ("s\t-m mo\t", "sea\\ side.png -m model/"),
        ("\x15featdiff score x --copy-to=photo\t", " --copy-to=photographs/"),
        ("\x15featdiff eval --ood strange=ph\t", "--ood strange=photographs/"),
        ("\x15featdiff scor\t", "featdiff score "),
    ):
        type_in(bash, start, end)
