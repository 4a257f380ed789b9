"""A hub on this machine: the endpoints of huggingface.co that its client asks when a repository is fetched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves each folder `root/org/name` as a repository with one commit, which `main` and `v1` name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.cut: set[str] = set()
        """Files of which half is sent."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append(path)
        parts = path.strip("/").split("/")
        parts = parts[1:] if parts[0] == "datasets" else parts
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if not (self.root / name).is_dir():
            return self.refuse(handler, 404, "RepoNotFound")
        if name in self.gated and "resolve" in parts:
            return self.refuse(handler, 403, "GatedRepo")
        revision = parts[5] if parts[0] == "api" and len(parts) > 5 else parts[3] if len(parts) > 3 else "main"
        if parts[0] == "api" and len(parts) == 4:
            revision = "main"
        if revision not in ("main", "v1", COMMIT):
            return self.refuse(handler, 404, "RevisionNotFound")
        if parts[0] == "api":
            return self.send_json(handler, self.listing(name, tree="tree" in parts), body)
        self.send_file(handler, self.root / name / "/".join(parts[4:]), body)

    def listing(self, name: str, tree: bool) -> Any:
        files = sorted(path for path in (self.root / name).rglob("*") if path.is_file())
        names = [path.relative_to(self.root / name).as_posix() for path in files]
        if tree:
            sizes = [path.stat().st_size for path in files]
            return [
                {"type": "file", "path": n, "size": size, "oid": hashlib.sha1(n.encode()).hexdigest()}
                for n, size in zip(names, sizes, strict=True)
            ]
        return {"id": name, "sha": COMMIT, "private": False, "siblings": [{"rfilename": n} for n in names], "tags": []}

    def refuse(self, handler: BaseHTTPRequestHandler, status: int, code: str) -> None:
        handler.send_response(status)
        handler.send_header("X-Error-Code", code)
        handler.send_header("X-Error-Message", code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def send_json(self, handler: BaseHTTPRequestHandler, value: Any, body: bool) -> None:
        data = json.dumps(value).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if body:
            handler.wfile.write(data)

    def send_file(self, handler: BaseHTTPRequestHandler, path: Path, body: bool) -> None:
        if not path.is_file():
            return self.refuse(handler, 404, "EntryNotFound")
        data = path.read_bytes()
        handler.send_response(200)
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if body:
            handler.wfile.write(data[: len(data) // 2] if path.name in self.cut else data)
            handler.close_connection = path.name in self.cut


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """A running hub for the folders below `root`."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        thread.join()
        hub.server.server_close()
