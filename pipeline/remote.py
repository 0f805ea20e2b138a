"""Objects at s3:// and other addresses: which may be opened, what there is, and their bytes.

fsspec does the talking, with the credentials and endpoints that it finds in the environment
(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, …; FSSPEC_S3_ANON=true for public buckets).
Only the schemes listed here are opened: an address comes from a table that nobody vouches for,
and fsspec would also open the web, other machines, and chains of both.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from unimodal.pipeline.errors import MediaError, UnimodalError, UsageError
from unimodal.pipeline.source import Source

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "abfs", "abfs": "abfs"}
"""Schemes that may be opened, and the one that is written for each."""

PACKAGES = {"s3": "unimodal[s3]", "gs": "gcsfs", "abfs": "adlfs"}

TRIES = 3
"""Of a request that fails for no lasting reason. Each has the client's own tries in it, so that a
server that is gone is given up after half a minute."""
WAIT_S = 0.5  # before the second try; twice as long before the next

AT_ONCE = 16
"""Requests for single objects under way at a time."""

_REMOTE = re.compile(rf"({'|'.join(SCHEMES)})://", re.IGNORECASE)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")

T = TypeVar("T")


def is_remote(uri: str) -> bool:
    """Whether this is an address of an allowed scheme."""
    return _REMOTE.match(uri) is not None


def canonical(uri: str) -> str:
    """The address with its scheme as it is always written: s3a://b/k is s3://b/k."""
    scheme, _, path = uri.partition("://")
    return f"{SCHEMES[scheme.lower()]}://{path.rstrip('/')}"


def refuse_other_schemes(text: str, place: str = "") -> None:
    """Raise `UsageError` if this, which is no file, looks like an address of another scheme.

    `place` ("table.csv, line 7: ") begins the message.
    """
    if (found := _SCHEME.match(text)) and not is_remote(text):
        allowed = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UsageError(
            f"{place}{text}: no such file, and {found[1]}: is not a scheme that is opened. "
            f"Allowed are {allowed}; download it first, or write ./ before a name with a colon"
        )


def look(uri: str) -> tuple[list[Source], list[tuple[str, Source]]]:
    """What an address names: objects, outright or by a glob; or those below a prefix.

    The latter with their paths below it. Both empty where there is nothing. Raises `UsageError`
    with the reason where the store refuses, and `UnimodalError` where it is not reached.
    """
    scheme, store, path = _opened(uri)
    if not path:
        raise UsageError(f"{uri}: name a bucket")
    named: list[dict[str, Any]] = []
    below: list[tuple[str, Source]] = []
    try:
        try:
            info = store.info(path)
        except FileNotFoundError:
            matches = []
            if re.search(r"[*?\[]", path):
                matches = list(store.glob(path, detail=True).values())
                if "/." not in path:  # as a glob on disk, it does not mean hidden names
                    matches = [info for info in matches if "/." not in info["name"]]
            named = [info for info in matches if info["type"] == "file"]
            # A pattern that names folders only means what is in them.
            folders = [] if named else [info["name"] for info in matches]
        else:
            named = [info] if info["type"] == "file" else []
            folders = [] if named else [path]
        for folder in folders:
            for info in store.find(folder, detail=True).values():
                below.append((info["name"].removeprefix(f"{folder}/"), _entry(scheme, info)))
    except FileNotFoundError:
        pass
    except Exception as error:
        wrong = isinstance(error, PermissionError | ValueError)  # or a pattern that is none
        kind = UsageError if wrong or type(error).__name__ in _NO_CREDENTIALS else UnimodalError
        raise kind(f"{uri}: cannot be listed ({_why(error)})") from error
    return [_entry(scheme, info) for info in named], below


def folder(uri: str) -> list[Source]:
    """Objects that lie directly in a folder; nothing if it cannot be listed."""
    scheme, store, path = _opened(uri)
    try:
        infos = store.ls(path, detail=True)
    except Exception:
        return []  # the sources in it are quarantined for the same reason
    return [_entry(scheme, info) for info in infos if info["type"] == "file"]


