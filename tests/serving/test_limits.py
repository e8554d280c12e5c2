"""What a server does not take on, and what it does under load: a clear answer each, and no client hurts others."""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path

import httpx
import pytest
from http_servers import Server, head, rows_of, same, status_of

#: Connections at once, which the limit of open files allows or not.
MANY = 10_000
FIVE_GIGABYTES = 5_000_000_000


def answered(connection: socket.socket) -> bytes:
    """What comes until the server closes, or half a second passes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while select.select([connection], [], [], 0.5 if found else 10)[0]:
            part = connection.recv(65536)
            if not part:
                break
            found += part
    return found


@pytest.fixture(scope="module")
def tile(pictures: Path) -> bytes:
    return next(pictures.glob("china*")).read_bytes()


def test_an_exported_model_is_served_without_pytorch(small: Server, exported_model: Path, pictures: Path) -> None:
    libraries = Path(f"/proc/{small.process.pid}/maps").read_text()
    assert "onnxruntime" in libraries and "libtorch" not in libraries
    for row in rows_of(exported_model, pictures):
        same(small.score(Path(row["path"]).read_bytes()), row)
    answer = small.client.post("/v1/explain", content=b"")
    assert answer.status_code == 501 and "cannot explain" in answer.json()["error"]


# ---- too large ----


def test_five_gigabytes_are_refused_before_they_are_read(small: Server) -> None:
    with small.connect() as connection:
        connection.sendall(head(FIVE_GIGABYTES))
        answer = answered(connection)
    assert status_of(answer) == 413
    assert b"5000000000 bytes, more than the limit of 200,000 a request" in answer


@pytest.mark.parametrize("length", [FIVE_GIGABYTES, "Transfer-Encoding: chunked"])
def test_an_upload_without_end_has_an_answer_while_it_goes_on(small: Server, length: int | str) -> None:
    before = small.memory
    part = bytes(1 << 20)
    with small.connect() as connection:
        connection.sendall(head(length))
        for _ in range(64):
            with contextlib.suppress(ConnectionError):
                connection.sendall(part if isinstance(length, int) else b"%x\r\n%s\r\n" % (len(part), part))
            if select.select([connection], [], [], 0)[0]:
                break
        assert status_of(answered(connection)) == 413
    assert small.memory - before < 50_000_000


def test_a_client_that_asks_first_need_not_send(small: Server) -> None:
    """As curl does: it waits for the word of the server before a large body."""
    with small.connect() as connection:
        connection.sendall(head(FIVE_GIGABYTES, "Expect: 100-continue"))
        assert status_of(answered(connection)) == 413
    with small.connect() as connection:
        connection.sendall(head(3, "Expect: 100-continue"))
        assert status_of(answered(connection)) == 100
        connection.sendall(b"abc")
        assert b"unreadable" in answered(connection)


def test_too_many_images_in_a_request(small: Server) -> None:
    for count, status in ((40, 200), (41, 413)):
        answer = small.client.post("/v1/score", json={"images": [{"data": ""}] * count})
        assert answer.status_code == status
        form = [("image", ("a.png", b"x"))] * count
        assert small.client.post("/v1/score", files=form).status_code in (status, 400)
    assert "41 images, more than the limit of 40 a request" in answer.json()["error"]


# ---- too slow ----


@pytest.mark.parametrize("sent", [head(1000) + b"a few bytes", head("Transfer-Encoding: chunked") + b"3\r\nabc\r\n"])
def test_a_body_that_never_ends_is_given_up(small: Server, sent: bytes) -> None:
    begun = time.monotonic()
    with small.connect() as connection:
        connection.sendall(sent)
        answer = answered(connection)
    assert status_of(answer) == 408
    assert b"the request did not come within 1 seconds" in answer
    assert 0.8 < time.monotonic() - begun < 8


@pytest.mark.parametrize("sent", [b"", b"POST /v1/sc", head(10)[:-2]])
def test_a_head_that_never_ends_is_given_up(small: Server, sent: bytes) -> None:
    with small.connect() as connection:
        connection.sendall(sent)
        assert status_of(answered(connection)) == 408
        assert connection.recv(1) == b""


def test_a_second_head_that_never_ends_is_given_up(small: Server) -> None:
    with small.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n")
        response = HTTPResponse(connection)
        response.begin()
        assert response.status == 200 and response.read()
        connection.sendall(b"GET /hea")
        connection.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_a_drop_of_bytes_at_a_time_does_not_keep_others_waiting(small: Server, tile: bytes) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(small.connect()) for _ in range(30)]
        for connection in slow:
            connection.sendall(head(1000) + b"a")
        assert small.score(tile)["status"] == "ok"
        assert {status_of(answered(connection)) for connection in slow} == {408}
    assert small.metric("featdiff_queue_images") == 0


# ---- no HTTP at all ----


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"hello\r\n\r\n"])
def test_what_is_no_http(small: Server, sent: bytes) -> None:
    with small.connect() as connection:
        connection.sendall(sent)
        assert status_of(answered(connection)) == 400
    assert small.client.get("/readyz").status_code == 200


# ---- too much ----


def listed(tile: bytes, count: int) -> bytes:
    """A request with the same image so many times, which takes the model a while."""
    import base64

    return json.dumps({"images": [{"data": base64.b64encode(tile).decode()}] * count}).encode()


def asked(server: Server, body: bytes, times: int) -> list[httpx.Response]:
    """The answers to equal requests at once."""

    def ask(_: int) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return httpx.post(f"{server.url}/v1/score", content=body, headers=headers, timeout=60, trust_env=False)

    with ThreadPoolExecutor(times) as clients:
        return list(clients.map(ask, range(times)))


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(small: Server, tile: bytes) -> None:
    answers = asked(small, listed(tile, 20), 16)
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 503}, counts
    for answer in answers:
        if answer.status_code == 503:
            assert answer.headers["Retry-After"] == "1"
            assert "try again" in answer.json()["error"]
        else:
            assert len({json.dumps(row) for row in answer.json()["images"]}) == 1
    assert small.score(tile)["status"] == "ok"


def test_a_client_that_goes_takes_its_images_with_it(small: Server, tile: bytes) -> None:
    body = listed(tile, 38)
    scored = small.metric("featdiff_images_total")
    gone = small.metric('featdiff_requests_total{path="/v1/score",status="499"}')
    with small.connect() as connection:
        connection.sendall(head(len(body), "Content-Type: application/json") + body)
        until = time.monotonic() + 10
        while small.metric("featdiff_queue_images") == 0 and time.monotonic() < until:
            pass
    while small.metric("featdiff_queue_images") > 0:
        assert time.monotonic() < until
    assert small.metric('featdiff_requests_total{path="/v1/score",status="499"}') == gone + 1
    assert small.metric("featdiff_images_total") < scored + 38
    assert small.score(tile)["status"] == "ok"


def test_a_client_that_goes_in_the_middle_of_its_body(small: Server, tile: bytes) -> None:
    for _ in range(5):
        with small.connect() as connection:
            connection.sendall(head(len(tile)) + tile[:100])
    assert small.score(tile)["status"] == "ok"
    assert "Traceback" not in small.log


@pytest.fixture
def files_allowed() -> Iterator[int]:
    """How many files and connections this process may have open, raised as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ten_thousand_connections(exported_model: Path, tile: bytes, files_allowed: int) -> None:
    """All are open at once, and each has an answer; fewer where the system allows fewer."""
    count = min(MANY, files_allowed - 500)
    with Server(exported_model, "--timeout", 30) as server, contextlib.ExitStack() as stack:
        before = server.memory
        connections = [stack.enter_context(server.connect()) for _ in range(count)]
        assert server.score(tile)["status"] == "ok"
        for connection in connections:
            connection.sendall(head(3) + b"abc")
        statuses = Counter(status_of(connection.recv(65536)) for connection in connections)
        assert set(statuses) <= {200, 503} and statuses[200] > 0, statuses
        assert server.score(tile)["status"] == "ok"
        assert server.memory - before < 50_000 * count
