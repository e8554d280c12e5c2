"""Commands on images in an S3 store and on web servers, and rows that go there."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from click.testing import Result
from helpers import FEATDIFF, fails, heed_ctrl_c
from moto.core import DEFAULT_ACCOUNT_ID, set_initial_no_auth_action_count
from moto.s3.models import s3_backends
from stores import FaultyServer, faulty_server, s3_store

from featdiff import Detector
from featdiff.data.labels import list_labelled
from featdiff.data.references import iter_images
from featdiff.files import retries

Cli = Callable[..., Result]


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with s3_store() as client:
        yield client


@pytest.fixture
def bucket(s3: Any, few_images: Path, request: pytest.FixtureRequest) -> str:
    """A bucket of its own with a.png .. f.png below ``few``, and more that is no image."""
    name = f"bucket-{abs(hash(request.node.name)) % 10**8}"
    s3.create_bucket(Bucket=name)
    for file in few_images.iterdir():
        s3.put_object(Bucket=name, Key=f"few/{file.name}", Body=file.read_bytes())
    for key in ("few/notes.txt", "few/.hidden.png", "few/.git/x.png", "fewer.png/x.txt"):
        s3.put_object(Bucket=name, Key=key, Body=b"no image")
    return name


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, few_images: Path) -> Iterator[FaultyServer]:
    monkeypatch.setattr(retries, "_WAIT", 0.2)
    with faulty_server() as server:
        server.files |= {file.name: file.read_bytes() for file in few_images.iterdir()}
        yield server


@pytest.fixture
def expected(tiny_detector: Detector, few_images: Path) -> list[float]:
    return [float(score) for score in tiny_detector.score(few_images).ood_score]


def test_a_prefix_gives_the_rows_of_a_folder(
    featdiff_cli: Cli, tiny_model: Path, bucket: str, expected: list[float]
) -> None:
    result = featdiff_cli("score", f"s3://{bucket}/few", "-m", tiny_model)
    assert result.exit_code == 0, result.output
    rows = rows_of(result.stdout)
    assert [row["path"] for row in rows] == [f"s3://{bucket}/few/{name}.png" for name in "abcdef"]
    assert [float(row["ood_score"]) for row in rows] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pattern", ["few/[ab].png", "**/[ab].png", "f*/[ab].png"])
def test_patterns(featdiff_cli: Cli, tiny_model: Path, bucket: str, pattern: str) -> None:
    rows = rows_of(featdiff_cli("score", f"s3://{bucket}/{pattern}", "-m", tiny_model).stdout)
    assert [row["path"] for row in rows] == [f"s3://{bucket}/few/{name}.png" for name in "ab"]


def test_objects_that_cannot_be_had_are_rows(
    featdiff_cli: Cli, tiny_model: Path, bucket: str, few_images: Path, server: FaultyServer
) -> None:
    good = str(few_images / "a.png")
    remote = [
        f"s3://{bucket}/few/none.png",
        "s3://vanished-bucket/a.png",
        f"{server.url}/fails/9/a.png",
        f"{server.url}/closed/a.png",
        f"{server.url}/cut/9/a.png",
        f"{server.url}/fails/2/b.png?token=1",
    ]
    result = featdiff_cli("score", good, *remote, "-m", tiny_model)
    assert result.exit_code == 3, result.output
    rows = rows_of(result.stdout)
    assert [row["path"] for row in rows] == [good, *remote]
    assert [row["status"] for row in rows] == ["ok", *["unreadable"] * 5, "ok"]
    assert [row["reason"] for row in rows[1:3]] == ["no such object", "no such bucket"]
    assert "503" in rows[3]["reason"]
    assert "access is refused" in rows[4]["reason"]
    assert "cut short" in rows[5]["reason"]


def test_a_silent_server_and_one_without_end(
    featdiff_cli: Cli, tiny_model: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATDIFF_TIMEOUT", "0.3")
    urls = [f"{server.url}/stalls/a.png", f"{server.url}/lies/b.png", f"{server.url}/ok/c.png"]
    result = featdiff_cli("score", *urls, "-m", tiny_model, "--max-bytes", 100_000)
    rows = rows_of(result.stdout)
    assert [row["status"] for row in rows] == ["unreadable", "unreadable", "ok"]
    assert "does not answer in time" in rows[0]["reason"]
    assert "limit of 100,000" in rows[1]["reason"]


def test_large_objects_are_refused_unread(
    featdiff_cli: Cli, tiny_model: Path, bucket: str, server: FaultyServer
) -> None:
    result = featdiff_cli("score", f"s3://{bucket}/few", f"{server.url}/ok/a.png", "-m", tiny_model, "--max-bytes", 9)
    assert {row["status"] for row in rows_of(result.stdout)} == {"unreadable"}
    assert len(rows_of(result.stdout)) == 7


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("s3://vanished-bucket/x", "no such bucket"),
        ("s3://{}/none", "no such object"),
        ("s3://{}/none*.png", "no object matches this pattern"),
        ("s4://x/y", "s4:// is no known scheme"),
        ("gs://x/y", "pip install 'featdiff[gcs]'"),
    ],
)
@pytest.mark.parametrize("command", ["score", "audit"])
def test_nothing_there(featdiff_cli: Cli, tiny_model: Path, bucket: str, source: str, words: str, command: str) -> None:
    arguments = ["-m", tiny_model] if command == "score" else []
    fails(featdiff_cli(command, source.format(bucket), *arguments), 2, words)


def test_wrong_credentials(featdiff_cli: Cli, tiny_model: Path, s3: Any) -> None:
    """The store checks them from now on, and knows of none."""
    s3.create_bucket(Bucket="closed")

    @set_initial_no_auth_action_count(0)
    def run() -> Result:
        return featdiff_cli("score", "s3://closed/a.png", "s3://closed/x", "-m", tiny_model)

    result = run()
    assert result.exit_code == 3, result.output
    rows = rows_of(result.stdout)
    assert [row["path"] for row in rows] == ["s3://closed/a.png", "s3://closed/x"]
    assert all("access is refused: " in row["reason"] for row in rows)


def test_ctrl_c_does_not_wait_for_a_silent_server(tiny_model: Path, server: FaultyServer) -> None:
    urls = [f"{server.url}/stalls/a.png?{i}" for i in range(8)]
    command = [FEATDIFF, "score", *urls, "-m", str(tiny_model), "--workers", "2"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"FEATDIFF_TIMEOUT": "4"},
        preexec_fn=heed_ctrl_c,
    )
    try:
        deadline = time.monotonic() + 60
        while not server.asked["/stalls/a.png"] and time.monotonic() < deadline:
            time.sleep(0.05)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert time.monotonic() - start < 30  # one request of each thread; four tries of all would take a minute


def test_a_name_with_brackets(featdiff_cli: Cli, tiny_model: Path, bucket: str, s3: Any, few_images: Path) -> None:
    s3.put_object(Bucket=bucket, Key="photo[1].png", Body=(few_images / "a.png").read_bytes())
    (row,) = rows_of(featdiff_cli("score", f"s3://{bucket}/photo[1].png", "-m", tiny_model).stdout)
    assert (row["path"], row["status"]) == (f"s3://{bucket}/photo[1].png", "ok")


def test_other_commands(
    featdiff_cli: Cli, tiny_model: Path, s3: Any, sample_folders: dict[str, Path], tmp_path: Path
) -> None:
    s3.create_bucket(Bucket="others")
    files = sorted(sample_folders["test"].iterdir())[:30]
    (tmp_path / "local").mkdir()
    for i, file in enumerate(files):
        shutil.copy(file, tmp_path / "local")
        s3.put_object(Bucket="others", Key=f"set/{'cat' if i % 2 else 'dog'}/{file.name}", Body=file.read_bytes())

    audited = [
        {
            Path(row["path"]).name: row["ood_score"]
            for row in map(json.loads, featdiff_cli("audit", source, "--format", "jsonl").stdout.splitlines())
        }
        for source in ("s3://others/set", tmp_path / "local")
    ]
    assert len(audited[0]) == 30
    assert audited[0] == pytest.approx(audited[1], abs=1e-4)

    result = featdiff_cli("explain", f"s3://others/set/dog/{files[0].name}", "-m", tiny_model, "-o", tmp_path / "why")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "why").glob("*.png"))) == 1

    refs, labels, classes = list_labelled("s3://others/set")
    assert classes == ["cat", "dog"]
    assert len(refs) == 30
    assert labels.tolist() == [0] * 15 + [1] * 15


# ---- archives ----


def test_a_zip_in_a_store_is_read_by_ranges(
    featdiff_cli: Cli,
    tiny_model: Path,
    bucket: str,
    s3: Any,
    server: FaultyServer,
    few_images: Path,
    expected: list[float],
) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("before.bin", os.urandom(20_000_000))
        for file in sorted(few_images.iterdir()):
            archive.write(file, f"train/{file.name}")
        archive.writestr("notes.txt", "no image")
    s3.put_object(Bucket=bucket, Key="data.zip", Body=content.getvalue())
    server.files["data.zip"] = content.getvalue()

    url = f"s3://{bucket}/data.zip"
    for source, label in (
        (f"{url}/train", url),
        (f"zip://train/*.png::{url}", url),
        (f"{server.url}/ok/data.zip", f"{server.url}/ok/data.zip"),
    ):
        result = featdiff_cli("score", source, "-m", tiny_model)
        assert result.exit_code == 0, result.output
        rows = rows_of(result.stdout)
        assert [row["path"] for row in rows] == [f"{label}/train/{name}.png" for name in "abcdef"]
        assert [float(row["ood_score"]) for row in rows] == pytest.approx(expected, rel=1e-5)
    assert server.sent < 4_000_000


# ---- rows go to a store ----


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_are_put_whole(
    featdiff_cli: Cli, tiny_model: Path, bucket: str, s3: Any, few_images: Path, kind: str, expected: list[float]
) -> None:
    url = f"s3://{bucket}/results/rows.{kind}"
    result = featdiff_cli("score", few_images, "-m", tiny_model, "-o", url)
    assert result.exit_code == 0, result.output
    assert url in result.stderr
    content = s3.get_object(Bucket=bucket, Key=f"results/rows.{kind}")["Body"].read()
    if kind == "csv":
        scores = [float(row["ood_score"]) for row in rows_of(content.decode())]
    else:
        scores = pyarrow.parquet.read_table(io.BytesIO(content)).column("ood_score").to_pylist()
    assert scores == pytest.approx(expected, rel=1e-5)
    assert not list((Path(os.environ["FEATDIFF_CACHE"]) / "outputs").rglob("rows.*"))


def test_what_cannot_be_put_is_kept(featdiff_cli: Cli, tiny_model: Path, few_images: Path, s3: Any) -> None:
    result = featdiff_cli("score", few_images, "-m", tiny_model, "-o", "s3://vanished-bucket/rows.csv")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert "no such bucket" in last
    kept = Path(last.partition("all rows are in ")[2].partition(":")[0])
    assert len(rows_of(kept.read_text())) == 6


def test_a_web_server_takes_no_rows(featdiff_cli: Cli, tiny_model: Path, few_images: Path) -> None:
    fails(featdiff_cli("score", few_images, "-m", tiny_model, "-o", "https://host/rows.csv"), 2, "can only be read")


def test_flagged_objects_are_copied(
    featdiff_cli: Cli, tiny_model: Path, bucket: str, tmp_path: Path, few_images: Path
) -> None:
    flagged = tmp_path / "flagged"
    result = featdiff_cli("score", f"s3://{bucket}/few", "-m", tiny_model, "--copy-to", flagged, "--fpr", "0.5")
    assert result.exit_code == 0, result.output
    copied = {file.name: file.read_bytes() for file in flagged.glob("*.png")}
    assert copied
    assert all((few_images / name).read_bytes() == content for name, content in copied.items())
    manifest = rows_of((flagged / "manifest.csv").read_text())
    assert {row["from"] for row in manifest} <= {f"s3://{bucket}/few/{name}.png" for name in "abcdef"}

    result = featdiff_cli("score", f"s3://{bucket}/few", "-m", tiny_model, "--move-to", tmp_path / "m", "--fpr", "0.5")
    assert result.exit_code == 3
    assert "only copied" in result.stderr


# ---- a listing that goes on ----


def test_resume_goes_on_within_a_listing(
    featdiff_cli: Cli, tiny_model: Path, bucket: str, s3: Any, tmp_path: Path, expected: list[float]
) -> None:
    """The listing is taken up behind the rows that are there; a listing that has changed is refused."""
    file = tmp_path / "rows.jsonl"
    command = ["score", f"s3://{bucket}/few", "-m", tiny_model, "-o", file, "--batch-size", 1, "--engine", "torch"]
    code = (
        "import os; from featdiff_cli import rows; from featdiff_cli import main; old = rows.FileRows.write\n"
        "def write(self, part, counts):\n"
        "    old(self, part, counts)\n"
        "    os._exit(9)\n"
        "rows.FileRows.write = write; main()\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    begun = len((tmp_path / "rows.jsonl.partial").read_text().splitlines())
    assert 0 < begun < 6

    result = featdiff_cli(*command, "--resume")
    assert result.exit_code == 0, result.output
    assert f"{begun} rows are there from an interrupted run" in result.stderr
    whole = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["ood_score"] for row in whole] == pytest.approx(expected, rel=1e-5)

    subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True)
    s3.put_object(Bucket=bucket, Key="few/Aa.png", Body=b"new, and first")
    fails(featdiff_cli(*command, "--resume"), 2, "not the first of what is to be scored now")


def test_the_first_row_comes_before_the_listing_ends(tiny_model: Path, s3: Any, few_images: Path) -> None:
    """10,000 objects on ten pages: rows of the first come while most pages were not asked for."""
    s3.create_bucket(Bucket="many")
    content = (few_images / "a.png").read_bytes()
    store = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]  # by requests it would take a minute
    for i in range(10_000):
        store.put_object("many", f"{i:05d}.png", content)

    with requests_seen() as asked:

        def pages() -> int:
            return sum("list-type=2" in line for line in asked)

        detector = Detector.from_pretrained(tiny_model)  # its own: so many images change what runs the backbone
        parts = detector.iter_scores(iter_images("s3://many"))
        first = next(parts)
        assert pages() == 1
        assert first.path[0] == "s3://many/00000.png"
        assert first.status[0] == "ok"
        parts.close()

        asked.clear()
        names = [ref.path for ref in iter_images("s3://many")]
        assert names == [f"s3://many/{i:05d}.png" for i in range(10_000)]
        assert pages() == 10


def test_an_object_is_read_by_one_request(s3: Any, few_images: Path) -> None:
    """A store asks money for each, also for that for the size."""
    s3.create_bucket(Bucket="paid")
    for file in few_images.iterdir():
        s3.upload_file(str(file), "paid", file.name)
    refs = list(iter_images("s3://paid"))

    with requests_seen() as asked:
        assert [ref.read() for ref in refs] == [file.read_bytes() for file in sorted(few_images.iterdir())]
    assert len(asked) == 6
    assert all("GET /paid/" in line for line in asked)


@contextlib.contextmanager
def requests_seen() -> Iterator[list[str]]:
    """Lines of the store's log, as they come."""
    asked: list[str] = []
    watching = logging.Handler()
    watching.emit = lambda record: asked.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("werkzeug")
    log.addHandler(watching)
    try:
        yield asked
    finally:
        log.removeHandler(watching)
