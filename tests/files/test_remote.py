"""Files by URL: a real S3 store and a web server that fails, stalls and truncates."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stores import FaultyServer, environment, faulty_server, s3_store

from featdiff.exceptions import UnreadableImage, UsageError
from featdiff.files import retries
from featdiff.files.remote import (
    exists,
    is_url,
    list_names,
    open_input,
    put_file,
    read_bytes,
    remove,
    write_whole,
)

CONTENT = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with s3_store() as client:
        client.create_bucket(Bucket="photos")
        yield client


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(retries, "_WAIT", 0.2)  # what it waits is tested by itself
    with faulty_server() as server:
        server.files["a.bin"] = CONTENT
        yield server


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s3://photos/a.jpg", True),
        ("https://host/a.jpg?x=1", True),
        ("zip://*.jpg::s3://photos/a.zip", True),
        ("simplecache::https://host/a.jpg", True),
        ("file:///tmp/a", True),
        ("C:/a.jpg", False),
        ("C:\\a.jpg", False),
        ("folder/a.jpg", False),
        ("a::b.jpg", False),
        ("/s3://a", False),
        ("", False),
    ],
)
def test_what_is_a_url(name: str, expected: bool) -> None:
    assert is_url(name) is expected


# ---- stores ----


@pytest.mark.parametrize("root", ["s3://photos/x", "memory://x", "file://{}"])
def test_a_store_gives_back_what_was_written(s3: Any, tmp_path: Path, root: str) -> None:
    root = root.format(tmp_path / "new")
    url = f"{root}/deep/a.bin"
    assert not exists(url)
    assert list_names(f"{root}/deep") == set()

    write_whole(url, b"older")
    write_whole(url, CONTENT)
    write_whole(f"{root}/deep/er/b.bin", b"b")
    assert read_bytes(url) == CONTENT
    assert exists(url)
    assert list_names(f"{root}/deep") == list_names(f"{root}/deep/") == {"a.bin"}

    with open_input(url) as stream:
        assert stream.seek(-6, 2) == len(CONTENT) - 6
        assert stream.read() == CONTENT[-6:]
        stream.seek(300)
        assert stream.read(5) == CONTENT[300:305]

    remove(url)
    assert not exists(url)
    remove(url)  # gone is gone


def test_an_empty_object(s3: Any) -> None:
    write_whole("s3://photos/empty", b"")
    assert read_bytes("s3://photos/empty", 10) == b""
    with open_input("s3://photos/empty") as stream:
        assert stream.read() == b""


def test_a_local_path_is_opened_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"here")
    with open_input(tmp_path / "a") as stream:
        assert stream.read() == b"here"


def test_a_file_is_put_whole(s3: Any, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    put_file(tmp_path / "a", "s3://photos/put/a")
    put_file(tmp_path / "a", f"file://{tmp_path}/b/a")
    assert read_bytes("s3://photos/put/a") == CONTENT == (tmp_path / "b" / "a").read_bytes()


def test_more_than_the_limit_is_refused(s3: Any) -> None:
    write_whole("s3://photos/large", CONTENT)
    with pytest.raises(UnreadableImage, match="limit of 100"):
        read_bytes("s3://photos/large", 100)


# ---- what cannot be had ----


def test_missing_objects_are_not_tried_again(s3: Any) -> None:
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as found:
        read_bytes("s3://photos/none")
    assert (found.value.strerror, found.value.filename) == ("no such object", "s3://photos/none")
    with pytest.raises(FileNotFoundError) as found:
        read_bytes("s3://vanished/none")
    assert found.value.strerror == "no such bucket"
    assert time.monotonic() - start < 2


def test_without_credentials_it_says_what_to_set(s3: Any, tmp_path: Path) -> None:
    with environment(HOME=str(tmp_path), AWS_EC2_METADATA_DISABLED="true", AWS_REGION="eu-central-1"):
        import os

        import fsspec

        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del os.environ[name]
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        try:
            with pytest.raises(PermissionError) as refused:
                read_bytes("s3://photos/a")
        finally:
            fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert refused.value.strerror is not None
    assert "AWS_ACCESS_KEY_ID" in refused.value.strerror


@pytest.mark.parametrize(
    ("url", "words"),
    [("s4://a/b", "s4:// is no known scheme"), ("gs://a/b", "pip install 'featdiff[gcs]'")],
)
def test_unknown_schemes_and_missing_clients(url: str, words: str) -> None:
    if url.startswith("gs") and importlib.util.find_spec("gcsfs"):
        pytest.skip("its client is installed here")
    for action in (read_bytes, exists, list_names, open_input, lambda name: write_whole(name, b"")):
        with pytest.raises(UsageError) as refused:
            action(url)
        assert words in str(refused.value)


def test_a_web_server_cannot_be_written_to(server: FaultyServer) -> None:
    with pytest.raises(UsageError, match="can only be read"):
        write_whole(f"{server.url}/ok/new.bin", b"")


# ---- a server with faults ----


def test_it_works_at_the_third_try(server: FaultyServer) -> None:
    assert read_bytes(f"{server.url}/fails/2/a.bin") == CONTENT
    assert server.asked["/fails/2/a.bin"] == 3


def test_after_four_tries_it_says_what_the_server_says(server: FaultyServer) -> None:
    with pytest.raises(OSError, match=r"503 .*\(4 tries\)"):
        read_bytes(f"{server.url}/fails/9/a.bin")
    assert server.asked["/fails/9/a.bin"] == retries.TRIES == 4


@pytest.mark.parametrize(("kind", "error"), [("none", FileNotFoundError), ("closed", PermissionError)])
def test_final_answers_are_not_tried_again(server: FaultyServer, kind: str, error: type[OSError]) -> None:
    with pytest.raises(error):
        read_bytes(f"{server.url}/{kind}/a.bin")
    assert server.asked[f"/{kind}/a.bin"] == 1


def test_a_cut_answer_is_asked_for_again(server: FaultyServer) -> None:
    assert read_bytes(f"{server.url}/cut/1/a.bin") == CONTENT
    with pytest.raises(OSError, match=r"cut short \(4 tries\)"):
        read_bytes(f"{server.url}/cut/9/a.bin")


def test_a_silent_server_is_not_waited_for(server: FaultyServer) -> None:
    start = time.monotonic()
    with environment(FEATDIFF_TIMEOUT="0.3"), pytest.raises(TimeoutError, match="does not answer in time"):
        read_bytes(f"{server.url}/stalls/a.bin")
    assert time.monotonic() - start < 10


def test_an_answer_without_end_is_cut_off(server: FaultyServer) -> None:
    with pytest.raises(UnreadableImage, match="limit of 100,000"):
        read_bytes(f"{server.url}/lies/a.bin", 100_000)
    assert server.asked["/lies/a.bin"] == 1


def test_nobody_listens() -> None:
    with pytest.raises(OSError, match=r"\(4 tries\)"):
        read_bytes("http://127.0.0.1:9/a.bin")


def test_parts_of_a_file_are_read_by_ranges(server: FaultyServer) -> None:
    server.files["large.bin"] = CONTENT * 1000  # 10 MB
    with open_input(f"{server.url}/fails/1/large.bin") as stream:
        stream.seek(5_000_000)
        assert stream.read(10) == (CONTENT * 1000)[5_000_000:5_000_010]
    assert server.sent < 3_000_000


def test_a_server_without_ranges_says_what_to_type(server: FaultyServer) -> None:
    with open_input(f"{server.url}/whole/a.bin") as stream:
        stream.seek(5)
        with pytest.raises(UsageError, match="simplecache::http"):
            stream.read(10)
    with open_input(f"simplecache::{server.url}/whole/a.bin") as stream:
        stream.seek(5)
        assert stream.read(10) == CONTENT[5:15]


def test_waits_grow_and_vary_and_heed_the_server() -> None:
    class Busy(Exception):
        headers = {"Retry-After": "3"}

    first = {retries._pause(OSError(), 1) for _ in range(20)}
    third = {retries._pause(OSError(), 3) for _ in range(200)}
    assert len(first) == 20
    assert max(first) <= 0.5
    assert 1.0 < max(third) <= 2.0
    assert retries._pause(Busy(), 1) == 3
