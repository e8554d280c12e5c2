"""``featdiff score --manifest`` and ``featdiff merge``: nothing is lost or doubled, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import Result
from helpers import FEATDIFF, fails, same_rows, stopped
from PIL import Image
from stores import s3_store

from featdiff.data.image_refs import MissingRef
from featdiff.serving.cluster import Run
from featdiff.serving.manifest import Manifest, write_manifest

Cli = Callable[..., Result]
#: Rows of a block.
BLOCK = 64


@pytest.fixture(scope="module")
def images(sample_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """330 files, 3 of them broken, and a folder named like an image."""
    folder = tmp_path_factory.mktemp("pictures")
    for file in (*sample_folders["test"].iterdir(), *sample_folders["digits"].iterdir()):
        os.link(file, folder / file.name)
    for i in range(3):
        (folder / f"china_broken_{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much")
    Image.new("RGB", (9, 500)).save(folder / "other_shape.png")
    return folder


@pytest.fixture(scope="module")
def manifest(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from featdiff.data.references import iter_images

    file = tmp_path_factory.mktemp("manifest") / "m.parquet"
    assert write_manifest(iter_images(str(images)), str(file)).rows == 334
    return file


@pytest.fixture
def plain(featdiff_cli: Cli, images: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """The rows of a plain run."""
    file = tmp_path / "plain.parquet"
    assert featdiff_cli("score", "-q", images, "-m", tiny_model, "-o", file).exit_code == 3
    return file


def command(manifest: Path, out: object, model: Path, *more: object) -> tuple[object, ...]:
    return ("score", "--manifest", manifest, "--out", out, "-m", model, "--block", BLOCK, *more)


def same(file: Path, other: Path) -> bool:
    """The same rows; in other batches the last digit of a score may be another."""
    return same_rows(pq.read_table(file).to_pydict(), pq.read_table(other).to_pydict())


def parquets(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.glob("*.parquet")}


@pytest.mark.parametrize("blocks", [1, 2, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_each_block_belongs_to_one_shard(tmp_path: Path, blocks: int, count: int) -> None:
    file = str(tmp_path / "m.parquet")
    write_manifest([MissingRef(f"{i:03}", "") for i in range(blocks)], file)
    run = Run("out", Manifest(file), {}, block=1)
    shards = [run.shard(number, count) for number in range(1, count + 1)]
    assert [block for shard in shards for block in shard] == list(range(blocks))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    for number, shard in enumerate(shards, 1):
        assert all(run.shard_of(block, count) == number for block in shard)


def test_shards_give_the_rows_of_a_plain_run(
    featdiff_cli: Cli, images: Path, manifest: Path, tiny_model: Path, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    codes = []
    for shard in ("2/3", "3/3", "1/3"):
        done = featdiff_cli(*command(manifest, out, tiny_model, "--shard", shard))
        codes.append(done.exit_code)
        assert f"done: 2 of 6 blocks, in {out}" in done.stderr
    assert codes == [0, 0, 3]  # the broken files are all in one shard

    merged = tmp_path / "merged.parquet"
    report = tmp_path / "report.html"
    done = featdiff_cli("merge", out, "-o", merged, "--report", report)
    assert done.exit_code == 3
    assert same(merged, plain)
    summary = featdiff_cli("score", images, "-m", tiny_model, "-o", tmp_path / "plain.csv").stderr.splitlines()
    lines = done.stderr.splitlines()
    assert lines[0] == f"334 images: {summary[0].partition('): ')[2]}; each is there once, in 6 blocks"
    assert lines[1:7] == summary[1:7]  # the strangest
    assert "of 334 images" in report.read_text() and "Duration" not in report.read_text()  # they were scored elsewhere

    rows = pq.read_table(merged).to_pylist()
    featdiff_cli("merge", "-q", out, "-o", tmp_path / "m.jsonl")
    assert [json.loads(line) for line in (tmp_path / "m.jsonl").open()] == rows
    featdiff_cli("merge", "-q", out, "-o", tmp_path / "m.csv")
    written = (tmp_path / "m.csv").read_text().splitlines()
    assert written[0] == (tmp_path / "plain.csv").read_text().splitlines()[0]
    assert [line.split(",")[0] for line in written[1:]] == [row["path"] for row in rows]


def test_only_what_is_missing_is_scored_and_the_bytes_are_the_same(
    featdiff_cli: Cli, manifest: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    featdiff_cli(*command(manifest, out, tiny_model, "-q"))
    before = parquets(out)
    victim = sorted(before)[2]
    (out / victim).unlink()
    for number, file in enumerate(out.iterdir()):  # clocks that differ decide nothing
        os.utime(file, (0, 0) if number % 2 else (4e9, 4e9))

    merge = featdiff_cli("merge", out)
    fails(merge, 1, "1 of 6 blocks (64 rows) are missing", "namely 2:", "--shard 1/1")
    done = featdiff_cli(*command(manifest, out, tiny_model))
    assert done.stderr.startswith("270 of 334 images are scored already, in 5 of 6 blocks\n64 images in ")
    assert parquets(out) == before
    assert featdiff_cli(*command(manifest, out, tiny_model)).stderr.splitlines()[1].startswith("0 images in ")


def test_a_killed_process_costs_its_block_only(
    featdiff_cli: Cli, manifest: Path, tiny_model: Path, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = command(manifest, out, tiny_model, "-q")
    code, _, _ = stopped(arguments, lambda: len(parquets(out)) >= 2, number=signal.SIGKILL)
    assert code == -signal.SIGKILL
    kept = parquets(out)
    assert 2 <= len(kept) < 6

    assert featdiff_cli(*arguments).exit_code in (0, 3)
    assert kept.items() <= parquets(out).items()
    merged = tmp_path / "merged.parquet"
    assert featdiff_cli("merge", "-q", out, "-o", merged).exit_code == 3
    assert same(merged, plain)


def test_sigterm_says_what_is_kept(manifest: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, errors = stopped(
        command(manifest, out, tiny_model, "-q"), lambda: len(parquets(out)) >= 1, number=signal.SIGTERM
    )
    assert code == 143
    kept = f"{len(parquets(out))} of 6 blocks are in {out}: the same command does the others"
    assert errors.splitlines()[-1] == f"interrupted; {kept}"
    assert not list(out.glob(".*"))


def test_two_processes_at_once(
    featdiff_cli: Cli, manifest: Path, tiny_model: Path, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    line = [FEATDIFF, *map(str, command(manifest, out, tiny_model, "-q"))]
    both = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode in (0, 3) for process in both] == [True, True], ends
    merged = tmp_path / "merged.parquet"
    assert featdiff_cli("merge", "-q", out, "-o", merged).exit_code == 3
    assert same(merged, plain)
    assert len(parquets(out)) == 6


def test_another_run_into_the_same_folder_is_refused(
    featdiff_cli: Cli, manifest: Path, tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    from featdiff.detectors import load_detector

    out = tmp_path / "out"
    line = command(manifest, out, tiny_model, "-q", "--shard", "6/6")
    featdiff_cli(*line)
    before = parquets(out)

    other = tmp_path / "other-model"
    detector = load_detector(tiny_model)
    detector.fpr = 0.2
    detector.save_pretrained(other)
    edited = tmp_path / "edited.parquet"
    table = pq.read_table(manifest)
    pq.write_table(table.slice(0, 300), edited)

    refused = [
        (command(manifest, out, other, "-q", "--fpr", "0.05"), "another model"),
        (command(edited, out, tiny_model, "-q"), "another manifest"),
        (command(manifest, out, tiny_model, "-q", "--fpr", "0.1"), "another fpr (0.05, now 0.1)"),
        (command(manifest, out, tiny_model, "-q", "--exclude-known"), "another exclude-known (False, now True)"),
        ((*command(manifest, out, tiny_model, "-q"), "--block", 65), "another images of a block (64, now 65)"),
    ]
    for words, said in refused:
        fails(featdiff_cli(*words), 2, f"{out} was begun with {said}", "give the same as then, or another folder")
    assert parquets(out) == before
    fails(featdiff_cli("merge", out, "--manifest", edited), 2, "is not the manifest that", "--manifest")
    report = tmp_path / "r.html"
    fails(featdiff_cli("merge", out, "--report", report, "-m", other), 2, "is not the model that scored these images")


def test_a_folder_of_something_else_is_refused(
    featdiff_cli: Cli, manifest: Path, tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    line = command(manifest, images, tiny_model, "-q")
    fails(featdiff_cli(*line), 2, "holds other files", "choose another folder")
    fails(featdiff_cli("merge", images), 2, "holds no run")
    (tmp_path / "run.json").write_text("{}")
    fails(featdiff_cli(*command(manifest, tmp_path, tiny_model, "-q")), 2, "run.json is damaged")


def test_the_folder_changes_hands_while_a_block_is_scored(
    featdiff_cli: Cli, manifest: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    read = Run.read

    def other_run_begins(run: Run, number: int) -> object:
        record = json.loads((out / "run.json").read_text())
        record["decided by"]["model"] = "0" * 64
        (out / "run.json").write_text(json.dumps(record))
        return read(run, number)

    monkeypatch.setattr(Run, "read", other_run_begins)
    fails(featdiff_cli(*command(manifest, out, tiny_model, "-q")), 2, "was begun with another model (000000000000, now")
    assert parquets(out) == {}


def test_a_full_disk_is_one_line_and_leaves_whole_blocks(
    featdiff_cli: Cli, manifest: Path, tiny_model: Path, tmp_path: Path, mounted: Callable[[Path, str], Path]
) -> None:
    disk = mounted(tmp_path / "disk", "36k")
    out = disk / "out"
    done = featdiff_cli(*command(manifest, out, tiny_model, "-q"))
    fails(done, 1, f"{out}/", "cannot be written: No space left on device")
    assert 1 <= len(parquets(out)) < 6
    assert all(pq.read_table(file).num_rows == BLOCK for file in out.glob("*.parquet"))
    assert not list(out.glob(".*"))


def test_merge_finds_what_is_wrong(featdiff_cli: Cli, manifest: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merged = tmp_path / "merged.csv"
    for shard in ("1/3", "3/3"):
        featdiff_cli(*command(manifest, out, tiny_model, "-q", "--shard", shard))
    missing = featdiff_cli("merge", out, "-o", merged)
    fails(missing, 1, "2 of 6 blocks (128 rows) are missing", "namely 2, 3:", "with --shard 2/3")
    assert not merged.exists()

    featdiff_cli(*command(manifest, out, tiny_model, "-q", "--shard", "2/3"))
    (out / "notes.txt").write_text("mine")
    assert f"WARNING: {out} holds files of no block, which are left out: notes.txt" in featdiff_cli("merge", out).stderr
    (out / "notes.txt").unlink()

    files = sorted(out.glob("*.parquet"))
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-100])
    fails(featdiff_cli("merge", "-q", out, "-o", merged), 1, files[1].name, "is damaged", "delete it and score")
    files[1].write_bytes(files[0].read_bytes())
    fails(featdiff_cli("merge", "-q", out, "-o", merged), 1, files[1].name, "holds other rows than the manifest")
    assert not merged.exists()
    files[1].write_bytes(content)
    assert featdiff_cli("merge", "-q", out, "-o", merged, "--fail-on-ood").exit_code == 4
    assert len(merged.read_text().splitlines()) == 335


def test_blocks_behind_a_url(featdiff_cli: Cli, manifest: Path, tiny_model: Path, plain: Path, tmp_path: Path) -> None:
    out = "memory://runs/first"
    assert featdiff_cli(*command(manifest, out, tiny_model, "-q")).exit_code == 3
    assert featdiff_cli(*command(manifest, out, tiny_model, "-q")).exit_code == 0  # nothing is left to do
    merged = tmp_path / "merged.parquet"
    assert featdiff_cli("merge", "-q", out, "-o", merged).exit_code == 3
    assert same(merged, plain)
    assert featdiff_cli("merge", "-q", out, "-o", "memory://runs/merged.parquet").exit_code == 3


def test_all_of_it_in_a_store(featdiff_cli: Cli, images: Path, tiny_model: Path, plain: Path, tmp_path: Path) -> None:
    """Images, manifest, blocks and merged rows lie in an S3 store; a killed process is taken over from there."""
    with s3_store() as client:
        for bucket in ("pictures", "work"):
            client.create_bucket(Bucket=bucket)
        for file in images.iterdir():
            client.upload_file(str(file), "pictures", f"day 1/{file.name}")

        manifest, out = "s3://work/m.parquet", "s3://work/scored"
        assert featdiff_cli("manifest", "-q", "s3://pictures/day 1", "-o", manifest).exit_code == 0
        arguments = command(manifest, out, tiny_model, "-q")

        def blocks() -> list[str]:
            listed = client.list_objects_v2(Bucket="work", Prefix="scored/").get("Contents", [])
            return [entry["Key"] for entry in listed if entry["Key"].endswith(".parquet")]

        assert stopped(arguments, lambda: len(blocks()) >= 2, number=signal.SIGKILL)[0] == -signal.SIGKILL
        assert 2 <= len(blocks()) < 6
        assert featdiff_cli(*arguments).exit_code in (0, 3)
        assert len(blocks()) == 6
        assert featdiff_cli(*arguments).exit_code == 0  # nothing is left to do
        assert featdiff_cli("merge", "-q", out, "-o", "s3://work/merged.parquet").exit_code == 3

        client.download_file("work", "merged.parquet", str(tmp_path / "merged.parquet"))
        names = [file.name for file in sorted(images.iterdir())]
        rows, expected = (pq.read_table(file).to_pydict() for file in (tmp_path / "merged.parquet", plain))
        assert rows.pop("path") == [f"s3://pictures/day 1/{name}" for name in names]
        assert [Path(path).name for path in expected.pop("path")] == names
        assert same_rows(rows, expected)

        for name in [entry["Key"] for entry in client.list_objects_v2(Bucket="work")["Contents"]]:
            client.delete_object(Bucket="work", Key=name)
        client.delete_bucket(Bucket="work")
        fails(featdiff_cli("merge", "-q", out), 2, out)
        fails(featdiff_cli(*command(manifest, out, tiny_model)), 1, manifest, "cannot be read")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--sort",), "--sort cannot be given with --manifest"),
        (("--top", "3", "-o", "a.csv"), "--output, --top cannot be given with --manifest"),
        (("--report", "r.html"), "featdiff merge writes the rows of all blocks, and --report"),
        (("photos",), "IMAGES cannot be given with --manifest"),
        (("--shard", "0/3"), ("--shard", "from 1 to N")),
        (("--shard", "4/3"), ("--shard", "from 1 to N")),
        (("--shard", "a"), ("--shard", "must be I/N")),
        (("--actors", "3"), "--actors and --gpus-per-actor belong to --ray"),
        (("--shard", "1/3", "--ray"), "drop --shard"),
        (("--fpr", "0.000001"), "--fpr"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(
    featdiff_cli: Cli,
    manifest: Path,
    tiny_model: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    words: str | tuple[str, ...],
) -> None:
    said = (words,) if isinstance(words, str) else words
    fails(featdiff_cli(*command(manifest, tmp_path / "out", tiny_model, "-q", *more)), 2, *said)
    assert not (tmp_path / "out").exists()


_READS = """
import sys
from pathlib import Path
import pyarrow, pyarrow.parquet
from featdiff import load_detector
from featdiff.data.references import iter_images
from featdiff.serving.cluster import Run
from featdiff.serving.manifest import Manifest
from featdiff.serving.merging import blocks_of

