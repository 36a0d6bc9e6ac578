"""A dataset's folder on an object store: s3://, gs://. Whole objects, listings, no locks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import tempfile
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import fs

from noise import storage, stores
from noise.folder import PIECE, RemoteFolder, mapped
from noise.storage import DatasetError


class StoreFolder(RemoteFolder):
    """Errors that pass by themselves are waited out; others are `stores.StoreError`, which names the file and the way out."""

    def __init__(self, address: str):
        super().__init__()
        before, path, self._options = stores.split(address)
        self._before = before
        self._place = path.strip("/")
        self._client, authority = stores.client(before + self._options)
        self._prefix = f"{authority}{self._place}/" if self._place else authority
        self._has_bucket = False

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreFolder, (str(self),)

    def __str__(self) -> str:
        return self._before + self._place + self._options

    def path(self, name: str) -> str:
        return f"{self._before}{self._place}/{name}" if self._place else self._before + name

    def read(self, name: str) -> bytes:
        def fetch() -> bytes:
            parts, size = [], 0
            with self._client.open_input_stream(self._prefix + name) as stream:
                while part := stream.read(PIECE):
                    parts.append(part)
                    if (size := size + len(part)) > storage.LARGEST_FILE:
                        raise DatasetError(f"{self.path(name)} is too large: no file of a dataset but its shards has {storage.LARGEST_FILE:,} bytes")
            return b"".join(parts)

        return stores.patiently(fetch, self.path(name))

    def sizes(self, folder: str) -> dict[str, int]:
        selector = fs.FileSelector((self._prefix + folder).rstrip("/"), allow_not_found=True)
        found = stores.patiently(lambda: self._client.get_file_info(selector), self.path(folder))
        return {info.base_name: info.size for info in found if info.is_file}

    def exists(self, name: str) -> bool:
        """Raises StoreError where there is not even a bucket."""
        if stores.patiently(lambda: self._client.get_file_info(self._prefix + name), self.path(name)).is_file:
            return True
        if not self._has_bucket:
            bucket = self._prefix.split("/")[0]
            found = stores.patiently(lambda: self._client.get_file_info(bucket), self._before)
            if found.type == fs.FileType.NotFound:
                raise self._no_bucket(str(self))
            self._has_bucket = True
        return False

    def put(self, name: str, content: bytes) -> None:
        self._put(name, pa.py_buffer(content))

    def _put(self, name: str, content: pa.Buffer) -> None:
        """In one write: pyarrow completes an upload when its stream is let go, even by an error, so a part must never be all it was given."""

        def upload() -> None:
            with self._client.open_output_stream(self._prefix + name) as stream:
                stream.write(content)

        try:
            stores.patiently(upload, self.path(name))
        except FileNotFoundError:  # as gs:// says it
            raise self._no_bucket(self.path(name)) from None

    def _no_bucket(self, name: str) -> stores.StoreError:
        return stores.StoreError(errno.ENOENT, stores.in_words(OSError("bucket does not exist"), self._before), name)

    def put_new(self, name: str, content: bytes) -> bool:
        if self.exists(name):
            return False
        self.put(name, content)
        return True

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            stores.patiently(lambda: self._client.delete_file(self._prefix + name), self.path(name))

    def draft(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        return tempfile.TemporaryFile()

    def publish(self, draft: BinaryIO, name: str) -> None:
        draft.flush()
        self._put(name, mapped(draft))

    def holds(self, draft: BinaryIO, name: str, sha256: str) -> bool:
        def read_back() -> str:
            digest = hashlib.sha256()
            with self._client.open_input_stream(self._prefix + name) as stream:
                while piece := stream.read(PIECE):
                    digest.update(piece)
            return digest.hexdigest()

        return stores.patiently(read_back, self.path(name)) == sha256

    def download(self, name: str, file: BinaryIO) -> None:
        def copy() -> None:
            file.seek(0)
            with self._client.open_input_stream(self._prefix + name) as stream:
                while piece := stream.read(PIECE):
                    file.write(piece)
            file.truncate()
            file.flush()

        stores.patiently(copy, self.path(name))
