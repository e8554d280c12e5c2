"""Camera streams: frames as they arrive, read by a thread of its own until the stream ends."""

from __future__ import annotations

import errno
import math
import queue
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

from ..exceptions import UsageError, first_line
from ..files.remote import filesystem, is_url, timeout
from .archive_names import split_archive
from .image_refs import HeldRef, ImageRef, MissingRef, has_image_suffix, printable
from .parquet_refs import is_parquet
from .remote_refs import is_pattern
from .videos import check_every, is_video, picture_of

#: Scheme -> what a stream of it may open besides; nothing leads to a file or to another server.
_SCHEMES = {
    "rtsp": "rtsp,rtp,udp,tcp",
    "rtsps": "rtsps,rtsp,srtp,rtp,udp,tcp,tls",
    "rtmp": "rtmp,tcp",
    "tcp": "tcp",
    "udp": "udp",
    "http": "http,tcp",
    "https": "https,http,tls,tcp",
}
_ALWAYS = ("rtsp", "rtsps", "rtmp", "tcp", "udp")
_DEVICE = re.compile(r"/dev/video\d+")
_MOTION_JPEG = (".mjpg", ".mjpeg")
_MULTIPART = "multipart/x-mixed-replace"
_SECRET = re.compile(r"(?<=://)[^/@]*@")
# Frames that wait here at most; more of them wait at the sender.
_WAITING = 8
# The shortest time between two names, and how often somebody who waits looks around; in seconds.
_STEP = 0.001
_LOOK = 0.1


def is_stream(name: str) -> bool:
    """Whether a name is that of a camera or of a stream, which has no end.

    Examples
    --------
    >>> from featdiff.data.streams import is_stream
    >>> [is_stream(name) for name in ("rtsp://camera/1", "http://camera/live.mjpg", "/dev/video0", "clip.mp4")]
    [True, True, True, False]
    """
    scheme, separator, rest = name.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        return re.split(r"[?#]", rest)[0].lower().endswith(_MOTION_JPEG)
    return bool(_DEVICE.fullmatch(name)) or bool(separator and scheme.lower() in _ALWAYS)


def answers_with_stream(url: str) -> bool:
    """Whether a web address that tells nothing by its name gives a stream: it is asked once."""
    path = re.split(r"[?#]", url)[0]
    named = path.endswith("/") or has_image_suffix(path) or is_video(path) or is_parquet(path) or split_archive(path)
    if not url.lower().startswith(("http://", "https://")) or named or is_pattern(url):
        return False
    from fsspec.asyn import sync

    system, address = filesystem(url)
    try:
        return bool(sync(system.loop, _kind_of, system, address) == _MULTIPART)
    except Exception:  # each client has errors of its own; whoever reads the image says why
        return False


async def _kind_of(system: Any, url: str) -> str:
    session = await system.set_session()
    async with session.get(system.encode_url(url)) as answer:
        return str(answer.content_type)


def stream_refs(name: str, every: float | None = None) -> Iterator[ImageRef]:
    """The frames of a stream as they arrive.

    Parameters
    ----------
    name : str
        ``rtsp://``, ``rtsps://``, ``rtmp://``, ``tcp://`` or ``udp://``, a web address of motion JPEG, or
        ``/dev/video0``.
    every : float, optional
        One frame in so many seconds.

    Yields
    ------
    ImageRef
        Named ``rtsp://camera/1#t=3.000`` by the seconds since the first frame, without user name and password. Where
        the stream breaks off, a reference that says why.

    Raises
    ------
    UsageError
        PyAV is not installed, or ``every`` is not above 0.
    """
    stream = Stream(name, every)
    try:
        for frames in stream:
            yield from frames
    finally:
        stream.stop()


