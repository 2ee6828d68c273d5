"""A Hub in miniature on 127.0.0.1: enough of its HTTP interface for snapshot_download, with faults to order."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0" * 39 + "1"


class Hub:
    """What the server serves, and how it misbehaves.

    status        answer every request with this status (401, 403, 404, 429, 503 …), `code` as X-Error-Code
    wrong_bytes   serve this file with its first byte flipped, under its true checksum
    cut_after     break the connection after so many bytes of a body, the first `cuts` times
    """

    def __init__(self, folder: Path, repo: str) -> None:
        self.folder, self.repo = folder, repo
        self.status = 200
        self.code = ""
        self.wrong_bytes = ""
        self.cut_after, self.cuts = 0, 0
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range
        self.url = ""


def tree_entry(path: Path) -> dict[str, Any]:
    checksum, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    entry: dict[str, Any] = {"type": "file", "path": path.name, "size": size, "oid": checksum[:40]}
    if path.suffix == ".safetensors":
        entry["lfs"] = {"oid": checksum, "size": size, "pointerSize": 134}
    return entry


@contextmanager
def serve(folder: Path, repo: str) -> Iterator[Hub]:
    hub = Hub(folder, repo)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
            path = self.path.split("?")[0]
            if hub.status != 200:
                self.reply(hub.status, b'{"error": "ordered"}', {"X-Error-Code": hub.code} if hub.code else {}, body)
            elif path.startswith("/api/models/"):
                self.info(path, body)
            elif path.startswith(f"/{hub.repo}/resolve/"):
                self.file(hub.folder / path.split("/resolve/")[1].split("/", 1)[1], body)
            else:
                self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

        def info(self, path: str, body: bool) -> None:
            if not path.startswith(f"/api/models/{hub.repo}"):
                self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
                return
            if path.endswith("/revision/missing"):
                self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                return
            if "/tree/" in path:
                self.reply(200, json.dumps([tree_entry(p) for p in sorted(hub.folder.iterdir())]).encode(), {}, body)
                return
            names = [{"rfilename": p.name} for p in sorted(hub.folder.iterdir())]
            info = {
                "id": hub.repo,
                "modelId": hub.repo,
                "sha": COMMIT,
                "siblings": names,
                "tags": [],
                "private": False,
            }
            self.reply(200, json.dumps(info).encode(), {}, body)

        def file(self, path: Path, body: bool) -> None:
            if not path.is_file():
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                return
            data = path.read_bytes()
            checksum = hashlib.sha256(data).hexdigest()
            if path.name == hub.wrong_bytes:
                data = bytes([data[0] ^ 1]) + data[1:]
            start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{checksum}"', "Accept-Ranges": "bytes"}
            if path.suffix == ".safetensors":  # large files live elsewhere; their ETag is their SHA-256
                headers |= {"X-Linked-Etag": f'"{checksum}"', "X-Linked-Size": str(len(data))}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.reply(206 if start else 200, data[start:], headers, body)

        def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
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
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
