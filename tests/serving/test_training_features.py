"""``featdiff features``: whoever fills the store, ``featdiff train`` reads it without a pass of the backbone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from helpers import FEATDIFF, fails, stopped

from featdiff import Detector
from featdiff.data.references import iter_images, list_images
from featdiff.detectors.filling import Filled, Filling
from featdiff.features.store import FeatureStore
from featdiff.serving.manifest import write_manifest

Cli = Callable[..., Result]
LAYERS = "layer1,layer2"


@pytest.fixture(scope="module")
def photos(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """203 files: 2 are broken, and one is a copy."""
    folder = tmp_path_factory.mktemp("photos")
    files = sorted(sample_folders["train"].iterdir())[:200]
    for file in files:
        os.link(file, folder / file.name)
    os.link(files[0], folder / "z_copy.png")
    for name in ("broken", "z_broken"):
        (folder / f"{name}.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much")
    return folder


@pytest.fixture(scope="module")
def manifest(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("manifest") / "m.parquet"
    assert write_manifest(iter_images(str(photos)), str(file)).rows == 203
    return file


@pytest.fixture(scope="module")
def expected(photos: Path, seeded_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """What a fit computes by itself."""
    detector = detector_of(seeded_backbone, tmp_path_factory.mktemp("alone"))
    extraction, store = detector.read(photos)
    assert extraction.computed == 200
    return store.table(extraction.digests)[:]


def detector_of(weights: Path, cache: Path, **more: Any) -> Detector:
    return Detector("test_resnet", weights=weights, layers=LAYERS, device="cpu", cache=cache, **more)


def of_backbone(weights: Path, cache: Path) -> tuple[object, ...]:
    """The options that ``features`` and ``train`` have in common."""
    return ("--backbone", "test_resnet", "--weights", weights, "--layers", LAYERS, "--device", "cpu", "--cache", cache)


def read_by_a_fit(photos: Path, detector: Detector) -> torch.Tensor:
    """The features of the images, of which none may be computed."""
    extraction, store = detector.read(photos)
    assert extraction.computed == 0
    assert len(extraction.paths) == 201
    return store.table(extraction.digests)[:]


def test_two_processes_fill_what_train_reads(
    featdiff_cli: Cli, photos: Path, manifest: Path, seeded_backbone: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    config = tmp_path / "quick.toml"
    config.write_text("[detector]\nlayers = 'layer1,layer2'\nrecipe = {epochs = 1, min_steps = 5}\n")
    options = (*of_backbone(seeded_backbone, cache), "--config", config)
    line = [FEATDIFF, "features", "--manifest", manifest, "--block", "16", *options]
    both = [subprocess.Popen([*map(str, line), "--shard", f"{i}/2"], stderr=subprocess.PIPE, text=True) for i in (1, 2)]
    told = [process.communicate()[1].splitlines() for process in both]
    assert [process.returncode for process in both] == [3, 3]
    counts = [tuple(map(int, re.findall(r"\d+", line.partition(";")[0]))) for line in (told[0][0], told[1][0])]
    there = sum(count[2] for count in counts)
    assert there in (0, 1)  # the first image and its copy belong to two processes: the later one may see it
    assert [(images, computed + kept, bad) for images, computed, kept, bad in counts] == [(96, 95, 1), (107, 106, 1)]
    assert told[0][1] == f"  left out: {photos / 'broken.jpg'}: damaged image: Truncated File Read"
    assert told[1][1].startswith(f"  left out: {photos / 'z_broken.jpg'}: ")
    assert told[0][2:] == told[1][2:]
    assert told[0][2].startswith(f"they are in {cache / 'features'}/") and told[0][2].endswith(" (float32 by torch)")
    assert told[0][3] == "Next: featdiff train IMAGES with the same options and --engine torch"

    files = sorted(file.name for file in (cache / "features").rglob("*.npy"))
    trained = featdiff_cli("train", "-q", photos, *options, "--no-local", "-o", tmp_path / "model")
    assert trained.exit_code == 3, trained.stderr
    assert sorted(file.name for file in (cache / "features").rglob("*.npy")) == files  # nothing was added

    given = read_by_a_fit(photos, detector_of(seeded_backbone, cache))
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)  # of other batches


def test_what_is_there_is_not_computed_again(
    featdiff_cli: Cli, manifest: Path, seeded_backbone: Path, tmp_path: Path
) -> None:
    options = of_backbone(seeded_backbone, tmp_path)
    line = ("features", "--manifest", manifest, "--block", 50, *options)
    first = featdiff_cli(*line, "--shard", "1/5")
    assert first.stderr.startswith("50 images: features of 49 computed, 0 were there, 1 unreadable; ")
    whole = featdiff_cli(*line)
    assert whole.stderr.startswith("203 images: features of 151 computed, 50 were there, 2 unreadable; ")

    again = featdiff_cli(*line)
    assert again.exit_code == 3
    assert again.stderr.startswith("203 images: features of 0 computed, 201 were there, 2 unreadable; ")
    other = featdiff_cli(*line, "--size", 64, "--shard", "5/5")  # other numbers
    assert other.stderr.startswith("3 images: features of 2 computed, 0 were there, 1 unreadable; ")


def test_a_run_that_is_asked_to_end_keeps_what_it_has(
    manifest: Path, photos: Path, seeded_backbone: Path, tmp_path: Path
) -> None:
    line = ("features", "--manifest", manifest, "--block", 8, *of_backbone(seeded_backbone, tmp_path))
    code, _, told = stopped(line, lambda: list(tmp_path.rglob("*.digests")), number=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, told
    assert told == "interrupted; features are kept, the same command goes on from there\n"

    extraction, _ = detector_of(seeded_backbone, tmp_path).read(photos)
    assert 0 < extraction.computed <= 200 - 7  # of the first block one image is broken


def test_the_engine_is_the_one_of_train(
    featdiff_cli: Cli, manifest: Path, photos: Path, seeded_backbone: Path, tmp_path: Path
) -> None:
    """Features of engines are kept apart; a named one is the same for both."""
    line = ("features", "--manifest", manifest, *of_backbone(seeded_backbone, tmp_path), "--engine", "onnxruntime")
    done = featdiff_cli(*line)
    assert done.exit_code == 3, done.stderr
    assert " (float32 by onnxruntime " in done.stderr
    assert done.stderr.endswith("Next: featdiff train IMAGES with the same options and --engine onnxruntime\n")
    read_by_a_fit(photos, detector_of(seeded_backbone, tmp_path, engine="onnxruntime"))


def test_engines_are_compared_where_train_would(photos: Path, seeded_backbone: Path, tmp_path: Path) -> None:
    """By the images of the whole set, however few a worker gets."""
    settings = detector_of(seeded_backbone, tmp_path).settings
    images = list_images(photos)[1:9]
    assert Filling(settings, images, 999).engine_note == ""
    assert Filling(settings, images, 1000).engine_note.startswith(("torch, for ", "openvino ", "onnxruntime "))


def test_writers_of_one_store_see_each_other_when_they_begin(tmp_path: Path) -> None:
    """What two have added at once is there twice on disk and once in the index."""
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    names = [bytes([i]) * 16 for i in range(3)]
    first, second = FeatureStore(tmp_path, 4), FeatureStore(tmp_path, 4)
    for store, numbers in ((first, (0, 1)), (second, (1, 2))):
        for i in numbers:
            store.add(names[i], rows[i])
        store.flush()
    assert len(list(tmp_path.glob("*.digests"))) == 2
    store = FeatureStore(tmp_path, 4)
    assert len(store) == 3
    assert store.table(names)[:].tolist() == rows.tolist()


def test_of_many_unreadable_images_some_are_named() -> None:
    total = Filled()
    for i in range(30):
        total.add(Filled(200, 100, 100, [(f"{i}-{k}", "broken") for k in range(100)], {"a": "x by y"}))
    assert (total.images, total.computed, total.unreadable, len(total.named)) == (6000, 3000, 3000, 1000)
    assert total.stores == {"a": "x by y"}


def test_workers_that_computed_different_things_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    from featdiff_cli.features import _say
    from featdiff_cli.progress import Bars

    stores = {"c/1": "float32 by torch", "c/2": "float32 by openvino 2026.1"}
    assert _say(Filled(20, 20, 0, [], stores), Bars(quiet=True), quiet=False) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:3] == ["they are in c/1 (float32 by torch)", "they are in c/2 (float32 by openvino 2026.1)"]
    assert lines[3].startswith("WARNING: not all workers computed the same: give --engine, --precision and --device")
    assert len(lines) == 4


def test_what_does_not_fit(featdiff_cli: Cli, manifest: Path, tmp_path: Path) -> None:
    line = ("features", "-q", "--manifest", manifest, "--cache", tmp_path)
    fails(featdiff_cli(*line, "--actors", 2), 2, "--actors and --gpus-per-actor belong to --ray")
    fails(featdiff_cli(*line, "--ray", "--shard", "1/2"), 2, "drop --shard")
    fails(featdiff_cli(*line, "--shard", "3/2"), 2, "--shard '3/2' must be I/N")
    fails(featdiff_cli(*line, "--config", "lmd_small"), 2, "lmd_small is of mode pixel, which has no features")
    fails(featdiff_cli(*line, "--ray", "127.0.0.1:1"), 2, "no Ray cluster answers at 127.0.0.1:1")
    fails(featdiff_cli("features", "-q", "--manifest", tmp_path / "no.parquet"), 1, "no.parquet")
    fails(featdiff_cli(*line, "--backbone", "resnet51"), 2, "--backbone", "resnet51")
