"""Real streams on loopback, each sent by a process of its own: MPEG over TCP or UDP, and motion JPEG over HTTP."""

from __future__ import annotations

import contextlib
import io
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
from PIL import Image

FPS = 30


def picture(number: int) -> np.ndarray:
    """A bar that grows from left to right and begins anew: how bright a frame is says which it is."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, : round(64 * (number % 90 + 1) / 90)] = 255
    return pixels


def send(url: str, count: int, pause: float) -> None:
    """Encode so many frames and send them, with a pause after each."""
    with av.open(url, "w", format="mpegts") as container:
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


def jpeg(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture(number)).save(data, "JPEG", quality=95)
    return data.getvalue()


if __name__ == "__main__":
    send(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
