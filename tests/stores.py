"""Real servers on loopback for the tests: an S3 store, and a web server that fails, stalls and truncates on purpose."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextlib.contextmanager
def s3_store() -> Iterator[Any]:
    """A client of boto3 on a store that sub-processes see, too."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (KEYS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        try:
            yield boto3.client("s3")
        finally:
            server.stop()


class FaultyServer:
    """Serves ``files`` (path -> content); how it answers is part of the path.

    ``/fails/N/x``: the first N requests get 503. ``/stalls/x``: headers, then silence. ``/cut/N/x``: the first N
    answers end half-way. ``/lies/x``: no length, and never an end. ``/whole/x``: ranges are not known. ``/none/x``:
    404. ``/closed/x``: 403. ``asked`` counts requests by path, ``sent`` the bytes of whole answers.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.sent = 0
        self.over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                outer.answer(self, body=False)

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    outer.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0]
        self.asked[path] += body
        words = path.strip("/").split("/")
        kind = words[0]
        number = int(words[1]) if len(words) > 2 and words[1].isdigit() else 0
        content = self.files.get(words[-1])
        if content is None or kind == "none":
            self.refuse(request, 404)
        elif kind == "closed":
            self.refuse(request, 403)
        elif kind == "fails" and self.asked[path] <= number:
            self.refuse(request, 503)
        elif kind == "lies":
            request.send_response(200)
            request.send_header("Connection", "close")
            request.end_headers()
            while body and not self.over.is_set():
                request.wfile.write(content)
                time.sleep(0.001)
        else:
            self.give(request, content, body, kind, number)

    def refuse(self, request: BaseHTTPRequestHandler, status: int) -> None:
        request.send_response(status)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def give(self, request: BaseHTTPRequestHandler, content: bytes, body: bool, kind: str, number: int) -> None:
        wanted = request.headers.get("Range", "")
        part = content
        if wanted and kind != "whole":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1]
            request.send_response(206)
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(part)))
        cut = kind == "cut" and self.asked[request.path] <= number
        request.end_headers()
        if not body:
            return
        if kind == "stalls" or cut:
            request.wfile.write(part[: len(part) // 2])
            request.wfile.flush()
            if not cut:
                self.over.wait(30)
            request.close_connection = True
            return
        request.wfile.write(part)
        self.sent += len(part)

    def stop(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def faulty_server() -> Iterator[FaultyServer]:
    server = FaultyServer()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for a while."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