def threads():
    return {task.name for task in Path("/proc/self/task").iterdir() if "jemalloc" not in (task / "comm").read_text()}

folder, model, manifest = sys.argv[1:]
detector = load_detector(model)
detector.score(folder)
before = threads()
pictures = [file.read_bytes() for file in sorted(Path(folder).glob("digit*"))[:9]]
pyarrow.parquet.write_table(pyarrow.table({"image": pictures}), "pictures.parquet")
assert [ref.read() for ref in iter_images("pictures.parquet")] == pictures
run = Run("out", Manifest(manifest), {}, block=200)
run.begin()
for number in run.shard(1, 1):
    run.score(number, detector.iter_scores)
assert sum(table.num_rows for table in blocks_of(run)) == 334
print(len(threads() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_reading_starts_no_thread_of_arrow(images: Path, manifest: Path, tiny_model: Path, tmp_path: Path) -> None:
    """It would let go of Python's memory while Python ends, which aborts one process in twelve."""
    words = [sys.executable, "-c", _READS, images, tiny_model, manifest]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == "0\n"


def test_a_manifest_needs_an_out_and_an_out_a_manifest(featdiff_cli: Cli, manifest: Path, images: Path) -> None:
    fails(featdiff_cli("score", "-q", "--manifest", manifest), 2, "--manifest needs --out DIR")
    fails(featdiff_cli("score", "-q", images, "--out", "out"), 2, "--out: belongs to --manifest FILE")
    fails(featdiff_cli("score", "-q", images, "--ray"), 2, "--ray: belongs to --manifest FILE")