def stat(uri: str, tick: Callable[[int], None] | None = None) -> Source:
    """What the store says of an object; raises `MediaError` with the reason."""
    scheme, store, path = _opened(uri)
    info = patiently(lambda: store.info(path), tick)
    if info["type"] != "file":
        raise MediaError("a folder, not an object")
    return _entry(scheme, info)


def stat_many(uris: Iterable[str]) -> Iterator[Source | None]:
    """`stat` of each, several at a time; None for one that cannot be had."""

    def one(uri: str) -> Source | None:
        try:
            return stat(uri)
        except MediaError:
            return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(one, uris)


def read(uri: str, start: int, end: int, tick: Callable[[int], None] | None = None) -> bytes:
    """Bytes start <= i < end of an object; raises `MediaError` with the reason."""
    if end <= start:
        return b""
    _, store, path = _opened(uri)
    data = patiently(lambda: store.cat_file(path, start=start, end=end), tick)
    if len(data) != end - start:
        raise MediaError("it is shorter than its store says")
    return data


@contextmanager
def opened(uri: str) -> Iterator[Any]:
    """An object as a seekable file that reads ahead; raises `MediaError` with the reason."""
    _, store, path = _opened(uri)
    with patiently(lambda: store.open(path, "rb", cache_type="readahead")) as file:
        yield file


@cache
def _store(scheme: str) -> AbstractFileSystem:
    try:
        import fsspec

        # No cache of listings: the next run of this process must see what has changed.
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        package = PACKAGES[scheme]
        raise UsageError(f"{scheme}:// needs a package: pip install '{package}'") from error
    except Exception as error:
        raise UnimodalError(f"{scheme}:// cannot be opened ({_why(error)})") from error


def _opened(uri: str) -> tuple[str, AbstractFileSystem, str]:
    scheme, _, path = canonical(uri).partition("://")
    return scheme, _store(scheme), path


def _entry(scheme: str, info: Mapping[str, Any]) -> Source:
    # Every store has its own words for the same two things.
    etag = next((info[key] for key in ("ETag", "etag", "generation") if info.get(key)), None)
    changed = ("LastModified", "last_modified", "mtime", "updated")
    when = next((info[key] for key in changed if info.get(key)), None)
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    mtime_ns = int(when.timestamp() * 1e6) * 1000 if isinstance(when, datetime) else 0
    # The same bytes uploaded again have the same tag: they cost nothing.
    uri = f"{scheme}://{info['name']}"
    if etag:
        return Source(uri, int(info["size"] or 0), 0, etag=str(etag).strip('"'))
    return Source(uri, int(info["size"] or 0), mtime_ns)


def patiently(request: Callable[[], T], tick: Callable[[int], None] | None = None) -> T:
    """The request's answer; tried again if it fails for a reason that may pass.

    `tick` is told, between tries, that work goes on. Raises `MediaError` with the reason.
    """
    for attempt in range(TRIES):
        try:
            return request()
        except (FileNotFoundError, PermissionError) as error:
            raise MediaError(_why(error)) from error
        except Exception as error:
            if attempt == TRIES - 1 or type(error).__name__ in _NO_CREDENTIALS:
                raise MediaError(_why(error)) from error
        if tick is not None:
            tick(0)  # still alive
        time.sleep(WAIT_S * 2**attempt)
    raise AssertionError("not reached")


_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")


def _why(error: Exception) -> str:
    words = (str(error).splitlines() or [""])[0].strip()[:300]
    if isinstance(error, FileNotFoundError):
        return "no such object"
    if isinstance(error, PermissionError):
        return f"access denied: {words}" if words else "access denied"
    if type(error).__name__ in _NO_CREDENTIALS:
        return "no credentials: set AWS_ACCESS_KEY_ID and so on, or FSSPEC_S3_ANON=true"
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
