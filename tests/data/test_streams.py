"""Camera streams: real ones on loopback, over TCP, UDP and HTTP; how they end, and what is wrong with them."""

from __future__ import annotations

import csv
import io
import itertools
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from helpers import FEATDIFF
from streams import free_port, motion_jpeg, rtsp, sending
from videos import COUNT, number_of

from featdiff import Detector
from featdiff.data.references import ImageRef, MissingRef, iter_images, list_images
from featdiff.data.streams import Stream, is_stream
from featdiff.exceptions import UsageError


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    until = time.monotonic() + 30
    while any(thread.name == "featdiff-stream" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.05)


def numbers(refs: list[ImageRef]) -> list[int]:
    return [number_of(ref.read()) for ref in refs]


def test_a_row_a_frame_until_the_end() -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    with sending(f"{url}?listen=1", COUNT):
        refs = list(iter_images(url))
    assert [ref.path for ref in refs] == [f"{url}#t={i / 30:.3f}" for i in range(COUNT)]
    assert all(abs(found - i) <= 2 for i, found in enumerate(numbers(refs)))


def test_one_frame_in_so_many_seconds() -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    with sending(f"{url}?listen=1", COUNT):
        refs = list(iter_images(url, every=1))
    assert [ref.path for ref in refs] == [f"{url}#t={t}.000" for t in (0, 1, 2)]
    assert all(abs(found - expected) <= 2 for found, expected in zip(numbers(refs), (0, 30, 60), strict=True))


def test_a_camera_with_rtsp() -> None:
    with rtsp(COUNT) as url:
        refs = list(iter_images(url, every=0.5))
    assert [ref.path for ref in refs] == [f"{url}#t={i / 2:.3f}" for i in range(6)]
    assert all(abs(found - 15 * i) <= 2 for i, found in enumerate(numbers(refs)))


def test_its_password_is_used_and_not_told() -> None:
    with rtsp(COUNT, "me:secret") as url:
        refs = list(iter_images(url.replace("//", "//me:secret@"), every=1))
        assert [ref.path for ref in refs] == [f"{url}#t={t}.000" for t in (0, 1, 2)]
        (ref,) = iter_images(url)
    assert isinstance(ref, MissingRef)
    assert "401" in ref.reason


def test_frames_are_there_before_the_stream_ends(tiny_detector: Detector) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    with sending(f"{url}?listen=1", 100_000, 0.01) as sender:
        stream = Stream(url, every=0.5)
        parts = [tiny_detector.score(frames) for frames in itertools.islice(stream, 3)]
        assert sender.poll() is None
        stream.stop()
        assert list(stream) == []
    assert parts[0].path[0] == f"{url}#t=0.000"
    assert {status for part in parts for status in part.status} == {"ok"}


def test_a_sender_that_falls_silent_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Datagrams have no end: there is nothing more, and that is all."""
    monkeypatch.setenv("FEATDIFF_TIMEOUT", "3")
    url = f"udp://127.0.0.1:{free_port()}"
    found: list[ImageRef] = []
    reader = threading.Thread(target=lambda: found.extend(iter_images(url)))
    reader.start()
    with sending(url, 200, 0.005) as sender:
        sender.wait(60)
    reader.join(60)
    assert len(found) > 100
    assert all(ref.path.startswith(f"{url}#t=") for ref in found[:-1])
    assert found[-1] == MissingRef(url, "the stream broke off: nothing came for 3 seconds")


@pytest.mark.parametrize("name", ["live.mjpg", "live.MJPEG?size=64"])
def test_motion_jpeg(name: str) -> None:
    with motion_jpeg(40, 0.01) as server:
        refs = list(iter_images(f"{server}/{name}"))
    times = [float(ref.path.rpartition("#t=")[2]) for ref in refs]
    assert times == sorted(set(times))
    assert times[0] == 0
    assert 0.2 < times[-1] < 60  # as they came: the stream itself says nothing
    assert all(abs(found - i) <= 2 for i, found in enumerate(numbers(refs)))
    assert len(refs) in (39, 40)  # of the last one, nothing tells that it is whole


def test_a_stream_that_breaks_off_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATDIFF_TIMEOUT", "2")
    with motion_jpeg(40, 0.01, rest=60) as server:
        refs = list(iter_images(f"{server}/live.mjpg"))
    assert refs.pop() == MissingRef(f"{server}/live.mjpg", "the stream broke off: nothing came for 2 seconds")
    assert len(refs) in (39, 40)  # of the last one, nothing tells that it is whole


def test_what_cannot_be_opened_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATDIFF_TIMEOUT", "1")
    refused = f"rtsp://me:secret@127.0.0.1:{free_port()}/1"
    (ref,) = iter_images(refused)
    assert isinstance(ref, MissingRef)
    assert ref.path == refused.replace("me:secret@", "")
    assert ref.reason == "the stream cannot be opened: connection refused"

    (ref,) = iter_images("/dev/video77")
    assert ref == MissingRef("/dev/video77", "the stream cannot be opened: no such file or directory")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (ref,) = iter_images(f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        assert isinstance(ref, MissingRef)
        assert "nothing came for 1 seconds" in ref.reason


@pytest.mark.parametrize("content", [b"\x00" * 100_000, b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"])
def test_what_is_no_stream_has_a_reason(content: bytes) -> None:
    """Playlists would lead to files, and are not followed."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.sendall(content)

        threading.Thread(target=answer, daemon=True).start()
        (ref,) = iter_images(f"tcp://127.0.0.1:{server.getsockname()[1]}")
    assert isinstance(ref, MissingRef)
    assert ref.reason.startswith("the stream cannot be opened")


