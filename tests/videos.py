"""Videos whose frames say which they are."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image

COUNT = 90  # frames, 30 a second


def write_video(file: Path, codec: str, audio: bool = False) -> Path:
    """A bar that grows from left to right: how bright a frame is says which it is."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 15
        for i in range(COUNT):
            pixels = np.zeros((48, 64, 3), np.uint8)
            pixels[:, : round(64 * (i + 1) / COUNT)] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file


def number_of(picture: object) -> int:
    assert isinstance(picture, Image.Image)
    return round(np.asarray(picture.convert("L")).mean() / 255 * COUNT) - 1