class Stream:
    """An open stream, as lists of the frames that have arrived. Its thread ends with it, or after :meth:`stop`.

    Parameters and errors are those of :func:`stream_refs`.
    """

    def __init__(self, name: str, every: float | None = None) -> None:
        try:
            import av  # noqa: F401
        except ImportError:
            raise UsageError(f"{_label(name)}: reading streams needs PyAV: pip install 'featdiff[video]'") from None
        check_every(every)

        self.label = _label(name)
        self._name = name
        self._every = every or 0.0
        self._is_web = False
        self._found: queue.Queue[ImageRef | None] = queue.Queue(_WAITING)  # None: the end
        self._held: list[ImageRef] = []  # looked at, and not given yet
        self._alive = time.monotonic()  # when something came
        self._over = threading.Event()
        threading.Thread(target=self._read, name="featdiff-stream", daemon=True).start()

    def __iter__(self) -> Iterator[list[ImageRef]]:
        return self

    def __next__(self) -> list[ImageRef]:
        """What has arrived since the last time, at least one frame; it waits for that."""
        frames = self._held or self._arrived()
        self._held = []
        if not frames:
            raise StopIteration
        return frames

    def problem(self) -> str:
        """Why it gives no frame at all, empty if it does; waits for the first, which comes all the same."""
        self._held = self._arrived()
        if not self._held:
            return "the stream ended before its first frame"
        first = self._held[0]
        return first.reason if isinstance(first, MissingRef) else ""

    def stop(self) -> None:
        """No more frames are read; it ends with the next part."""
        self._over.set()

    def _arrived(self) -> list[ImageRef]:
        frames: list[ImageRef] = []
        while not self._over.is_set():
            try:
                frame = self._found.get(block=not frames, timeout=_LOOK)
            except queue.Empty:
                if frames:
                    break
                if time.monotonic() - self._alive > timeout() + 1:
                    self.stop()
                    return [MissingRef(self.label, f"nothing came for {timeout():g} seconds")]
                continue
            if frame is None:
                self.stop()
                break
            frames.append(frame)
        return frames

    # ---- the thread that reads ----

    def _read(self) -> None:
        clock = _Clock()
        try:
            with self._open() as container:
                self._give_frames(container, clock)
        except Exception as error:  # each protocol has errors of its own
            if not (clock.count and self._is_web and getattr(error, "errno", 0) == errno.EIO):
                what = "the stream broke off" if clock.count else "the stream cannot be opened"
                self._give(MissingRef(self.label, f"{what}: {_reason(error)}"))
            # else the server has closed the connection, as motion JPEG has no other end
        self._give(None)

    def _give_frames(self, container: Any, clock: _Clock) -> None:
        upcoming = 0.0
        for frame in self._frames(container):
            seconds = clock.time_of(frame)
            if self._every:
                if seconds < upcoming - _STEP:
                    continue
                upcoming = (math.floor((seconds + _STEP) / self._every) + 1) * self._every
            self._give(HeldRef(f"{self.label}#t={seconds:.3f}", picture_of(frame)))

    def _open(self) -> Any:
        import av

        self._alive = time.monotonic()
        if _DEVICE.fullmatch(self._name):
            return av.open(self._name, format="v4l2", timeout=timeout())
        scheme = self._name.partition("://")[0].lower()
        self._is_web = scheme in ("http", "https")
        options = {"protocol_whitelist": _SCHEMES[scheme], "rtsp_flags": "prefer_tcp"}
        if self._is_web:  # motion JPEG has no times
            options["use_wallclock_as_timestamps"] = "1"
        return av.open(self._name, options=options, timeout=timeout())

    def _frames(self, container: Any) -> Iterator[Any]:
        """Decoded frames; what comes before the first key frame cannot be."""
        if not container.streams.video:
            raise OSError(0, "it has no pictures")
        stream = container.streams.video[0]
        import av

        for packet in container.demux(stream):
            self._alive = time.monotonic()
            if self._over.is_set():
                return
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:  # the next ones may be fine
                continue
            yield from (frame for frame in frames if not frame.is_corrupt)

    def _give(self, ref: ImageRef | None) -> None:
        while not self._over.is_set():
            try:
                self._found.put(ref, timeout=_LOOK)
                return
            except queue.Full:
                self._alive = time.monotonic()  # it is the reader who is slow


class _Clock:
    """Seconds since the first frame, always more; a camera that begins anew goes on where it was."""

    def __init__(self) -> None:
        self.count = 0
        self._first = 0.0
        self._last = -_STEP

    def time_of(self, frame: Any) -> float:
        now = time.monotonic() if frame.pts is None else float(frame.pts * frame.time_base)
        if not self.count or now - self._first < self._last:
            self._first = now - self._last - _STEP
        self.count += 1
        self._last = max(now - self._first, self._last + _STEP)
        return self._last


def _label(name: str) -> str:
    return printable(_SECRET.sub("", name) if is_url(name) else name)


def _reason(error: Exception) -> str:
    if type(error).__name__ == "ExitError":  # what PyAV's own timeout raises
        return f"nothing came for {timeout():g} seconds"
    return (getattr(error, "strerror", None) or first_line(error)).lower()
