"""A hub on loopback that the real client of ``huggingface_hub`` is pointed at: what it needs to push and to load.

Repositories are kept in memory: commits of files, branches, and who may see them. Large files go the way of Git LFS.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITER = "hf_writersecretwriter"
READER = "hf_readersecretreader"


@dataclass
class Repository:
    """Files of each commit, and the commit of each branch."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        facts = [(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(content.items())]
        sha = hashlib.sha1(repr((len(self.commits), facts)).encode()).hexdigest()
        self.commits[sha] = content
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The state of the server, and a record of the requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, token
        self.url = ""

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to take this for the hub."""
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return {**kept, **variables}


@contextlib.contextmanager
def serving_hub() -> Iterator[Hub]:
    """A hub on a free port of loopback, which ends with the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    # ---- what is asked for ----

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        path = unquote(urlsplit(self.path).path)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.requests.append((self.command, path, self.token))
        if self.token not in ("", WRITER, READER) and not path.startswith("/lfs/"):
            self._refuse(401, "Invalid credentials in Authorization header")
            return

        for pattern, action in (
            (r"/lfs/(\w+)", self._upload),
            (r"/api/validate-yaml", self._validate),
            (r"/api/repos/create", self._create),
            (r"/api/(?:models|datasets)/([\w.-]+/[\w.-]+)/preupload/(.+)", self._preupload),
            (r"/api/(?:models|datasets)/([\w.-]+/[\w.-]+)/commit/(.+)", self._commit),
            (r"/api/(?:models|datasets)/([\w.-]+/[\w.-]+)/branch/(.+)", self._branch),
            (r"/api/(?:models|datasets)/([\w.-]+/[\w.-]+)/tree/([^/]+)/?(.*)", self._tree),
            (r"/api/(?:models|datasets)/([\w.-]+/[\w.-]+)/paths-info/([^/]+)", self._paths),
            (r"/api/(?:models|datasets)/([\w.-]+/[\w.-]+)/revision/(.+)", self._info),
            (r"/api/(?:models|datasets)/([\w.-]+/[\w.-]+)", self._info),
            (r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/(?:datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            if match := re.fullmatch(pattern, path):
                action(body, *match.groups())
                return
        self._refuse(404, f"no such address {path}")

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    # ---- how it is answered ----

    def _json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message, "X-Request-Id": "Root=1-fake"}
        self._send(status, json.dumps({"error": message}).encode(), headers | ({"X-Error-Code": code} if code else {}))

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _seen(self, name: str) -> Repository | None:
        """A repository that this token may see; else the answer is given."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.token not in (WRITER, READER)):
            self._refuse(404 if self.token else 401, "Repository not found", "RepoNotFound")
            return None
        return repository

    def _may_write(self) -> bool:
        if self.token != WRITER:
            self._refuse(403 if self.token else 401, "You don't have the rights to do this")
        return self.token == WRITER

    # ---- repositories ----

    def _create(self, body: bytes) -> None:
        if not self._may_write():
            return
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return
        repository = Repository(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.hub.repositories[name] = repository
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self._seen(name)
        if repository is None or not self._may_write():
            return
        if branch in repository.branches:
            self._refuse(409, "Reference already exists")
            return
        repository.branches[branch] = repository.branches["main"]
        self._json({}, 201)

    def _info(self, body: bytes, name: str, revision: str = "main") -> None:
        repository = self._seen(name)
        if repository is None:
            return
        sha = repository.resolve(revision)
        if sha is None:
            self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        siblings = [{"rfilename": file} for file in repository.commits[sha]]
        self._json({"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings})

    def _tree(self, body: bytes, name: str, revision: str, folder: str = "") -> None:
        entries = self._entries(name, revision)
        if entries is None:
            return
        inside = [entry for path, entry in entries.items() if path.startswith(f"{folder}/" if folder else "")]
        if folder and not inside:
            self._refuse(404, f"{folder} does not exist", "EntryNotFound")
            return
        if "recursive=true" not in self.path.lower():
            depth = folder.count("/") + bool(folder)
            inside = [entry for entry in inside if str(entry["path"]).count("/") == depth]
        self._json(inside)

    def _paths(self, body: bytes, name: str, revision: str) -> None:
        entries = self._entries(name, revision)
        if entries is not None:
            wanted = (
                parse_qs(body.decode()).get("paths", []) if not body.startswith(b"{") else json.loads(body)["paths"]
            )
            self._json([entries[path] for path in wanted if path in entries])

    def _entries(self, name: str, revision: str) -> dict[str, dict[str, Any]] | None:
        """Files and folders of a revision by path; None if the answer is given."""
        repository = self._seen(name)
        if repository is None:
            return None
        sha = repository.resolve(revision)
        if sha is None:
            self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        files = repository.commits[sha]
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        entries = {path: {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)}
        return entries | {path: _entry(path, data) for path, data in files.items()}

    def _file(self, body: bytes, name: str, revision: str, file: str) -> None:
        repository = self._seen(name)
        if repository is None:
            return
        sha = repository.resolve(revision)
        files = repository.commits.get(str(sha), {})
        if file not in files:
            self._refuse(404, "Entry not found", "EntryNotFound")
            return
        data = files[file]
        headers = {"ETag": f'"{_entry(file, data)["oid"]}"', "X-Repo-Commit": str(sha), "Accept-Ranges": "none"}
        if _is_large(file):
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        first = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if first and self.command == "GET":
            begin, end = int(first[1]), int(first[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {begin}-{min(end, len(data)) - 1}/{len(data)}"
            self._send(206, data[begin:end], headers)
        else:
            self._send(200, data, headers)

    # ---- commits ----

    def _validate(self, body: bytes) -> None:
        """The header of a card is YAML, as the hub wants it."""
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, flags=re.S)
        errors = [] if match and isinstance(yaml.safe_load(match[1]), dict) else [{"message": "no header"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        if self._seen(name) is None or not self._may_write():
            return
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": f, "uploadMode": "lfs" if _is_large(f) else "regular", "shouldIgnore": False} for f in files]
        self._json({"files": modes})

    def _batch(self, body: bytes, name: str) -> None:
        if not self._may_write():
            return
        objects: list[dict[str, Any]] = []
        for item in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}
            actions = {} if item["oid"] in self.hub.objects else {"actions": {"upload": upload}}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._refuse(400, "other bytes than were announced")
            return
        self.hub.objects[oid] = body
        self._json({})

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self._seen(name)
        if repository is None or not self._may_write():
            return
        if revision not in repository.branches:
            self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        files: dict[str, bytes] = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = repository.commit(revision, files)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})


def _is_large(file: str) -> bool:
    return file.endswith(".safetensors")


def _entry(file: str, data: bytes) -> dict[str, Any]:
    """A file as the hub lists it."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": file, "size": len(data), "oid": oid}
    if _is_large(file):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
