"""Stores that answer on this machine, as the hub and S3 do: as much of their protocols as reading files needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

COMMIT = "0123456789" * 4
DATASET = "someone/data"


class Store(BaseHTTPRequestHandler):
    """Serves `files`, path -> bytes; counts the bytes that were asked for in `sent`."""

    files: dict[str, bytes]
    sent: dict[str, int]

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: bytes, kind: str = "application/json", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def file(self, path: str, **headers: str) -> None:
        if path not in self.files:
            self.answer(b"", status=404, x_error_code="EntryNotFound")
            return
        content, wanted = self.files[path], self.headers.get("range")
        tag = {"etag": f'"{hashlib.md5(content).hexdigest()}"', "last_modified": "Sun, 22 Nov 2026 07:00:00 GMT", "accept_ranges": "bytes"}
        if wanted is not None:
            first, last = wanted.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1]
            headers["content_range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            content = part
        if self.command == "GET":
            self.sent[path] = self.sent.get(path, 0) + len(content)
        self.answer(content, "application/octet-stream", 200 if wanted is None else 206, **tag, **headers)

    def do_HEAD(self) -> None:
        self.do_GET()


class Hub(Store):
    """One dataset repository, at one commit."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, resolve = f"/api/datasets/{DATASET}", f"/datasets/{DATASET}/resolve/"
        if path.startswith(f"{api}/tree/"):
            self.answer(json.dumps(self.tree(path.removeprefix(f"{api}/tree/").partition("/")[2], "recursive=true" in self.path.lower())).encode())
        elif path.startswith(api):
            self.answer(json.dumps({"id": DATASET, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}).encode())
        elif path.startswith(resolve):
            self.file(path.removeprefix(resolve).partition("/")[2], x_repo_commit=COMMIT)
        else:
            self.answer(b"", status=404, x_error_code="RepoNotFound")

    def tree(self, folder: str, recursive: bool) -> list[dict[str, object]]:
        found: dict[str, dict[str, object]] = {}
        for path, content in self.files.items():
            if path.startswith(f"{folder}/") or not folder:
                inside = path[len(folder) + bool(folder) :].split("/")
                for depth in range(1, len(inside)):
                    parent = "/".join([*([folder] if folder else []), *inside[:depth]])
                    found[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
                if recursive or len(inside) == 1:
                    found[path] = {"type": "file", "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
        return list(found.values())


class S3(Store):
    """Buckets, addressed by path."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        if key:
            self.file(f"{bucket}/{key}")
            return
        query = parse_qs(url.query)
        prefix = query.get("prefix", [""])[0]
        names = [name.removeprefix(f"{bucket}/") for name in self.files if name.startswith(f"{bucket}/{prefix}")]
        items = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(self.files[f'{bucket}/{name}'])}</Size>"
            "<LastModified>2026-11-22T07:00:00.000Z</LastModified></Contents>"
            for name in sorted(names)
        )
        listing = (
            f"<ListBucketResult><Name>{bucket}</Name><KeyCount>{len(names)}</KeyCount><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
        )
        self.answer(f'<?xml version="1.0" encoding="UTF-8"?>{listing}'.encode(), "application/xml")


@contextmanager
def serving(kind: type[Store], files: dict[str, bytes]) -> Iterator[tuple[str, dict[str, int]]]:
    """(host:port, bytes sent by path) of a running store."""
    handler = type("Handler", (kind,), {"files": files, "sent": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", handler.sent  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