def test_a_stream_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no end"):
        list_images("udp://127.0.0.1:1")
    (ref,) = iter_images("-", stdin=io.BytesIO(b"/dev/video0\n"))
    assert isinstance(ref, MissingRef)
    with pytest.raises(UsageError, match="above 0"):
        Stream("udp://127.0.0.1:1", every=0)
    names = ["a.mjpg", "s3://b/a.mjpg", "http://c/a.mjpg/x", "http://c/a.jpg?x=.mjpg", "/dev/video", "a/dev/video0"]
    assert not any(map(is_stream, names))


# ---- the command ----


def rows_in(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_streams_on_the_command_line(featdiff_cli: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    with sending(f"{url}?listen=1", COUNT):
        result = featdiff_cli("score", url, "--every", 0.5, "-m", tiny_model, "-o", tmp_path / "rows.csv")
    assert result.exit_code == 0, result.output
    rows = rows_in((tmp_path / "rows.csv").read_text())
    assert [row["path"] for row in rows] == [f"{url}#t={i / 2:.3f}" for i in range(6)]
    assert {row["status"] for row in rows} == {"ok"}
    assert "6 images" in result.stderr

    with motion_jpeg(10) as server:  # told by its content type
        result = featdiff_cli("score", f"{server}/camera", "-m", tiny_model)
        assert result.exit_code == 0, result.output
        assert len(rows_in(result.stdout)) in (9, 10)
        assert "explain" not in result.stderr
        result = featdiff_cli("score", f"{server}/picture", "-m", tiny_model)
        assert [row["path"] for row in rows_in(result.stdout)] == [f"{server}/picture"]


def test_what_does_not_fit_a_stream(featdiff_cli: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    for arguments, code, message in (
        ((url,), 1, f"{url}: the stream cannot be opened: connection refused"),
        ((url, tmp_path), 2, "score it alone"),
        ((url, "--report", tmp_path / "a.html"), 2, "a stream gives each once"),
        ((url, "--every", -1), 2, "above 0"),
    ):
        result = featdiff_cli("score", *arguments, "-m", tiny_model)
        assert (result.exit_code, message in result.stderr) == (code, True), result.output
    result = featdiff_cli("manifest", url, "-o", tmp_path / "a.parquet")
    assert result.exit_code == 2
    assert "has no end" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_stream_and_keeps_its_rows(tiny_model: Path, tmp_path: Path, number: int) -> None:
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    url = f"tcp://127.0.0.1:{free_port()}"
    out = tmp_path / "rows.csv"
    with sending(f"{url}?listen=1", 1_000_000, 0.02):
        command = [FEATDIFF, "score", url, "--every", "0.1", "-m", str(tiny_model), "-o", str(out)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=heed)
        try:
            until = time.monotonic() + 120
            while not any(len(file.read_bytes().splitlines()) > 5 for file in tmp_path.glob("*rows.csv*")):
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.05)
            process.send_signal(number)
            _, told = process.communicate(timeout=120)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0, told
    rows = rows_in(out.read_text())
    assert len(rows) > 4
    assert [row["path"] for row in rows] == [f"{url}#t={float(row['path'].partition('#t=')[2]):.3f}" for row in rows]
    assert {row["status"] for row in rows} == {"ok"}
    assert f"{len(rows):,} images" in told.decode()
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]
