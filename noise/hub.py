"""A dataset's folder on the Hugging Face Hub: hf://datasets/OWNER/NAME, with @REVISION after the name where one is meant.

Read like any other folder. What is put waits, and becomes one commit with the manifest, or with each 256 files on the way to it,
since the hub allows few commits an hour; content that is there already is not sent again. So a dataset is pushed here, whole or
not at all to be seen, and never made here. Endpoint and token are the client's own (HF_ENDPOINT, HF_TOKEN, `hf auth login`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from noise.folder import RemoteFolder
from noise.storage import DatasetError, read_small

ADDRESS = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/?")
A_COMMIT = 256
"""Files in one commit."""


class HubFolder(RemoteFolder):
    """Errors of the client are DatasetError in words, FileNotFoundError for what is not there."""

    def __init__(self, address: str):
        super().__init__()
        found = ADDRESS.fullmatch(address)
        if found is None:
            raise DatasetError(f"{address}: a dataset on the hub is named hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME@REVISION")
        try:
            from huggingface_hub import HfApi
        except ImportError:
            raise DatasetError(f"{address} needs huggingface_hub; pip install huggingface_hub") from None
        self._address, self._repo, self._revision = address.rstrip("/"), found["repo"], found["revision"]
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        self._waiting: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._begun = False

    def __reduce__(self) -> tuple[Any, ...]:
        return HubFolder, (self._address,)

    def __str__(self) -> str:
        return self._address

    def path(self, name: str) -> str:
        return f"{self._address}/{name}"

    @property
    def _where(self) -> dict[str, Any]:
        return {"repo_id": self._repo, "repo_type": "dataset", "revision": self._revision}

    @contextlib.contextmanager
    def _in_words(self, name: str) -> Iterator[None]:
        """FileNotFoundError for what is not there, DatasetError for a hub that refuses or cannot be reached."""
        from huggingface_hub import errors

        try:
            yield
        except errors.LocalEntryNotFoundError as error:
            raise DatasetError(f"{self.path(name)}: the hub cannot be reached ({error.__cause__ or error}); run again once it can") from None
        except errors.EntryNotFoundError:
            raise FileNotFoundError(f"{self.path(name)} does not exist") from None
        except errors.RepositoryNotFoundError:
            raise DatasetError(f"{self._address} does not exist, or is private and needs a token: set HF_TOKEN, or `hf auth login`") from None
        except errors.RevisionNotFoundError:
            raise DatasetError(f"{self._address}: there is no revision {self._revision}") from None
        except errors.HfHubHTTPError as error:
            raise DatasetError(f"{self.path(name)}: the hub says {error}; run again once that is settled") from None
        except RuntimeError as error:
            if not isinstance(error.__cause__, errors.HfHubHTTPError):
                raise
            raise DatasetError(f"{self.path(name)}: the hub says {error.__cause__}; run again once that is settled") from None
        except Exception as error:
            if not type(error).__module__.startswith(("httpx", "httpcore")):  # whichever of them the client uses
                raise
            raise DatasetError(f"{self.path(name)}: the hub cannot be reached ({error}); run again once it can") from None

    def _local(self, name: str, folder: str) -> Path:
        with self._in_words(name):
            return Path(self._api.hf_hub_download(**self._where, filename=name, local_dir=folder))

    def read(self, name: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return read_small(self._local(name, folder))

    def sizes(self, folder: str) -> dict[str, int]:
        from huggingface_hub import RepoFile, errors

        absent: list[type[Exception]] = [errors.EntryNotFoundError, *([errors.RepositoryNotFoundError] if self._begun else [])]
        with self._in_words(folder), contextlib.suppress(*absent):
            found = self._api.list_repo_tree(**self._where, path_in_repo=folder or None)
            return {Path(item.path).name: item.size for item in found if isinstance(item, RepoFile)}
        return {}

    def exists(self, name: str) -> bool:
        """Raises DatasetError where there is no such repository, unless one is about to be."""
        with self._in_words(name):
            if self._api.file_exists(**self._where, filename=name):
                return True
            if not self._begun:
                self._api.repo_info(self._repo, repo_type="dataset", revision=self._revision)
        return False

    def begin(self, private: bool, dry_run: bool) -> None:
        self._begun = True
        if not dry_run:
            with self._in_words(""):
                self._api.create_repo(self._repo, repo_type="dataset", private=private, exist_ok=True)

    def put(self, name: str, content: bytes) -> None:
        from huggingface_hub import CommitOperationAdd

        with self._lock:
            self._waiting[name] = CommitOperationAdd(name, content)
        if name == "manifest.json" or len(self._waiting) >= A_COMMIT:
            self._commit()

    def put_new(self, name: str, content: bytes) -> bool:
        raise DatasetError(f"{self._address}: a dataset is not made on the hub; make it in a folder or on a store, and `push` it")

    def _commit(self) -> None:
        with self._lock:
            operations = list(self._waiting.values())
            with self._in_words(""):
                self._api.create_commit(**self._where, operations=operations, commit_message=f"{len(operations)} files")
            self._waiting.clear()

    def remove(self, name: str) -> None:
        with self._in_words(name), contextlib.suppress(FileNotFoundError):
            self._api.delete_file(name, **self._where)

    def draft(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        return tempfile.NamedTemporaryFile()  # type: ignore[return-value]

    def publish(self, draft: BinaryIO, name: str) -> None:
        """Sends the content now; the name appears with the commit."""
        from huggingface_hub import CommitOperationAdd

        draft.flush()
        addition = CommitOperationAdd(name, draft.name)
        with self._in_words(name):
            self._api.preupload_lfs_files(self._repo, [addition], repo_type="dataset", revision=self._revision, num_threads=1)
        with self._lock:
            self._waiting[name] = addition
        if len(self._waiting) >= A_COMMIT:
            self._commit()

    def holds(self, draft: BinaryIO, name: str, sha256: str) -> bool:
        raise DatasetError(f"{self._address}: a dataset is not made on the hub; make it in a folder or on a store, and `push` it")

    def download(self, name: str, file: BinaryIO) -> None:
        with tempfile.TemporaryDirectory() as folder, self._local(name, folder).open("rb") as source:
            file.seek(0)
            shutil.copyfileobj(source, file)
            file.truncate()
            file.flush()
