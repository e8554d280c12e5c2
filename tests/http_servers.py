"""A real ``featdiff serve`` as a process of its own on a free port, and what asks it."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import pytest
from helpers import FEATDIFF, heed_ctrl_c, typed


class Server:
    """``featdiff serve`` with these options, from the moment it accepts connections until the end of the block."""

    def __init__(self, model: Path, *options: object) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        command = [FEATDIFF, "serve", "-m", str(model), "--port", "0", *map(str, options)]
        self.process = subprocess.Popen(command, stderr=self._log, preexec_fn=heed_ctrl_c)
        self.url = ""

    def __enter__(self) -> Self:
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        return self

    def _wait(self) -> None:
        until = time.monotonic() + 120
        while not self.url:
            assert self.process.poll() is None and time.monotonic() < until, self.log
            time.sleep(0.05)
            self.url = "".join(re.findall(r"on (http://\S+?)/v1/score\n", self.log))

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(AttributeError):
            self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self._log.close()

    @property
    def log(self) -> str:
        """What it has written for people."""
        self._log.seek(0)
        return self._log.read().decode()

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname and parts.port
        return parts.hostname, parts.port

    @property
    def memory(self) -> int:
        """Bytes that the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=60)

    def score(self, content: bytes, path: str = "image") -> dict[str, Any]:
        """The row of one image."""
        answer = self.client.post("/v1/score", params={"path": path}, content=content)
        assert answer.status_code == 200, answer.text
        (row,) = answer.json()["images"]
        return row

    def metric(self, line: str) -> float:
        """The sum of all numbers of ``/metrics`` whose lines begin so."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(text.rpartition(" ")[2]) for text in lines if text.startswith(line))


def rows_of(model: Path, folder: Path, *options: object) -> Iterator[dict[str, Any]]:
    """What ``featdiff score`` writes about the images of a folder, in their order."""
    command = ["featdiff", "score", folder, "-m", model, "--format", "jsonl", "-q", *options]
    done = typed(shlex.join(map(str, command)), Path("/"))
    assert done.returncode in (0, 3), done.stderr
    yield from map(json.loads, done.stdout.splitlines())


def head(length: int | str, *lines: str) -> bytes:
    """The head of a request to score one image."""
    size = f"Content-Length: {length}" if isinstance(length, int) else length
    return "\r\n".join(["POST /v1/score HTTP/1.1", "Host: here", size, *lines, "", ""]).encode()


def status_of(answer: bytes) -> int:
    """Of the raw bytes of an answer; 0 if there is none."""
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """All columns but the path, in their order; verdicts exactly, scores but for the rounding of another batch."""
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        if name.startswith("layer_") or name == "ood_score":
            assert found[name] == (value if value is None else pytest.approx(value, rel=2e-6, abs=2e-6)), name
        elif name != "path":
            assert found[name] == value, name
