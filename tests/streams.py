"""Real streams on loopback: MPEG over TCP or UDP, sent by a process of its own, RTSP, and motion JPEG over HTTP."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

FPS = 30
# MPEG in RTP packets.
_SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:*\r\n"


def picture(number: int) -> np.ndarray:
    """A bar that grows from left to right and begins anew: how bright a frame is says which it is."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, : round(64 * (number % 90 + 1) / 90)] = 255
    return pixels


def send(place: Any, count: int, pause: float = 0.0) -> None:
    """Encode so many frames and send them to a URL or into a file, with a pause after each."""
    with av.open(place, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 15
        for i in range(count):
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")):
                container.mux(packet)
            time.sleep(pause)
        for packet in stream.encode():
            container.mux(packet)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def sending(url: str, count: int, pause: float = 0.0) -> Iterator[subprocess.Popen[bytes]]:
    """A process that sends to a URL until the end of the block; a port that it listens on is open then."""
    process = subprocess.Popen([sys.executable, __file__, url, str(count), str(pause)], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while "listen" in url and not _listens(int(url.rpartition(":")[2].partition("?")[0])):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    """Whether somebody listens; to connect would take the place of the one that is waited for."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return any(field[1].endswith(f":{port:04X}") and field[3] == "0A" for field in fields)


@contextlib.contextmanager
def motion_jpeg(count: int, pause: float = 0.0, rest: float = 0.0) -> Iterator[str]:
    """A web server whose ``/picture`` is one frame, and all else so many, and then silence for ``rest`` seconds."""

    class Camera(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            if self.path == "/picture":
                self.send_header("Content-Type", "image/jpeg")
                self.end_headers()
                self.wfile.write(jpeg(0))
                return
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for i in range(count):
                    data = jpeg(i)
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                    self.wfile.write(head.encode() + data + b"\r\n")
                    if over.wait(pause):
                        return
                over.wait(rest)

    over = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def rtsp(count: int, account: str = "") -> Iterator[str]:
    """A server of RTSP as cameras have it, over TCP: so many frames, for all or for ``user:password``."""
    content = io.BytesIO()
    send(content, count)
    packets = content.getvalue()
    token = "Basic " + base64.b64encode(account.encode()).decode()

    class Camera(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                while lines := self.request_lines():
                    method, url, _ = lines[0].split()
                    fields = dict(line.split(": ", 1) for line in lines[1:])
                    if account and fields.get("Authorization") != token:
                        self.answer(fields, 'WWW-Authenticate: Basic realm="camera"', status="401 Unauthorized")
                    elif method == "DESCRIBE":
                        self.answer(fields, f"Content-Base: {url}/", "Content-Type: application/sdp", body=_SDP)
                    elif method == "SETUP":
                        self.answer(fields, "Transport: RTP/AVP/TCP;unicast;interleaved=0-1", "Session: 1")
                    else:
                        self.answer(fields, "Session: 1", "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN")
                    if method == "PLAY":
                        self.play()
                        return

        def request_lines(self) -> list[str]:
            lines = []
            while line := self.rfile.readline().decode().strip():
                lines.append(line)
            return lines

        def answer(self, fields: dict[str, str], *more: str, body: str = "", status: str = "200 OK") -> None:
            head = [f"RTSP/1.0 {status}", f"CSeq: {fields['CSeq']}", *more, f"Content-Length: {len(body)}"]
            self.wfile.write("\r\n".join([*head, "", body]).encode())

        def play(self) -> None:
            for number, start in enumerate(range(0, len(packets), 7 * 188)):
                part = packets[start : start + 7 * 188]
                head = struct.pack("!BBHII", 0x80, 33, number % 65536, number * 3000, 1)
                self.wfile.write(struct.pack("!cBH", b"$", 0, len(head) + len(part)) + head + part)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Camera) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"rtsp://127.0.0.1:{server.server_address[1]}/1"
        server.shutdown()


def jpeg(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture(number)).save(data, "JPEG", quality=95)
    return data.getvalue()


if __name__ == "__main__":
    send(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
