"""The blocks of a run on a real Ray cluster of two nodes on loopback, whose workers and nodes die."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from helpers import ROOT, fails, same_rows, typed
from pages import RAY, commands_at

pytest.importorskip("ray.data")

from featdiff import Detector
from featdiff.data.references import iter_images
from featdiff.detectors import load_detector
from featdiff.detectors.filling import Filled
from featdiff.serving import ray_pool
from featdiff.serving.cluster import Run
from featdiff.serving.manifest import Manifest, write_manifest
from featdiff.serving.ray_pool import Cluster, _sizes
from featdiff.serving.ray_scoring import Scorer, Task, score_on
from featdiff.serving.training_features import fill_on

Cli = Callable[..., Result]
BLOCK = 32
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100_000_000}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes, each with a raylet of its own; workers find this checkout."""
    from ray.cluster_utils import Cluster as Nodes

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Nodes(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        try:
            nodes.add_node(**NODE)
            yield nodes
        finally:
            nodes.shutdown()


@pytest.fixture(scope="module")
def manifest(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """270 images, 2 of them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    for file in (*sorted(sample_folders["test"].iterdir()), *sorted(sample_folders["digits"].iterdir()))[:268]:
        os.link(file, folder / file.name)
    for i in range(2):
        (folder / f"china_broken_{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much")
    file = tmp_path_factory.mktemp("manifest") / "m.parquet"
    assert write_manifest(iter_images(str(folder)), str(file)).rows == 270
    return file


@pytest.fixture(scope="module")
def plain(manifest: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """The rows of a plain run."""
    from featdiff.report.writers import open_writer

    file = tmp_path_factory.mktemp("plain") / "plain.parquet"
    with file.open("wb") as stream:
        writer = open_writer("parquet", stream)
        writer.write(load_detector(tiny_model).score(Manifest(str(manifest)).block(0, 1000).refs()))
        writer.close()
    return dict(pq.read_table(file).to_pydict())


def command(manifest: Path, out: Path, model: Path, cluster: Any, *more: object) -> tuple[object, ...]:
    line = ("score", "--manifest", manifest, "--out", out, "-m", model, "--block", BLOCK, "--device", "cpu")
    return (*line, "--ray", cluster.address, *more)


def merged(featdiff_cli: Cli, out: Path) -> dict[str, list[object]]:
    file = out.with_suffix(".parquet")
    done = featdiff_cli("merge", "-q", out, "-o", file)
    assert done.exit_code == 3, done.stderr
    return dict(pq.read_table(file).to_pydict())


def task_of(manifest: Path, out: Path, model: Path) -> Task:
    """As the command makes it."""
    made_with = {"featdiff": "x", "model": "m", "fpr": 0.05, "exclude-known": False, "max-pixels": 1, "max-bytes": 1}
    task = Task(
        manifest=str(manifest),
        block=BLOCK,
        arguments={"device": "cpu"},
        out=str(out),
        made_with=made_with,
        model=str(model),
        fpr=0.05,
    )
    hints = {"manifest": str(manifest), "model folder": str(model)}
    Run(str(out), Manifest(str(manifest)), made_with, BLOCK, hints).begin()
    return task


def workers() -> list[psutil.Process]:
    """Those of this test's own cluster, in which models are at work."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "MapWorker" in process.name() or "MapWorker" in " ".join(process.cmdline())]


def test_rows_are_those_of_a_plain_run(
    featdiff_cli: Cli, manifest: Path, tiny_model: Path, plain: dict[str, list[object]], cluster: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = featdiff_cli(*command(manifest, out, tiny_model, cluster, "--actors", 2))
    assert done.exit_code == 3, done.stderr
    first = next(line for line in done.stderr.splitlines() if " images in " in line)
    assert first.startswith("270 images in ") and first.endswith(", 2 unreadable")
    assert same_rows(merged(featdiff_cli, out), plain)

    files = sorted(out.glob("*.parquet"))
    before = {file.name: file.read_bytes() for file in files}
    for file in files[2:4]:
        file.unlink()
    again = featdiff_cli(*command(manifest, out, tiny_model, cluster, "-q"))  # resumed
    assert again.exit_code == 3, again.stderr  # the broken files are in one of these blocks
    assert {file.name: file.read_bytes() for file in out.glob("*.parquet")} == before


@pytest.mark.parametrize("portions", [2_000, 4])
def test_a_worker_is_killed_in_the_middle(
    featdiff_cli: Cli,
    manifest: Path,
    tiny_model: Path,
    plain: dict[str, list[object]],
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    portions: int,
) -> None:
    """Also while it has several blocks to do, of which some are done."""
    monkeypatch.setattr(ray_pool, "_PORTIONS", portions)
    out = tmp_path / "out"
    killed = 0
    rows = 0
    for counts in score_on(Cluster(cluster.address, 2), task_of(manifest, out, tiny_model), range(9)):
        rows += counts.rows
        if not killed:
            victim = workers()[0]
            victim.send_signal(signal.SIGKILL)
            killed = victim.pid
    assert killed
    assert rows == 270
    assert same_rows(merged(featdiff_cli, out), plain)


def test_a_node_is_removed_and_one_added(
    featdiff_cli: Cli, manifest: Path, tiny_model: Path, plain: dict[str, list[object]], cluster: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    removed = False
    rows = 0
    for counts in score_on(Cluster(cluster.address, 2), task_of(manifest, out, tiny_model), range(9)):
        rows += counts.rows
        if not removed:
            (other,) = [node for node in cluster.list_all_nodes() if not node.head]
            cluster.remove_node(other, allow_graceful=False)
            cluster.add_node(wait=False, **NODE)
            removed = True
    assert removed
    assert rows == 270
    assert same_rows(merged(featdiff_cli, out), plain)


def test_training_features_are_computed_on_all_nodes(
    featdiff_cli: Cli, manifest: Path, seeded_backbone: Path, cluster: Any, tmp_path: Path
) -> None:
    """A fit reads them without a pass, though a worker was killed in the middle."""
    cache = tmp_path / "cache"
    settings = {"backbone": "test_resnet", "weights": str(seeded_backbone), "layers": "layer1,layer2", "device": "cpu"}
    task = ray_pool.Task(manifest=str(manifest), block=BLOCK, arguments=settings | {"cache": str(cache)})
    total = Filled()
    for part in fill_on(Cluster(cluster.address, 2), task, range(9)):
        if not total.images:
            workers()[0].send_signal(signal.SIGKILL)
        total.add(part)
    assert (total.images, total.unreadable, len(total.named)) == (270, 2, 2)
    assert list(total.stores.values()) == ["float32 by torch"]

    images = Manifest(str(manifest)).block(0, 1000).refs()
    extraction, _ = Detector(**settings, cache=cache).read(images)
    assert (extraction.computed, len(extraction.paths)) == (0, 268)

    options = [f"--{name}={value}" for name, value in settings.items()]
    line = ("features", "--manifest", manifest, "--block", 100, *options, "--cache", cache)
    again = featdiff_cli(*line, "--ray", cluster.address)
    assert again.exit_code == 3, again.stderr
    assert again.stderr.startswith("270 images: features of 0 computed, 268 were there, 2 unreadable; ")
    assert "--engine torch" in again.stderr


def test_what_an_actor_cannot_do_is_an_answer(manifest: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Else the block of one worker would end the work of all."""
    import numpy as np

    batch = {"block": np.array([3])}
    gone = Scorer(task_of(manifest, tmp_path / "out", tmp_path / "no-model"))(batch)
    assert gone["rows"] == [0]
    assert str(gone["error"][0]).startswith(f"no featdiff model at {tmp_path / 'no-model'}")

    scorer = Scorer(task_of(manifest, tmp_path / "out", tiny_model))
    first, again = scorer(batch), scorer(batch)  # a block that an actor had done before it died
    assert first == again
    assert first["rows"] == [BLOCK] and first["error"] == [""]


def test_relative_names_are_seen_from_the_folder_of_the_command(
    few_images: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    monkeypatch.chdir(few_images)  # and back, when the test ends
    write_manifest(iter_images(["a.png", "b.png"]), "m.parquet")
    task = task_of(few_images / "m.parquet", tmp_path / "out", tiny_model)
    os.chdir("/")
    answer = Scorer(replace(task, working_folder=str(few_images)))({"block": np.array([0])})
    assert (answer["rows"], answer["unreadable"], answer["error"]) == ([2], [0], [""])


def test_failures_are_one_line(
    featdiff_cli: Cli, manifest: Path, tiny_model: Path, cluster: Any, tmp_path: Path
) -> None:
    from featdiff.exceptions import FeatdiffError

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    task = task_of(manifest, tmp_path / "out", model)
    shutil.rmtree(model)
    with pytest.raises(FeatdiffError, match=r"^2 blocks failed, which the same command does again; block \d: no feat"):
        list(score_on(Cluster(cluster.address, 1), task, range(2)))


def test_a_cluster_that_is_not_there(featdiff_cli: Cli, manifest: Path, tiny_model: Path, tmp_path: Path) -> None:
    line = ("score", "-q", "--manifest", manifest, "--out", tmp_path / "out", "-m", tiny_model)
    done = featdiff_cli(*line, "--ray", "127.0.0.1:1")
    fails(done, 2, "--ray: no Ray cluster answers at 127.0.0.1:1", "Connection refused", "ray start --head")


@pytest.mark.parametrize(
    ("nodes", "cluster", "blocks", "expected"),
    [
        ([{"CPU": 8}, {"CPU": 8}], Cluster(), 100, (2, 8, 0)),
        ([{"CPU": 8}, {"CPU": 4}], Cluster(actors=4), 100, (4, 3, 0)),
        ([{"CPU": 8}, {"CPU": 8}], Cluster(), 1, (1, 8, 0)),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}], Cluster(), 100, (8, 4, 1)),
        ([{"CPU": 16, "GPU": 1}], Cluster(gpus_per_actor=0.5), 100, (2, 8, 0.5)),
        ([{"CPU": 2}], Cluster(actors=8), 100, (8, 1, 0)),
        ([{"CPU": 0}, {"CPU": 2}], Cluster(), 100, (1, 2, 0)),
    ],
)
def test_sizes(
    nodes: list[dict[str, float]], cluster: Cluster, blocks: int, expected: tuple[int, float, float]
) -> None:
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    assert _sizes([*alive, {"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}], cluster, blocks) == expected


def test_the_command_of_the_page(
    sample_folders: dict[str, Path],
    manifest: Path,
    tiny_model: Path,
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (command,) = commands_at(RAY)
    shutil.copy(manifest, tmp_path / "manifest.parquet")
    shutil.copytree(tiny_model, tmp_path / "my-model")
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    done = typed(command, tmp_path)
    assert done.returncode == 3, done.stderr
    assert "done: 1 of 1 blocks, in on-ray" in done.stderr
