"""A Google Cloud Storage of the tests' own: gcp-storage-emulator's real server on loopback, spoken to by pyarrow's real client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
from gcp_storage_emulator.server import create_server


@dataclass(frozen=True)
class Store:
    """A running server with one empty bucket, `bucket`."""

    port: int

    def uri(self, path: str, bucket: str = "bucket") -> str:
        return f"gs://{bucket}/{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http&anonymous=true&retry_limit_seconds=5"

    def api(self, path: str, body: object = None) -> bytes:
        content = None if body is None else json.dumps(body).encode()
        with urlopen(Request(f"http://127.0.0.1:{self.port}/storage/v1/{path}", content, {"Content-Type": "application/json"})) as answer:
            found: bytes = answer.read()
        return found

    def under(self, folder: str) -> dict[str, bytes]:
        """Objects by name, as the server gives them."""
        listed = json.loads(self.api(f"b/bucket/o?prefix={quote(folder + '/')}")).get("items", [])
        return {one["name"].removeprefix(folder + "/"): self.api(f"b/bucket/o/{quote(one['name'], safe='')}?alt=media") for one in listed}


@pytest.fixture
def gs_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Retries do not wait."""
    from noise import stores

    monkeypatch.setattr(stores, "pause", lambda attempt: None)
    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    try:
        store = Store(server._api._httpd.server_address[1])
        store.api("b?project=tests", {"name": "bucket"})
        yield store
    finally:
        server.stop()
        stores.client.cache_clear()
