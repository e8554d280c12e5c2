"""What manifests, shards and Ray add to scoring, and what they need for very many images; the table of RESULTS.md.

    python tests/benchmarks/cluster.py
    python tests/benchmarks/cluster.py --only wall --data FOLDER

Each part runs in processes of its own. Times are processor seconds of a process and of all below it, so that busy
neighbours count little; memory is the largest resident set. Scoring is measured with a tiny backbone, to which all
else that a run does is large, on the built-in tiles, each under many names.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from featdiff.data import samples
from featdiff.data.image_refs import ImageRef, MissingRef
from featdiff.data.references import iter_images
from featdiff.exceptions import FeatdiffError
from featdiff.report.rows import ReportRows
from featdiff.report.writers import open_writer
from featdiff.serving.cluster import Run
from featdiff.serving.manifest import Manifest, write_manifest
from featdiff.serving.merging import TableWriter, blocks_of, scores_of
from featdiff.verdicts.results import Scores

BLOCK = 10_000
MADE_WITH = {"model": "a stand-in"}
#: Bytes of a name, as in a bucket with folders.
NAME = "s3://bucket-of-images/2026/{:04}/{:06}/{:012}.jpg"
PAUSE = 0.1
#: Rows of a file of a feature store.
SHARD = 500_000


def names(count: int) -> Iterator[ImageRef]:
    """Names in no order."""
    for i in range(count):
        number = i * 7_368_787 % count  # a prime: each once
        yield MissingRef(NAME.format(number % 7919, number % 104_729, number), "")


def stand_in(refs: Sequence[ImageRef]) -> Iterator[Scores]:
    """Rows as a detector of six layers gives them, 256 at a time."""
    rng = np.random.default_rng(0)
    for start in range(0, len(refs), 256):
        part = refs[start : start + 256]
        n = len(part)
        score = rng.normal(size=n)
        layers = {f"stage{i}": rng.normal(size=n) for i in range(6)}
        paths = [ref.path for ref in part]
        yield Scores(paths, ["ok"] * n, [""] * n, score, rng.random(n), score > 2, layers, 0.05)


# ---- parts: each is run as a process ----


def part_manifest(folder: Path, count: int) -> None:
    write_manifest(names(count), str(folder / "names.parquet"))


def run_in(folder: Path) -> Run:
    return Run(str(folder / "blocks"), Manifest(str(folder / "names.parquet")), MADE_WITH, BLOCK)


def part_blocks(folder: Path, count: int) -> None:
    """Score ``count`` names of a manifest, and say how memory grows."""
    run = run_in(folder)
    run.begin()
    process = psutil.Process()
    for number in range(count // BLOCK):
        run.score(number, stand_in)
        if number == 9:
            print(f"after 10 blocks {process.memory_info().rss / 1e6:.0f} MB", flush=True)
    print(f"after {count // BLOCK} blocks {process.memory_info().rss / 1e6:.0f} MB")


def part_merge(folder: Path, count: int) -> None:
    reported = ReportRows()
    with (folder / "merged.parquet").open("wb") as stream:
        writer = TableWriter("parquet", stream)
        for table in blocks_of(run_in(folder)):
            writer.write(table)
            reported.add(scores_of(table, 0.05))
        writer.close()
    assert reported.total == count


def part_index(folder: Path, count: int) -> None:
    """Open a feature store of ``count`` digests, and look up a thousand of them."""
    from featdiff.features.store import FeatureStore

    before = psutil.Process().memory_info().rss
    store = FeatureStore(folder, 4, np.float16)
    assert len(store) == count
    after = psutil.Process().memory_info().rss
    print(f"{before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after")


def make_store(folder: Path, count: int) -> None:
    """A store of short vectors, in the files that it would write itself."""
    from featdiff.files.sealed import checksum, write_sealed

    folder.mkdir()
    rng = np.random.default_rng(0)
    for start in range(0, count, SHARD):
        rows = min(SHARD, count - start)
        file = folder / f"{uuid.uuid4().hex}.digests"
        vectors = file.with_suffix(".vectors.npy")
        np.save(vectors, np.zeros((rows, 4), np.float16))
        write_sealed(file, rng.bytes(16 * rows) + checksum(vectors.read_bytes()))


def part_score(folder: Path, count: int) -> None:
    """Processor time of an image in one run and in blocks, in turn, in one process."""
    from featdiff import load_detector

    detector = load_detector(folder / "model", device="cpu", engine="torch")
    manifest = Manifest(str(folder / "images.parquet"))
    refs = list(iter_images(str(folder / "images")))
    used: dict[str, list[float]] = {"one run": [], "blocks of 512": []}
    for number in range(5):
        start = time.process_time()
        with (folder / f"{number}.parquet").open("wb") as stream:
            writer = open_writer("parquet", stream)
            for scores in detector.iter_scores(refs):
                writer.write(scores)
            writer.close()
        middle = time.process_time()
        run = Run(str(folder / f"scored{number}"), manifest, MADE_WITH, 512)
        run.begin()
        for block in run.left(run.shard(1, 1)):
            run.score(block, detector.iter_scores)
        used["one run"].append(middle - start)
        used["blocks of 512"].append(time.process_time() - middle)
    for name, seconds in used.items():
        print(f"{name}: {1000 * min(seconds) / count:.2f} ms an image, median {1000 * median(seconds) / count:.2f}")


# ---- measuring ----


def measured(command: Sequence[object]) -> tuple[float, float, float, str]:
    """(processor seconds, seconds, largest resident MB of one process, output) of a command and all below it."""
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    used: dict[int, float] = {}
    most = 0.0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            for each in (watched, *watched.children(recursive=True)):
                times = each.cpu_times()
                used[each.pid] = times.user + times.system
                most = max(most, each.memory_info().rss / 1e6)
        except psutil.Error:
            pass
        time.sleep(PAUSE)
    seconds = time.perf_counter() - start
    output = process.stdout.read().decode() if process.stdout else ""
    if process.returncode not in (0, 3):
        raise FeatdiffError(f"{command} failed: {output}")
    return sum(used.values()), seconds, most, output


def part(name: str, folder: Path, count: int) -> tuple[float, float, float, str]:
    return measured([sys.executable, __file__, "--part", name, "--folder", folder, "--count", count])


def tiles(folder: Path, source: Path, count: int) -> Path:
    """``count`` names of the built-in tiles."""
    files = sorted(source.iterdir())
    folder.mkdir()
    for i in range(count):
        os.link(files[i % len(files)], folder / f"{i:06}.png")
    return folder


def tiny_model(folder: Path, train: Path) -> Path:
    from featdiff import Detector

    recipe = {"epochs": 2, "min_steps": 20, "batch_size": 64}
    layers = "layer1,layer2,layer4"
    weights = folder / "test_resnet.safetensors"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from weights_files import write_seeded_backbone

    write_seeded_backbone(weights)
    detector = Detector("test_resnet", weights=weights, layers=layers, recipe=recipe, local=False).fit(train)
    detector.save_pretrained(folder / "model")
    return folder / "model"


def prepare(place: Path, count: int) -> None:
    """A tiny model, ``count`` tiles and their manifest."""
    folders = samples.write(place / "samples")
    tiny_model(place, folders["train"])
    write_manifest(iter_images(str(tiles(place / "images", folders["test"], count))), str(place / "images.parquet"))


def print_ray_blocks(place: Path, counts: tuple[int, int]) -> None:
    """What a block costs on Ray beside its images: of one name each, which holds no image."""
    score = [sys.executable, "-m", "featdiff_cli", "score", "-q", "-m", place / "model", "--device", "cpu"]
    found = []
    for count in counts:
        write_manifest((MissingRef(f"gone/{i:06}.png", "") for i in range(count)), str(place / "gone.parquet"))
        more = ["--manifest", place / "gone.parquet", "--out", place / f"gone{count}", "--block", 1, "--ray", "local"]
        found.append(measured([*score, *more]))
    blocks = counts[1] - counts[0]
    print(
        f"Ray: {1000 * (found[1][0] - found[0][0]) / blocks:.1f} ms of processors a block, "
        f"largest process {found[0][2]:.0f} MB at {counts[0]:,} blocks, {found[1][2]:.0f} MB at {counts[1]:,}"
    )


def print_wall(place: Path, data: Path) -> None:
    """Wall time of the same images in this process and on Ray, in turn; Ray's includes its start."""
    images, model = data / "cifar10.zip" / "test", place / "model"
    score = [sys.executable, "-m", "featdiff_cli", "score", "-q", "-m", model, "--device", "cpu"]
    measured([sys.executable, "-m", "featdiff_cli", "train", "-q", images, "-o", model])
    write_manifest(iter_images(str(data / "cifar10.zip")), str(place / "m.parquet"))
    for number in range(2):
        seconds = []
        for name, more in (("plain", []), ("ray", ["--ray", "local"])):
            out = ["--manifest", place / "m.parquet", "--out", place / f"{name}{number}", "--block", 1_000]
            seconds.append(measured([*score, *out, *more])[1])
        print(
            f"10,000 images: plain {seconds[0]:.0f} s, Ray {seconds[1]:.0f} s, {seconds[1] / seconds[0]:.2f} x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--digests", type=int, default=10_000_000)
    parser.add_argument("--images", type=int, default=1_024)
    parser.add_argument("--ray-blocks", type=int, nargs=2, default=(100, 600))
    parser.add_argument("--only", nargs="+", default=["rows", "scoring", "index"])
    parser.add_argument("--data", type=Path, help="folder with cifar10.zip, for --only wall")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        globals()[f"part_{arguments.part}"](arguments.folder, arguments.count)
        return

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if "rows" in arguments.only:
            for what in ("manifest", "blocks", "merge"):
                used, _, memory, output = part(what, place, arguments.rows)
                print(f"{what}: {arguments.rows:,} rows, {used:.1f} s, {memory:.0f} MB; {' '.join(output.split())}")
            for file in (place / "names.parquet", place / "merged.parquet"):
                print(f"{file.name}: {file.stat().st_size / arguments.rows:.1f} bytes a row", flush=True)
        if "scoring" in arguments.only:
            prepare(place, arguments.images)
            print(part("score", place, arguments.images)[3], end="", flush=True)
            print_ray_blocks(place, tuple(arguments.ray_blocks))
        if "wall" in arguments.only:
            print_wall(place, arguments.data)
        if "index" in arguments.only:
            make_store(place / "store", arguments.digests)
            used, _, memory, output = part("index", place / "store", arguments.digests)
            print(f"index: {arguments.digests:,} digests, {used:.1f} s, {memory:.0f} MB; {output.strip()}")


if __name__ == "__main__":
    main()
