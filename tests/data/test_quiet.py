"""Image libraries print nothing while featdiff decodes, and what others decode is reported as ever."""

from __future__ import annotations

import io
import pickle
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import printed
from image_files import encoded, noise, reason, to_tensor
from PIL import Image

from featdiff.data.batches import iter_loaded
from featdiff.data.quiet import quietly
from featdiff.data.references import HeldRef
from featdiff.exceptions import WeightsError
from featdiff.features.weights import read_state_dict

DEFLATED = encoded(Image.new("RGB", (40, 40)), "TIFF", compression="tiff_adobe_deflate")
#: libtiff prints "ZIPDecode: Decoding error ..."
BAD_TIFF = DEFLATED[:10] + b"\xff" * 12 + DEFLATED[22:]
#: Pillow warns of corrupt EXIF data
BAD_EXIF = encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0" + bytes(6))


def damaged(count: int) -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    kinds = ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"]
    seeds = [encoded(noise(), "TIFF", compression=kind) for kind in kinds] + [encoded(noise()), BAD_EXIF]
    for number in range(count):
        data = bytearray(seeds[number % len(seeds)])
        for place in rng.integers(0, len(data), 8):
            data[place] = rng.integers(256)
        yield bytes(data)


@pytest.mark.filterwarnings("always")
def test_nothing_is_printed_on_many_threads() -> None:
    refs = [HeldRef(str(number), data) for number, data in enumerate(damaged(400))]
    with warnings.catch_warnings(record=True) as warned, printed() as lines:
        warnings.simplefilter("always")
        loaded = list(iter_loaded(refs, to_tensor, workers=4, max_pixels=10**6))
    assert sum(bool(item.reason) for item in loaded) > 100
    assert lines == []
    assert warned == []


def test_what_libtiff_says_is_part_of_the_reason() -> None:
    with printed() as lines:
        text = reason(BAD_TIFF)
    assert lines == []
    assert text.startswith("damaged image: ")
    assert "(" in text and text.endswith(")")


def test_others_hear_of_it_as_ever() -> None:
    reason(BAD_TIFF)  # what is installed is installed now
    with printed() as lines, pytest.raises(OSError):
        Image.open(io.BytesIO(BAD_TIFF)).load()
    assert len(lines) == 1

    with pytest.warns(UserWarning, match="EXIF|Truncated|Tag"):
        Image.open(io.BytesIO(BAD_EXIF)).getexif().get(0x0112)


def test_another_thread_is_not_silenced_meanwhile() -> None:
    heard: list[int] = []

    def warn() -> None:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            warnings.filters.insert(0, warnings.filters.pop(0))  # type: ignore[attr-defined]
            warnings.warn("mine", UserWarning, stacklevel=1)
        heard.append(len(found))

    with quietly():
        thread = threading.Thread(target=warn)
        thread.start()
        thread.join()
    assert heard == [1]


def test_an_image_is_not_refused_because_warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(BAD_EXIF) == ""


def test_filters_are_changed_once_and_can_be_pickled() -> None:
    """Others copy them to their processes."""
    reason(BAD_TIFF)
    before = list(warnings.filters)
    reason(BAD_TIFF)
    assert list(warnings.filters) == before
    assert len(pickle.loads(pickle.dumps(before))) == len(before)


def test_a_foreign_weights_file_is_refused_without_warnings(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(pickle.dumps({"x": object}, protocol=5))
    with warnings.catch_warnings(record=True) as warned, printed() as lines:
        warnings.simplefilter("always")
        with pytest.raises(WeightsError, match="weights.pt is not a weights file that can be read safely"):
            read_state_dict(file)
    assert (lines, warned) == ([], [])
