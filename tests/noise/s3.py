"""An S3 store on this machine that can be told to misbehave: buckets, objects, listings in pages, uploads in parts, signed requests."""

from __future__ import annotations

import hashlib
import io
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

KEY, SECRET = "someone", "something"
PAGE = 5
"""Keys in one page of a listing: small, so that every listing has pages."""


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose key (and query) match."""

    kind: str
    """a status (503), "reset": the connection is cut in the middle of the request, "stall": no answer until the client gives up"""
    method: str
    pattern: str
    times: int = 1
    met: int = 0
    meeting: threading.Event = field(default_factory=threading.Event)
    """Set at the first of them."""


@dataclass
class Bucket:
    """The store, as tests look at it."""

    address: str
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    """Parts of uploads that were neither completed nor aborted."""
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def uri(self, path: str, bucket: str = "bucket") -> str:
        return f"s3://{bucket}/{path}?endpoint_override={self.address}&scheme=http&region=us-east-1&request_timeout=1"

    def under(self, prefix: str) -> dict[str, bytes]:
        """Objects in a folder, without its name; markers of folders left out."""
        found = {name.removeprefix(f"{prefix}/"): content for name, content in self.objects.items() if name.startswith(f"{prefix}/")}
        return {name: content for name, content in found.items() if name and not name.endswith("/")}

    def fail(self, kind: str | int, method: str, pattern: str = "", times: int = 1) -> Fault:
        self.faults.append(Fault(str(kind), method, pattern, times))
        return self.faults[-1]

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.met < fault.times and fault.method == method and re.search(fault.pattern, path):
                    fault.met += 1
                    fault.meeting.set()
                    return fault
        return None


def chunks(file: Any) -> Iterator[bytes]:
    """Each is its size in hexadecimal, a line's end, its bytes, a line's end; then one of size 0, and lines that say more of the whole."""
    while size := int(file.readline().partition(b";")[0], 16):
        yield file.read(size)
        file.readline()
    while file.readline().strip():
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int = 200, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def xml(self, text: str) -> None:
        self.answer(200, f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode(), content_type="application/xml")

    def refuse(self, status: int, code: str) -> None:
        content = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'.encode()
        self.answer(status, content, content_type="application/xml")

    def body(self) -> bytes:
        chunked = self.headers.get("transfer-encoding") == "chunked"
        content = b"".join(chunks(self.rfile)) if chunked else self.rfile.read(int(self.headers.get("content-length") or 0))
        if "aws-chunked" in self.headers.get("content-encoding", ""):
            content = b"".join(chunks(io.BytesIO(content)))
        return content

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        name, _, key = unquote(url.path).lstrip("/").partition("/")
        query = parse_qs(url.query, keep_blank_values=True)
        fault = self.bucket.fault(self.command, unquote(url.path) + "?" + url.query)
        if fault is not None and fault.kind == "reset":
            self.rfile.read(min(1000, int(self.headers.get("x-amz-decoded-content-length") or self.headers.get("content-length") or 0) // 2))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True
            self.connection.close()
            return
        body = self.body()
        if fault is not None and fault.kind == "stall":
            while self.connection.recv(1 << 16):
                pass
            self.close_connection = True
        elif fault is not None:
            self.refuse(int(fault.kind), {"503": "SlowDown", "500": "InternalError"}.get(fault.kind, "AccessDenied"))
        elif f"Credential={KEY}/" not in self.headers.get("authorization", ""):
            self.refuse(403, "InvalidAccessKeyId" if "authorization" in self.headers else "AccessDenied")
        elif name != "bucket":
            self.refuse(404, "NoSuchBucket")
        elif not key:
            self.answer() if self.command == "HEAD" else self.list(query)
        else:
            getattr(self, f"{self.command.lower()}_object")(key, query, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

    def list(self, query: dict[str, list[str]]) -> None:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        entries: dict[str, int | None] = {}
        for key, content in sorted(self.bucket.objects.items()):
            if key.startswith(prefix):
                rest = key[len(prefix) :]
                common = bool(delimiter) and delimiter in rest
                entries[prefix + rest.split(delimiter)[0] + delimiter if common else key] = None if common else len(content)
        left = [entry for entry in entries.items() if entry[0] > after]
        limit = min(PAGE, int(query.get("max-keys", [PAGE])[0]))
        page = left[:limit]
        items = "".join(
            f"<CommonPrefixes><Prefix>{escape(key)}</Prefix></CommonPrefixes>"
            if size is None
            else f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><LastModified>2026-11-22T07:00:00.000Z</LastModified></Contents>"
            for key, size in page
        )
        more = f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>" if len(left) > limit else ""
        truncated = str(bool(more)).lower()
        counts = f"<Name>bucket</Name><KeyCount>{len(page)}</KeyCount><IsTruncated>{truncated}</IsTruncated>{more}"
        self.xml(f"<ListBucketResult>{counts}{items}</ListBucketResult>")

    def get_object(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        content = self.bucket.objects.get(key)
        if content is None:
            self.refuse(404, "NoSuchKey")
            return
        about = {"etag": f'"{hashlib.md5(content).hexdigest()}"', "last_modified": "Sun, 22 Nov 2026 07:00:00 GMT", "accept_ranges": "bytes"}
        wanted = self.headers.get("range")
        if wanted is None:
            self.answer(200, content, **about)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1]
        self.answer(206, part, content_range=f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}", **about)

    head_object = get_object

    def put_object(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        if "uploadId" in query:
            self.bucket.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
        else:
            self.bucket.objects[key] = body
        self.answer(200, etag=f'"{hashlib.md5(body).hexdigest()}"')

    def post_object(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        if "uploads" in query:
            upload = os.urandom(8).hex()
            self.bucket.uploads[upload] = {}
            self.xml(
                f"<InitiateMultipartUploadResult><Bucket>bucket</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            )
            return
        parts = self.bucket.uploads.pop(query["uploadId"][0])
        named = [int(number) for number in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body)]
        self.bucket.objects[key] = b"".join(parts[number] for number in named)
        self.xml(f"<CompleteMultipartUploadResult><Bucket>bucket</Bucket><Key>{escape(key)}</Key><ETag>x</ETag></CompleteMultipartUploadResult>")

    def delete_object(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        if "uploadId" in query:
            self.bucket.uploads.pop(query["uploadId"][0], None)
        else:
            self.bucket.objects.pop(key, None)
        self.answer(204)


@contextmanager
def serving() -> Iterator[Bucket]:
    """A running store with one empty bucket."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    bucket = Bucket(f"127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("OfBucket", (Handler,), {"bucket": bucket})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A store whose credentials are in the environment, and retries that do not wait."""
    from noise import stores

    for name, value in {"ACCESS_KEY_ID": KEY, "SECRET_ACCESS_KEY": SECRET, "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(stores, "pause", lambda attempt: None)
    with serving() as made:
        yield made
    stores.client.cache_clear()
