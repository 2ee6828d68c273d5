"""A Hub in miniature on 127.0.0.1, with faults to order.

It has enough of the Hub's HTTP interface to download and upload.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

COMMIT = "0" * 39 + "1"
LARGE = (".safetensors", ".gguf", ".bin", ".model")


class Hub:
    """What the server serves, what was uploaded to it, and how it misbehaves.

    status        answer every request with this status (401, 403, 404, 429, 503 …)
    code          send this as X-Error-Code along with `status`
    only          answer so only requests whose path contains this
    wrong_bytes   serve this file with its first byte flipped, under its true checksum
    cut_after     break the connection after so many bytes of a body, the first `cuts` times
    ranges        whether a part of a file can be asked for; else all of it comes
    padding       bytes that come behind every file of weights, unknown to its listing
    slow          seconds to wait between two pieces of 64 kB
    listed        what a search goes through: models as the Hub tells of them
    hangs         set: a search waits until this is cleared
    """

    def __init__(self, folder: Path, repo: str) -> None:
        self.folder, self.repo = folder, repo
        self.status, self.code, self.only = 200, "", ""
        self.wrong_bytes = ""
        self.cut_after, self.cuts = 0, 0
        self.slow = 0.0
        self.ranges, self.padding = True, 0
        self.sent = 0  # bytes of bodies
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range
        self.uploaded: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}  # large files, by checksum
        self.url = ""
        self.listed: list[dict[str, Any]] = []
        self.hangs = threading.Event()


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entry(hub: Hub, path: Path, tree: bool) -> dict[str, Any]:
    """A file as the repository's listing shows it, or as its tree does."""
    name, size, digest = str(path.relative_to(hub.folder)), path.stat().st_size, checksum(path)
    large = path.suffix in LARGE
    if tree:
        found: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": digest[:40]}
        return found | ({"lfs": {"oid": digest, "size": size, "pointerSize": 134}} if large else {})
    found = {"rfilename": name, "size": size, "blobId": digest[:40]}
    return found | ({"lfs": {"sha256": digest, "size": size, "pointerSize": 134}} if large else {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_POST(self) -> None:
        self.receive()

    def do_PUT(self) -> None:
        self.receive()

    def refused(self, body: bool = True) -> bool:
        hub = self.hub
        hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
        if hub.status == 200 or hub.only not in self.path:
            return False
        headers = {"X-Error-Code": hub.code} if hub.code else {}
        self.reply(hub.status, b'{"error": "ordered"}', headers, body)
        return True

    def answer(self, body: bool) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        if self.refused(body):
            return
        if path == "/api/whoami-v2":
            is_known = self.headers.get("Authorization") == "Bearer hf_right"
            user = {"type": "user", "name": "someone", "orgs": [{"name": "some-org"}], "auth": {}}
            self.reply(200 if is_known else 401, json.dumps(user if is_known else {}).encode(), {}, body)
        elif path == "/api/models":
            self.search(body)
        elif path.startswith(f"/api/models/{hub.repo}"):
            self.info(path, body)
        elif path.startswith(f"/{hub.repo}/resolve/"):
            self.file(hub.folder / path.split("/resolve/")[1].split("/", 1)[1], body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def search(self, body: bool) -> None:
        hub, asked = self.hub, parse_qs(self.path.partition("?")[2])
        while hub.hangs.is_set():
            time.sleep(0.01)
        (text,), tags = asked["search"], asked.get("filter", [])
        found = [m for m in hub.listed if text.lower() in m["id"].lower() and set(tags) <= set(m["tags"])]
        self.reply(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body)

    def info(self, path: str, body: bool) -> None:
        hub = self.hub
        if path.endswith("/revision/missing"):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            return
        is_tree = "/tree/" in path
        files = [entry(hub, p, is_tree) for p in sorted(hub.folder.rglob("*")) if p.is_file()]
        about = {"id": hub.repo, "modelId": hub.repo, "sha": COMMIT, "siblings": files, "tags": [], "private": False}
        self.reply(200, json.dumps(files if is_tree else about).encode(), {}, body)

    def file(self, path: Path, body: bool) -> None:
        hub = self.hub
        if not path.is_file():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        data, digest = path.read_bytes(), checksum(path)
        if path.name == hub.wrong_bytes:
            data = bytes([data[0] ^ 1]) + data[1:]
        first, _, last = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        if not hub.ranges:
            start, stop = 0, len(data)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if path.suffix in LARGE:  # these live elsewhere; their ETag is their SHA-256
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        is_part = start > 0 or stop < len(data)
        if is_part:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.reply(
            206 if is_part else 200, data[start:stop], headers, body, hub.padding if path.suffix in LARGE else 0
        )

    def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool = True, padding: int = 0) -> None:
        hub = self.hub
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) + padding))
        self.end_headers()
        if not body:
            return
        if hub.cuts and len(data) > hub.cut_after:
            hub.cuts -= 1
            self.wfile.write(data[: hub.cut_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        for start in range(0, len(data), 1 << 16):
            self.wfile.write(data[start : start + (1 << 16)])
            if hub.slow:
                self.wfile.flush()
                time.sleep(hub.slow)
        with suppress(OSError):  # who has had enough leaves
            for _ in range(0, padding, 1 << 20):
                self.wfile.write(bytes(1 << 20))
                hub.sent += 1 << 20

    # --- uploads ----------------------------------------------------------------------------------

    def receive(self) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refused():
            return
        if path.startswith("/objects/"):
            hub.objects[path.rpartition("/")[2]] = data
            self.reply(200, b"", {})
            return
        if path.endswith("/commit/main"):
            self.commit(data)
            return
        given = json.loads(data)
        answer: Any = {}
        if path == "/api/repos/create":
            hub.created.append(given)
            answer = {"url": f"{hub.url}/{given.get('organization', 'someone')}/{given['name']}"}
        elif "/preupload/" in path:
            modes = ((f["path"], "lfs" if f["path"].endswith(LARGE) else "regular") for f in given["files"])
            answer = {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]}
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{hub.url}/objects/{o['oid']}"}}} for o in given["objects"]
            ]
            answer = {"transfer": "basic", "objects": objects}
        self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def commit(self, data: bytes) -> None:
        hub = self.hub
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.uploaded[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.uploaded[value["path"]] = hub.objects[value["oid"]]
        url = f"{hub.url}/{self.path.split('/')[3]}/{self.path.split('/')[4]}/commit/{COMMIT}"
        self.reply(200, json.dumps({"success": True, "commitOid": COMMIT, "commitUrl": url}).encode(), {})


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves is no fault."""


@contextmanager
def serve(folder: Path, repo: str) -> Iterator[Hub]:
    """Serve a folder as a repository for as long as the block lasts."""
    hub = Hub(folder, repo)
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The variables of a process that asks this server, with caches of its own."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "M7MLX_CACHE": str(tmp_path / "m7"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
    }
    return os.environ | settings
