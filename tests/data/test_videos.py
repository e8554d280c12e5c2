"""Videos: a row a frame, damaged ones up to the damage."""

from __future__ import annotations

import csv
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from stores import faulty_server
from videos import COUNT, number_of, write_video

from featdiff import Detector
from featdiff.data.references import MissingRef, iter_images, list_images, ref_of
from featdiff.exceptions import UsageError

av = pytest.importorskip("av")

KINDS = [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx")]


@pytest.mark.parametrize(("name", "codec"), KINDS)
def test_every_frame_is_a_reference(tmp_path: Path, name: str, codec: str) -> None:
    file = write_video(tmp_path / name, codec)
    refs = list_images(file)
    assert [ref.path for ref in refs] == [f"{file}#t={i / 30:.3f}" for i in range(COUNT)]
    assert all(abs(number_of(ref.read()) - i) <= 2 for i, ref in enumerate(refs))

    again = pickle.loads(pickle.dumps(refs))
    for i in (80, 5, 4, 60, 0, 89, 45, 45):
        assert abs(number_of(again[i].read()) - i) <= 2
        assert ref_of(again[i].path) == again[i]


def test_one_frame_in_so_many_seconds(tmp_path: Path) -> None:
    file = write_video(tmp_path / "a.mp4", "libx264")
    assert [ref.path for ref in iter_images(file, every=1)] == [f"{file}#t={t}.000" for t in (0, 1, 2)]
    assert len(list_images(str(file), every=0.5)) == 6
    assert len(list_images(str(file), every=100)) == 1
    assert len(list_images(str(file), every=0.001)) == COUNT
    for every in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="above 0"):
            list_images(file, every=every)


@pytest.mark.parametrize(("name", "codec"), KINDS[1:])
def test_a_cut_file_gives_its_frames_and_a_reason(
    tiny_detector: Detector, tmp_path: Path, name: str, codec: str
) -> None:
    file = write_video(tmp_path / name, codec)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 2 // 3])
    refs = list_images(file)
    assert isinstance(refs[-1], MissingRef)
    assert "cannot be read to its end" in refs[-1].reason

    scores = tiny_detector.score(file)
    good = scores.status.count("ok")
    assert 10 < good < 80
    assert scores.status == ["ok"] * good + ["unreadable"] * (len(refs) - good)
    assert all(abs(number_of(ref.read()) - i) <= 2 for i, ref in enumerate(refs[:good]))


@pytest.mark.parametrize(("name", "codec"), KINDS)
def test_a_hole_does_not_end_the_run(tiny_detector: Detector, tmp_path: Path, name: str, codec: str) -> None:
    file = write_video(tmp_path / name, codec)
    data = bytearray(file.read_bytes())
    middle = len(data) // 3
    data[middle : middle + 600] = np.random.default_rng(0).bytes(600)
    file.write_bytes(data)
    scores = tiny_detector.score([str(file), np.zeros((20, 20, 3), np.uint8)])
    assert scores.status[0] == scores.status[-1] == "ok"
    assert scores.path[-1] == "array[1]"


@pytest.mark.parametrize(
    "content",
    [b"", b"no video at all", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile a.mp4\n"],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.avi"])
def test_what_is_no_video_has_a_reason(tmp_path: Path, content: bytes, name: str) -> None:
    """Playlists would lead to other files, and are not followed."""
    write_video(tmp_path / "a.mp4" if name != "a.mp4" else tmp_path / "b.mp4", "libx264")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match="video cannot be read"):
        list_images(tmp_path / name)


def test_sound_without_pictures(tmp_path: Path) -> None:
    file = tmp_path / "sound.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(UsageError, match="it has no pictures"):
        list_images(file)


def test_videos_on_the_command_line(featdiff_cli: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> None:
    file = write_video(tmp_path / "clip.mp4", "libx264")
    result = featdiff_cli("score", file, "--every", 1, "-m", tiny_model)
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["path"] for row in rows] == [f"{file}#t={t}.000" for t in (0, 1, 2)]
    assert featdiff_cli("score", file, "--every", 0, "-m", tiny_model).exit_code == 2

    one = featdiff_cli("score", f"{file}#t=1.000", "-m", tiny_model)
    (row,) = csv.DictReader(io.StringIO(one.stdout))
    assert row["path"] == rows[1]["path"]
    assert float(row["ood_score"]) == pytest.approx(float(rows[1]["ood_score"]), abs=1e-5)

    with faulty_server() as server:
        server.files["clip.mp4"] = file.read_bytes()
        remote = featdiff_cli("score", f"{server.url}/ok/clip.mp4", "--every", 1, "-m", tiny_model)
        scores = [row["ood_score"] for row in csv.DictReader(io.StringIO(remote.stdout))]
        assert scores == [row["ood_score"] for row in rows]
