"""s3:// and gs:// -> pyarrow's clients: how an address is read, which errors pass by themselves, and what the others mean.

    s3://bucket/folder?endpoint_override=host:9000&scheme=http&region=x      options come last, and never hold credentials
    gs://bucket/folder?anonymous=true                                        what everybody may read

Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS)
or from the machine's role, on every machine that reads or writes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from noise.secrets import redacted, refuse_secrets
from noise.storage import DatasetError

T = TypeVar("T")
URI = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?]*)/?(.*)", re.DOTALL)


def _switch(value: str) -> bool:
    if value.lower() not in ("1", "true", "0", "false"):
        raise ValueError("true or false")
    return value.lower() in ("1", "true")


def _seconds(value: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(value) < 1e9:
            return float(value)
    raise ValueError("seconds")


S3: dict[str, Callable[[str], Any]] = {
    "region": str,
    "endpoint_override": str,
    "scheme": str,
    "anonymous": _switch,
    "force_virtual_addressing": _switch,
    "request_timeout": _seconds,
    "connect_timeout": _seconds,
}
"""Options of s3://, with what reads each; timeouts in seconds."""
GS: dict[str, Callable[[str], Any]] = {
    "endpoint_override": str,
    "scheme": str,
    "anonymous": _switch,
    "project_id": str,
    "retry_limit_seconds": _seconds,
}
"""Options of gs://; the limit is that of the client's own tries, in seconds."""
OPTIONS = {"s3": S3, "gs": GS, "gcs": GS}
S3_TIMEOUTS = {"request_timeout": 60.0, "connect_timeout": 10.0}
GS_RETRY_SECONDS = 5.0
ATTEMPTS = 6
"""Of one operation, each of which pyarrow's client has tried several times itself: about half a minute of waiting in all."""
TRANSIENT = re.compile(
    r"HTTP status (?:5\d\d|429|408)|SLOW_DOWN|UNAVAILABLE|INTERNAL_FAILURE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|THROTTLING|REQUEST_TIMEOUT|"
    r"NETWORK_CONNECTION|curlCode|timed? ?out|connection reset",
    re.IGNORECASE,
)
REFUSED = re.compile(r"HTTP status 40[13]|ACCESS_DENIED|ACCESS_KEY_ID|SIGNATURE|TOKEN|CREDENTIAL|UNAUTHENTICATED|PERMISSION_DENIED", re.IGNORECASE)
NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|bucket does not exist|Bucket .{0,300} not found", re.IGNORECASE)
AWS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role that may do it,"
GOOGLE = "GOOGLE_APPLICATION_CREDENTIALS, or a service account that may do it (anonymous=true for what everybody may read),"


class StoreError(OSError):
    """A store did not do what it was asked, and asking again will not help by itself. `filename` is the address."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def split(location: str) -> tuple[str, str, str]:
    """(what comes before the path, the path, the options after it): s3://bucket/ + folder/name + ?region=x, or a local path alone."""
    match = URI.fullmatch(location)
    if match is None:
        return "", location, ""
    scheme, authority, path = match.groups()
    path, mark, options = path.rpartition("?") if re.search(r"\?[^/?*]+=", path) else (path, "", "")
    return f"{scheme}://{authority}/", path, mark + options


@functools.cache
def client(address: str) -> tuple[Any, str]:
    """(pyarrow filesystem, what its paths begin with) of `scheme://bucket/?options`. Raises DatasetError for an address that cannot be used."""
    scheme, bucket, options = URI.fullmatch(address).groups()  # type: ignore[union-attr]
    refuse_secrets(f"a {scheme}:// address", address)
    if ":" in bucket:
        raise DatasetError(f"{scheme}://{bucket}: a bucket's name has no colon; credentials come from the environment")
    values: dict[str, Any] = {}
    for name, value in parse_qsl(options.removeprefix("?"), keep_blank_values=True):
        if name not in OPTIONS[scheme]:
            raise DatasetError(
                f"{scheme}://{bucket}: there is no option {name!r}, only {', '.join(OPTIONS[scheme])}; credentials come from the environment"
            )
        try:
            values[name] = OPTIONS[scheme][name](value)
        except ValueError as expected:
            raise DatasetError(f"{scheme}://{bucket}: {name} is {value!r}, expected {expected}") from None
    try:
        return _filesystem(scheme, bucket, values), f"{bucket}/"
    except (ValueError, ImportError) as error:  # a value that the client refuses, or a pyarrow without that client
        raise DatasetError(redacted(f"{scheme}://{bucket}: {error}")) from None


def _filesystem(scheme: str, bucket: str, values: dict[str, Any]) -> Any:
    """pyarrow's, with those options."""
    from pyarrow import fs

    if scheme != "s3":
        limit = timedelta(seconds=values.pop("retry_limit_seconds", GS_RETRY_SECONDS))
        return fs.GcsFileSystem(**values, retry_time_limit=limit)
    if not {"region", "endpoint_override"} & set(values) and not {"AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"} & set(os.environ):
        values["region"] = patiently(lambda: fs.resolve_s3_region(bucket), f"s3://{bucket}")
    # delayed open: a file that fits one part is one PUT, where three requests would make it a multipart upload
    return fs.S3FileSystem(**S3_TIMEOUTS | values, allow_delayed_open=True)


def patiently(action: Callable[[], T], name: str) -> T:
    """What the action returns; errors that pass by themselves are waited out, a bounded number of times.

    Raises FileNotFoundError, or StoreError that names `name` and the way out.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            if attempt == ATTEMPTS - 1 or not TRANSIENT.search(str(error)):
                raise StoreError(error.errno, in_words(error, name, attempt + 1), name) from None
        pause(attempt)
    raise AssertionError


def pause(attempt: int) -> None:
    """Wait 0.5 to 1 s, and twice as long after every attempt, up to 30 s."""
    time.sleep(random.uniform(0.5, 1.0) * min(30.0, 2.0**attempt))


def in_words(error: OSError, name: str, attempts: int = 1) -> str:
    """What went wrong and the way out."""
    reason = redacted(str(error).strip())
    if NO_BUCKET.search(reason):
        return f"there is no such bucket; create it, or name another ({reason})"
    if REFUSED.search(reason):
        return f"the store refuses it; set {AWS if name.startswith('s3:') else GOOGLE} where this runs ({reason})"
    return f"the store failed{f' {attempts} times' if attempts > 1 else ''}: {reason}"
