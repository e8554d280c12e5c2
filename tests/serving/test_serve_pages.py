"""The page of the command line is true of ``featdiff serve``: its commands, its code, and its container."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
from helpers import FEATDIFF, ROOT, python, shell
from http_servers import Server
from pages import CONTAINER, SERVER, Block, blocks_at, commands_at
from streams import free_port

(_script,) = entry_points(group="console_scripts", name="featdiff")
MAIN: click.Group = _script.load()
CLIENTS = [command for command in commands_at(SERVER) if not command.startswith("featdiff")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_folders: dict[str, Path]) -> Path:
    """With the pictures of the page."""
    place = tmp_path_factory.mktemp("client")
    for name, source in (("photo.jpg", "test"), ("other.jpg", "digits")):
        shutil.copy(next(sample_folders[source].iterdir()), place / name)
    return place


def options_of(words: list[str]) -> dict[str, object]:
    """What the command line makes of the words after ``featdiff serve``."""
    command = MAIN.get_command(click.Context(MAIN), "serve")
    assert command is not None
    return command.make_context("serve", words).params


def test_starting() -> None:
    commands = [command for command in commands_at(SERVER) if command.startswith("featdiff")]
    assert commands == ["featdiff serve -m my-model --port 8000"]
    given = options_of(commands[0].split()[2:])
    assert (given["model"], given["port"], given["host"]) == ("my-model", 8000, "127.0.0.1")


@pytest.mark.parametrize("command", CLIENTS)
def test_asking(command: str, server: Server, folder: Path) -> None:
    done = shell(command.replace("http://127.0.0.1:8000", server.url), folder)
    assert done.returncode == 0, done.stderr
    if "/v1/score" in command:
        rows = json.loads(done.stdout)["images"]
        assert [row["path"] for row in rows] == re.findall(r"@(\w+\.jpg)", command)
        assert {row["status"] for row in rows} == {"ok"}
    elif "/v1/explain" in command:
        assert (folder / "why.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "featdiff_requests_total" in done.stdout


@pytest.mark.parametrize("block", blocks_at(SERVER, language="python"), ids=lambda block: f"line {block.line}")
def test_asking_in_python(block: Block, server: Server, folder: Path) -> None:
    done = python(block.text.replace("http://127.0.0.1:8000", server.url), folder)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["photo.jpg", "ok"], ["other.jpg", "ok"]]


def test_the_numbers_of_the_page_are_there(server: Server) -> None:
    page = (ROOT / "cli" / "README.md").read_text()
    named = set(re.findall(r"`(featdiff_\w+)`", page.partition("| of `/metrics` |")[2].partition("\n\n")[0]))
    given = set(re.findall(r"^# TYPE (\w+)", server.client.get("/metrics").text, flags=re.M))
    assert given == named


def test_the_container() -> None:
    """Docker is not run: its command is one, it has a user without rights, and asks a route that is there."""
    (block,) = blocks_at(CONTAINER, language="dockerfile")
    lines = dict(re.findall(r"^([A-Z]+) (.*)$", block.text, flags=re.M))
    words = json.loads(lines["CMD"])
    assert words[:2] == ["featdiff", "serve"]
    given = options_of(words[2:])
    assert (given["host"], given["port"], str(given["model"])) == ("0.0.0.0", int(lines["EXPOSE"]), "/model")
    assert lines["USER"] == "1000" and "useradd --uid 1000 --create-home featdiff" in block.text
    assert ":8000/readyz" in lines["HEALTHCHECK"]
    check = json.loads(lines["HEALTHCHECK"].partition("CMD ")[2])
    assert set(re.findall(r":(\d+)/", " ".join(check))) == {lines["EXPOSE"]}
    (extras,) = re.findall(r"/src\[([\w,]+)\]", block.text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_the_command_and_the_health_check_of_the_container(exported_model: Path) -> None:
    """Both as they are written, but for the port and the place of the model."""
    (block,) = blocks_at(CONTAINER, language="dockerfile")
    lines = dict(re.findall(r"^([A-Z]+) (.*)$", block.text, flags=re.M))
    port = str(free_port())
    _, *command = [{"/model": str(exported_model), "8000": port}.get(word, word) for word in json.loads(lines["CMD"])]
    _, *check = json.loads(lines["HEALTHCHECK"].partition("CMD ")[2])
    check = [sys.executable, *(word.replace(":8000", f":{port}") for word in check)]

    def is_healthy() -> bool:
        return subprocess.run(check, capture_output=True, check=False).returncode == 0

    assert not is_healthy()
    server = subprocess.Popen([FEATDIFF, *command], stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 60
        while not is_healthy():
            assert server.poll() is None and time.monotonic() < until
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.communicate()
    assert not is_healthy()
