"""Commands on images in Azure and Google storage: on emulators of theirs on loopback, where these are installed.

``npm install -g azurite`` and ``pip install adlfs``; ``pip install gcsfs gcp-storage-emulator``.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import os
import re
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from helpers import fails

from featdiff import Detector
from featdiff.data.references import list_images, ref_of
from featdiff.files.remote import exists, list_names, read_bytes, remove, write_whole

Cli = Callable[..., Result]
# The account that azurite comes with, as its page has it.
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextlib.contextmanager
def azure(folder: Path) -> Iterator[None]:
    """A store of Microsoft's own emulator, as a process of its own."""
    if shutil.which("azurite-blob") is None or importlib.util.find_spec("adlfs") is None:
        pytest.skip("needs azurite on the PATH, and adlfs")
    # it is a program of node's: in a process of its own, so that nothing of it stays
    command = [
        "azurite-blob",
        "--blobPort",
        "0",
        "--inMemoryPersistence",
        "--skipApiVersionCheck",
        "--disableTelemetry",
    ]
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=folder)
    try:
        until = time.monotonic() + 120
        while not (found := re.findall(r"successfully listens on (http://\S+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AZURE_STORAGE_CONNECTION_STRING", _connection(found[0], _KEY))
            yield
    finally:
        process.kill()
        process.wait()


def _connection(url: str, key: str) -> str:
    parts = f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={key}"
    return f"{parts};BlobEndpoint={url}/{_ACCOUNT};"


@contextlib.contextmanager
def google(folder: Path) -> Iterator[None]:
    """A store of gcp-storage-emulator, in a thread."""
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server").create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_port}")
            patch.setenv("FSSPEC_GS_TOKEN", "anon")
            # newer versions of gcsfs ask for the kind of a bucket first, which the emulator does not know
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            yield
    finally:
        server.stop()


STORES: dict[str, tuple[Any, str]] = {"az": (azure, "abfs"), "gs": (google, "gs")}


@pytest.fixture(scope="module", params=STORES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``az://photos`` or ``gs://photos``, empty."""
    begin, protocol = STORES[request.param]
    with begin(tmp_path_factory.mktemp("store")):
        client = fsspec.get_filesystem_class(protocol)
        client.clear_instance_cache()
        try:
            fsspec.filesystem(protocol).mkdir("photos")
            yield f"{request.param}://photos"
        finally:
            client.clear_instance_cache()


@pytest.fixture
def prefix(store: str, few_images: Path, request: pytest.FixtureRequest) -> str:
    """A prefix of its own with a.png .. e.png, below/f.png, all of them in all.zip, and a note."""
    place = f"{store}/{request.node.originalname}"
    (few_images / "below").mkdir()
    (few_images / "f.png").rename(few_images / "below" / "f.png")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        for file in few_images.rglob("*.png"):
            name = file.relative_to(few_images).as_posix()
            opened.write(file, name)
            write_whole(f"{place}/{name}", file.read_bytes())
    write_whole(f"{place}/all.zip", archive.getvalue())
    write_whole(f"{place}/notes.txt", b"no image")
    return place


NAMES = ["a.png", "b.png", "below/f.png", "c.png", "d.png", "e.png"]


def test_what_is_there(prefix: str, few_images: Path) -> None:
    refs = list_images(prefix)
    assert [ref.path for ref in refs] == [f"{prefix}/{name}" for name in NAMES]
    assert [ref.read() for ref in refs] == [(few_images / name).read_bytes() for name in NAMES]
    assert [ref.bytes_to_read() for ref in refs] == [(few_images / name).stat().st_size for name in NAMES]
    assert [ref_of(ref.path, ref.bytes_to_read()) for ref in refs] == refs
    assert [ref.path for ref in list_images(f"{prefix}/b*/*.png")] == [f"{prefix}/below/f.png"]
    (member,) = list_images(f"{prefix}/all.zip/below")
    assert member.read() == (few_images / "below" / "f.png").read_bytes()


def test_objects_are_written_replaced_and_removed(store: str) -> None:
    url = f"{store}/written/a.txt"
    for content in (b"one", b"another"):
        write_whole(url, content)
        assert read_bytes(url) == content
    assert exists(url)
    assert list_names(f"{store}/written") == {"a.txt"}
    remove(url)
    remove(url)
    assert not exists(url)
    assert list_names(f"{store}/written") == set()


def test_commands(featdiff_cli: Cli, tiny_model: Path, tiny_detector: Detector, prefix: str, few_images: Path) -> None:
    expected = pytest.approx([float(score) for score in tiny_detector.score(few_images).ood_score], rel=1e-4)
    done = featdiff_cli("score", prefix, "-m", tiny_model)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["path"] for row in rows] == [f"{prefix}/{name}" for name in NAMES]
    assert [float(row["ood_score"]) for row in rows] == expected

    assert featdiff_cli("score", prefix, "-q", "-m", tiny_model, "-o", f"{prefix}/out/a.parquet").exit_code == 0
    assert pq.read_table(io.BytesIO(read_bytes(f"{prefix}/out/a.parquet")))["ood_score"].to_pylist() == expected

    images, manifest, blocks = (f"{prefix}/{name}" for name in ("below", "out/m.parquet", "out/blocks"))
    assert featdiff_cli("manifest", "-q", images, f"{prefix}/a.png", "-o", manifest).exit_code == 0
    part = ("score", "-q", "--manifest", manifest, "--out", blocks, "--block", 1, "-m", tiny_model)
    for shard in ("1/2", "2/2"):
        assert featdiff_cli(*part, "--shard", shard).exit_code == 0
    assert featdiff_cli("merge", "-q", blocks, "-o", f"{prefix}/out/merged.jsonl").exit_code == 0
    assert read_bytes(f"{prefix}/out/merged.jsonl").count(b"\n") == 2


def test_what_is_not_there(featdiff_cli: Cli, tiny_model: Path, store: str) -> None:
    gone = store.replace("photos", "vanished")
    for url in (f"{store}/none", f"{gone}/none"):
        fails(featdiff_cli("score", url, "-m", tiny_model), 2, url, "no such")
    done = featdiff_cli("score", f"{store}/none.png", "-m", tiny_model)
    assert done.exit_code == 3
    assert "no such object" in done.stdout


def test_a_wrong_key(featdiff_cli: Cli, tiny_model: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not store.startswith("az:"):
        pytest.skip("this emulator takes any key")
    url = re.findall(r"BlobEndpoint=(http://[\d.:]+)/", os.environ["AZURE_STORAGE_CONNECTION_STRING"])
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", _connection(url[0], "c2VjcmV0"))
    client = fsspec.get_filesystem_class("abfs")
    client.clear_instance_cache()
    try:
        fails(featdiff_cli("score", f"{store}/none/", "-m", tiny_model), 2, "access is refused")
    finally:
        client.clear_instance_cache()
