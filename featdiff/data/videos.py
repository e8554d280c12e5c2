"""Frames of video files, here or at a URL: which there are is read without decoding, then they are decoded in order."""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from ..exceptions import UnreadableImage, UsageError, first_line
from ..files.remote import open_input, version_of
from .image_refs import ImageRef, MissingRef, printable

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"),
    *(".wmv", ".flv", ".mts", ".m2ts", ".3gp", ".ogv"),
)
_FRAME = re.compile(r"(?P<file>.*)#t=(?P<time>\d+\.\d{3})", re.DOTALL)
# Two times of one frame, as names have milliseconds; in seconds.
_SAME = 0.0006
# Farther ahead than this, in seconds, it is faster to begin at a key frame before.
_FAR = 4.0
# A file may name others, on any server: nothing is opened but the file itself.
_OPTIONS = {"protocol_whitelist": "none"}
_DECODING = threading.Lock()


@dataclass(frozen=True)
class FrameRef(ImageRef):
    """The frame of a video at a time in seconds from its first frame."""

    file: str
    time: float
    sequential: ClassVar[bool] = True

    @property
    def identity(self) -> str:
        return self.path

    def read(self) -> Image.Image:
        with _DECODING:
            return _open_frames(self.file, *version_of(self.file)).at(self.time)


def is_video(path: str) -> bool:
    """Whether a path or a URL is that of a video by its name."""
    return path.partition("?")[0].lower().endswith(VIDEO_SUFFIXES)


def frame_ref(name: str) -> FrameRef | None:
    """The frame that a name means (``clip.mp4#t=3.000``); None if it means none."""
    match = _FRAME.fullmatch(name)
    return FrameRef(printable(name), match["file"], float(match["time"])) if match and is_video(match["file"]) else None


def frame_refs(path: str, every: float | None = None) -> Iterator[ImageRef]:
    """A reference to each frame of a video, or to some.

    Parameters
    ----------
    path : str
        A file or a URL.
    every : float, optional
        One frame in so many seconds: the first of each such stretch of time.

    Yields
    ------
    ImageRef
        Named ``clip.mp4#t=3.000``, in the order of time, seconds from the first frame. Of a damaged file the frames up
        to the damage, then a reference that says why there are no more.

    Raises
    ------
    UsageError
        PyAV is not installed, or ``every`` is not above 0.
    """
    check_every(every)
    label = printable(path)
    try:
        times, problem = _times(path)
    except UsageError:
        raise
    except Exception as error:  # damaged files raise many kinds
        yield MissingRef(label, f"video cannot be read: {_reason(error)}")
        return

    upcoming = 0.0
    for time in times:
        if every is not None:
            if time < upcoming - _SAME:
                continue
            upcoming = (math.floor((time + _SAME) / every) + 1) * every
        yield FrameRef(f"{label}#t={time:.3f}", path, time)
    if problem:
        yield MissingRef(label, f"video cannot be read to its end: {problem}")


def check_every(every: float | None) -> None:
    """Refuse what is no time between frames (``UsageError``)."""
    if every is not None and not 0 < every < math.inf:
        raise UsageError(f"every is a number of seconds above 0, not {every:g}", argument="every")


def picture_of(frame: Any) -> Image.Image:
    """A decoded frame, upright."""
    picture: Image.Image = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def _opened(file: str) -> tuple[Any, Any]:
    """An open video, and its stream of pictures."""
    try:
        import av
    except ImportError:
        raise UsageError(f"{file}: reading video needs PyAV: pip install 'featdiff[video]'") from None

    container = av.open(open_input(file), options=_OPTIONS)
    if not container.streams.video:
        raise UnreadableImage("it has no pictures")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return container, stream


def _times(file: str) -> tuple[list[float], str]:
    """When frames are shown, ascending, in seconds; and why there may be more, empty if there are none."""
    container, stream = _opened(file)
    stamps = []
    problem = ""
    with container:
        unit, promised, start = stream.time_base, stream.frames, stream.start_time  # not to be asked for later
        seconds, end = _length(container), 0.0
        try:
            for packet in container.demux():
                if packet.is_corrupt:
                    problem = "it ends in the middle of a frame"
                    break
                if packet.size and packet.pts is not None:
                    end = max(end, float(packet.pts * packet.time_base))
                    if packet.stream == stream:
                        stamps.append(packet.pts)
        except Exception as error:
            problem = _reason(error)
    if not problem and end < seconds - 1:
        problem = f"it lasts {end:.1f} of {seconds:.1f} seconds"
    if not problem and promised > len(stamps):
        problem = f"it has {len(stamps):,} of {promised:,} frames"

    if not stamps and not problem:
        raise UnreadableImage("no frames in it")
    first = min(stamps, default=0) if start is None else start
    # what comes before the start is decoded for others, and not shown
    return sorted({round(float((stamp - first) * unit), 3) for stamp in stamps if stamp >= first}), problem


def _length(container: Any) -> float:
    """How many seconds a video lasts by its own word, 0 where that would be a guess; others count their frames."""
    told = "matroska" in container.format.name and container.duration
    return container.duration / 1e6 if told else 0.0


@functools.lru_cache(maxsize=2)
def _open_frames(file: str, *version: int) -> _Frames:
    return _Frames(file)


class _Frames:
    """An open video that is decoded front to back as far as possible."""

    def __init__(self, file: str) -> None:
        self._container, self._stream = _opened(file)
        self._start: int | None = self._stream.start_time  # None: that of the first frame
        self._problem = ""
        self._restart(0.0)

    def at(self, time: float) -> Image.Image:
        """The frame at a time (``UnreadableImage`` if it cannot be decoded)."""
        if time < self._before - _SAME or time > max(self._now, 0.0) + _FAR:
            self._begin(time)
            if self._advance() and self._now > time + _SAME and time > 0:  # no key frame where the file says so
                self._begin(0.0)

        while self._now < time - _SAME:
            if not self._advance():
                raise UnreadableImage(f"this frame cannot be decoded{self._problem}")
        if self._now > time + _SAME or self._frame.is_corrupt:
            raise UnreadableImage(f"this frame cannot be decoded{self._problem}")
        return picture_of(self._frame)

    def _begin(self, time: float) -> None:
        """Go to the last key frame before a time."""
        stamp = (self._start or 0) + round(time / float(self._stream.time_base))
        self._container.seek(stamp, stream=self._stream, backward=True)
        self._restart(time)

    def _restart(self, time: float) -> None:
        self._decoded = self._decode()
        # between these two times all frames are known
        self._before = time
        self._now = -math.inf

    def _advance(self) -> bool:
        """Decode the next frame; False at the end."""
        frame = next(self._decoded, None)
        if frame is None:
            return False
        if self._start is None:
            self._start = frame.pts
        self._before = max(self._before, self._now)
        self._now = float((frame.pts - self._start) * self._stream.time_base)
        self._frame = frame
        return True

    def _decode(self) -> Iterator[Any]:
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
                frames = packet.decode()
            except StopIteration:
                return
            except Exception as error:  # the next packets may be fine
                self._problem = f": {_reason(error)}"
                continue
            yield from (frame for frame in frames if frame.pts is not None)
