"""A Hugging Face Hub on this machine: repositories of datasets, their tree, uploads by git LFS, commits, downloads; tokens are asked for."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_nobodysecret"


@dataclass
class Hub:
    """The hub, as tests look at it."""

    address: str
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS content by sha256."""
    commits: list[list[str]] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    broken: str = ""
    """Uploads of content that holds these bytes' hash fail."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def answer(self, status: int, content: bytes | dict[str, Any] | list[Any] = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_one(self) -> None:
        content, path = self.body(), unquote(urlsplit(self.path).path)
        words = path.strip("/").split("/")
        if words[0] == "lfs" and self.command == "PUT":  # a signed address: no token
            return self.upload(words[1], content)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        if words == ["api", "repos", "create"]:
            asked = json.loads(content)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            exists = name in self.hub.repos
            self.hub.repos.setdefault(name, {})
            return self.answer(409 if exists else 200, {"url": f"{self.hub.address}/datasets/{name}", "id": name})
        if words == ["api", "validate-yaml"]:
            return self.answer(200, {"warnings": [], "errors": []})
        if words == ["api", "whoami-v2"]:
            return self.answer(200, {"name": "me"})
        repo = "/".join(words[2:4] if words[0] == "api" else words[1:3]).removesuffix(".git")
        if repo not in self.hub.repos:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        rest = words[4:] if words[0] == "api" else words[3:]
        if rest[:1] in (["tree"], ["resolve"], ["revision"]) and rest[1] not in ("main", self.sha(repo)):
            return self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        return getattr(self, f"do_{rest[0]}" if rest else "do_repo")(repo, rest[1:], content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def do_repo(self, repo: str, rest: list[str], content: bytes) -> None:
        names = [{"rfilename": name} for name in self.hub.repos[repo]]
        self.answer(200, {"id": repo, "sha": self.sha(repo), "private": False, "tags": [], "downloads": 0, "siblings": names})

    def do_revision(self, repo: str, rest: list[str], content: bytes) -> None:
        return self.do_repo(repo, rest, content)

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.hub.repos[repo].items())).encode()).hexdigest()

    def do_tree(self, repo: str, rest: list[str], content: bytes) -> None:
        under = "/".join(rest[1:])
        files = {name: data for name, data in self.hub.repos[repo].items() if not under or name.startswith(under + "/")}
        if under and not files:
            return self.answer(404, {"error": f"{under} does not exist"}, X_Error_Code="EntryNotFound")
        found: dict[str, dict[str, Any]] = {}
        for name, data in files.items():
            first, _, deeper = name.removeprefix(f"{under}/" if under else "").partition("/")
            place = f"{under}/{first}" if under else first
            oid = hashlib.sha1(data).hexdigest()
            whole = "recursive=true" in self.path.lower()
            if deeper and not whole:
                found[place] = {"type": "directory", "path": place, "oid": oid, "size": 0}
            else:
                found[name] = {"type": "file", "path": name, "oid": oid, "size": len(data)}
        return self.answer(200, list(found.values()))

    def do_preupload(self, repo: str, rest: list[str], content: bytes) -> None:
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".arrow") else "regular", "shouldIgnore": False}
            for file in json.loads(content)["files"]
        ]
        self.answer(200, {"files": modes})

    def do_info(self, repo: str, rest: list[str], content: bytes) -> None:
        assert rest == ["lfs", "objects", "batch"]
        objects = []
        for asked in json.loads(content)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.address}/lfs/{asked['oid']}"}}}
            objects.append(asked | ({} if asked["oid"] in self.hub.objects else upload))
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str, content: bytes) -> None:
        if oid == self.hub.broken:
            return self.answer(403, b"no")
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self.hub.uploads.append(oid)
        return self.answer(200)

    def do_commit(self, repo: str, rest: list[str], content: bytes) -> None:
        lines = [json.loads(line) for line in content.splitlines()]
        names = []
        for value in (line["value"] for line in lines if line["key"] in ("file", "lfsFile")):
            data = self.hub.objects[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
            self.hub.repos[repo][value["path"]] = data
            names.append(value["path"])
        self.hub.commits.append(names)
        self.answer(200, {"success": True, "commitOid": self.sha(repo), "commitUrl": f"{self.hub.address}/datasets/{repo}/commit/{self.sha(repo)}"})

    def do_resolve(self, repo: str, rest: list[str], content: bytes) -> None:
        name = "/".join(rest[1:])
        if name not in self.hub.repos[repo]:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=self.sha(repo))
        data = self.hub.repos[repo][name]
        return self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=self.sha(repo))


@contextmanager
def serving() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {}))
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub that this process' client talks to, by plain HTTP."""
    from huggingface_hub import constants

    with serving() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made
