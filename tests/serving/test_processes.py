"""How a server starts and ends: one process or several, keys, addresses, and answers to all that was accepted."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from click.testing import Result
from helpers import fails
from http_servers import Server, head, rows_of, status_of

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def tile(pictures: Path) -> bytes:
    return next(pictures.glob("china*")).read_bytes()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_accepted_is_answered_before_the_end(
    exported_model: Path, tile: bytes, processes: int, number: signal.Signals
) -> None:
    """A form of 60 images from each of 8 clients; the signal comes when all were accepted."""
    image = {"data": base64.b64encode(tile).decode()}
    body = json.dumps({"images": [image] * 60}).encode()
    with Server(exported_model, "--max-batch", 1, "--max-queue", 480, "--processes", processes) as server:
        clients = [server.connect() for _ in range(8)]
        for client in clients:
            client.sendall(head(len(body), "Content-Type: application/json") + body)
        until = time.monotonic() + 60
        answered = 'featdiff_requests_total{path="/v1/score"'
        while server.metric("featdiff_queue_images") + 60 * server.metric(answered) < 480:
            assert time.monotonic() < until

        server.process.send_signal(number)
        for client in clients:
            client.settimeout(30)
            answer = b"".join(iter(lambda client=client: client.recv(65536), b""))
            assert status_of(answer) == 200
            assert answer.count(b'"status": "ok"') == 60
            client.close()
        code = server.process.wait(20)
        assert code == (130 if number == signal.SIGINT and processes == 1 else 0), server.log
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        assert server.log.count("\n") <= 2 and "Traceback" not in server.log


def test_processes_share_the_work_and_their_numbers_add_up(exported_model: Path, pictures: Path) -> None:
    rows = {Path(row["path"]).name: row for row in rows_of(exported_model, pictures)}
    with Server(exported_model, "--processes", 2) as server:

        def ask(name: str) -> None:  # each on a connection of its own, that any process may accept
            content = (pictures / name).read_bytes()
            url = f"{server.url}/v1/score"
            (row,) = httpx.post(url, params={"path": rows[name]["path"]}, content=content, trust_env=False).json()[
                "images"
            ]
            for column in ("path", "status", "p_value", "is_ood"):
                assert row[column] == rows[name][column]

        with ThreadPoolExecutor(8) as clients:
            list(clients.map(ask, list(rows) * 4))
        assert server.metric("featdiff_images_total") == 4 * len(rows)
        assert server.metric('featdiff_requests_total{path="/v1/score",status="200"}') == 4 * len(rows)
        assert server.metric("featdiff_batch_images_sum") == 4 * len(rows)
        page = server.client.get("/metrics").text
        assert len([line for line in page.splitlines() if line.startswith("featdiff_drift_statistic{pid=")]) == 2


def workers(server: Server) -> set[int]:
    """The processes that it has started to answer."""
    found = set()
    for child in psutil.Process(server.process.pid).children():
        with suppress(psutil.NoSuchProcess):
            if any("spawn_main" in word for word in child.cmdline()):
                found.add(child.pid)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="Linux deals connections out, other systems do not")
def test_connections_that_stay_open_are_dealt_out(exported_model: Path, tile: bytes) -> None:
    """Also to a process that was started again: 32 of them are all at one of two once in two billion times."""

    def held(pid: int) -> int:
        connections = psutil.Process(pid).net_connections("tcp")
        return sum(connection.status == psutil.CONN_ESTABLISHED for connection in connections)

    with Server(exported_model, "--processes", 2) as server:
        for number in range(2):
            with ExitStack() as stack:
                clients = [stack.enter_context(httpx.Client(trust_env=False, timeout=60)) for _ in range(32)]
                for client in clients:
                    row = client.post(f"{server.url}/v1/score", content=tile).json()["images"][0]
                    assert row["status"] == "ok"
                assert min(held(pid) for pid in workers(server)) >= 1
            if number == 0:
                first = workers(server)
                os.kill(killed := max(first), signal.SIGKILL)
                until = time.monotonic() + 60
                while len(now := workers(server)) < 2 or killed in now:
                    assert time.monotonic() < until, server.log
                    time.sleep(0.1)


def test_a_process_that_is_killed_is_started_again(exported_model: Path, tile: bytes) -> None:
    with Server(exported_model, "--processes", 2) as server:
        server.score(tile)
        first = workers(server)
        os.kill(killed := min(first), signal.SIGKILL)
        until = time.monotonic() + 60
        while len(now := workers(server)) < 2 or killed in now:
            assert time.monotonic() < until, server.log
            time.sleep(0.1)
        for _ in range(10):
            answer = httpx.post(f"{server.url}/v1/score", content=tile, timeout=60, trust_env=False)
            assert answer.json()["images"][0]["status"] == "ok"
        page = httpx.get(f"{server.url}/metrics", timeout=60, trust_env=False).text
        assert f'pid="{killed}"' not in page
        assert 'featdiff_images_total{verdict="normal"} 11.0' in page


def test_a_key(exported_model: Path, tile: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATDIFF_SERVE_API_KEY", "s3cret")
    with Server(exported_model) as server:
        url = f"{server.url}/v1/score"
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            answer = httpx.post(url, headers=headers, content=tile, trust_env=False)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{server.url}/metrics", trust_env=False).status_code == 401
        assert httpx.get(f"{server.url}/healthz", trust_env=False).status_code == 200
        answer = httpx.post(url, headers={"Authorization": "Bearer s3cret"}, content=tile, trust_env=False)
        assert answer.status_code == 200
        assert "s3cret" not in server.log


# ---- refusals before anything is served ----


def test_an_address_that_cannot_be_had(featdiff_cli: Cli, exported_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = featdiff_cli("serve", "-m", exported_model, "--port", port, "-q")
        fails(result, 1, f"--port: cannot listen on 127.0.0.1 port {port}: Address already in use")
    result = featdiff_cli("serve", "-m", exported_model, "--host", "192.0.2.1", "-q")
    fails(result, 1, "cannot listen on 192.0.2.1 port 8000: Cannot assign requested address")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["-m", "nowhere"], 1, "no featdiff model at nowhere"),
        (["--fpr", "0.00001"], 2, "--fpr"),
        (["--name", "a/b"], 2, "--name: the name 'a/b' has other signs"),
        (["--device", "cuda"], 2, "--device"),
        (["--weights", "a.safetensors"], 2, "is an exported model, which cannot do that"),
    ],
)
def test_options_that_make_no_sense(
    featdiff_cli: Cli, exported_model: Path, options: list[str], code: int, words: str
) -> None:
    fails(featdiff_cli("serve", "-m", exported_model, "--port", 0, "-q", *options), code, words)


def test_packages_that_are_missing(featdiff_cli: Cli, exported_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = featdiff_cli("serve", "-m", exported_model, "--port", 0, "-q")
    fails(result, 2, "a server needs uvicorn: pip install 'featdiff[serve]'")
