"""Where a dataset's files are: in a local folder, or at a URL with a cache of files on local disk."""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.errors import DataError, StorageError, is_lasting, storage_error, without_secrets
from data_pipeline.manifest import FILE_NAME, File, Manifest

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds between one try and the next."""
STALLED = 60
"""Seconds without a byte after which a try is abandoned."""
T = TypeVar("T")
_CHUNK = 8 * 2**20
_PART = ".part"
_WAIT = 0.05  # seconds between two looks for free space in the cache
_DENIED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})

_reading: dict[object, tuple[float, str]] = {}  # since when (time.monotonic), and what


def patiently(read: Callable[[], T], where: str, verb: str = "read") -> T:
    """Return what `read` returns; while storage fails in a way that may pass, try again after PAUSES.

    Args:
        read: opens what it reads, so that a stale handle is replaced.
        where: names what is read.
        verb: what cannot be done, for the error.

    Raises:
        StorageError: it still fails after the last pause.
        OSError: it fails in a way that lasts.
    """
    reason, key = "", object()
    for pause in (*PAUSES, 0):
        _reading[key] = (time.monotonic(), where)
        try:
            return read()
        except OSError as error:
            if is_lasting(error):
                raise
            reason = error.strerror or str(error)
        finally:
            del _reading[key]
        time.sleep(pause)
    raise StorageError(f"{where} cannot be {verb} after {len(PAUSES) + 1} tries ({reason}); check the storage")


def hanging_read(seconds: float) -> str:
    """Name what this process has been reading for longest; "" when that is less than `seconds`."""
    now = time.monotonic()
    since, where = min(list(_reading.values()), default=(now, ""))
    return f"reading {where} takes {now - since:.0f} s so far" if where and now - since >= seconds else ""


class CacheConfig(BaseModel):
    """Local disk for files of a remote dataset, shared by all ranks of a machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    folder: Path
    """Where files are kept; best on a local NVMe disk."""
    gigabytes: float = Field(gt=0)
    """The files that are kept take no more than this (10^9 bytes); the least recently used go first."""


class Store:
    """Gives the files of a dataset as local paths: here, of a local folder."""

    remote = False
    """Whether files have to be fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def manifest(self) -> Manifest:
        """Return dataset.json."""
        with suppress(OSError):  # what lasts is an error of the next line
            patiently((self.folder / FILE_NAME).read_bytes, self.where(FILE_NAME))
        return Manifest.read(self.folder)

    def file(self, file: File) -> Path:
        """Return a local path at which the file is complete; DataError when it cannot be had."""
        return self.folder / file.name

    def where(self, name: str) -> str:
        """Name a file for a message."""
        return str(self.folder / name)


class RemoteStore(Store):
    """A folder at a URL that fsspec knows: s3://, gs://, http(s)://, or any other.

    Files are fetched in full, checked against their checksum, and named by it, so that a cached file is never stale. A
    file appears by renaming; one process of a machine fetches it while the others wait for its lock.
    """

    remote = True

    def __init__(self, url: str, cache: CacheConfig) -> None:
        import fsspec  # type: ignore[import-untyped]  # noqa: PLC0415  (only for those who need it)

        super().__init__(cache.folder)
        self.url, self.limit = url.rstrip("/"), int(cache.gigabytes * 1e9)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **_options(self.url))
            if hasattr(self._fs, "retries"):
                self._fs.retries = 1  # s3fs tries five times by itself, silently, each as long as STALLED
        except ImportError as error:
            raise DataError(f"{url} needs another package ({error}); install it") from None
        except ValueError as error:
            raise DataError(f"{url} cannot be opened ({error}); check the URL") from None
        except OSError as error:
            message = f"{url} cannot be opened ({error}); check the URL and the cache's folder"
            raise storage_error(error, message) from None

    def where(self, name: str) -> str:
        """Name a file for a message."""
        return without_secrets(f"{self.url}/{name}")

    def manifest(self) -> Manifest:
        """Fetch dataset.json again: it is small, and decides which version of all other files is used."""
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        folder = self.folder / f"{name}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fetch(FILE_NAME, folder / FILE_NAME, None)
            return Manifest.read(folder)
        except OSError as error:
            raise _cache_error(folder, error) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def file(self, file: File) -> Path:
        """Return the cached file, fetching it if it is not there; DataError after the last try."""
        path = self.folder / f"{file.sha256[:24]}-{Path(file.name).name}"
        recreated = False
        try:
            while not patiently(lambda: self._has(path, file), str(path)):
                if self.folder.exists():
                    continue  # the file was dropped by another process just now
                if recreated:
                    raise StorageError(f"{self.folder} vanished again after it was recreated; name a folder that stays")
                self.folder.mkdir(parents=True, exist_ok=True)
                recreated = True
        except OSError as error:
            raise _cache_error(path, error) from None
        return path

    def _has(self, path: Path, file: File) -> bool:
        """Fetch a file that is not in the cache, and return whether it is still there afterwards."""
        try:
            if not path.exists():
                with _lock(path.with_name(path.name + ".lock")):
                    if not path.exists():  # another process may have fetched it while we waited
                        self._make_room(path, file.bytes)
                        self._fetch(file.name, path, file)
            os.utime(path)  # for the order in which files are dropped
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, path: Path, size: int) -> None:
        """Drop files until one of `size` bytes fits, and reserve them; waits while fetches of others fill the cache."""
        if size > self.limit:
            raise DataError(f"the cache may hold {self.limit} bytes, but a shard has {size}; give it more gigabytes")
        aside = path.with_name(path.name + _PART)
        while True:
            with _lock(self.folder / "room.lock"):
                aside.unlink(missing_ok=True)  # of a process that was killed: we hold its lock now
                if self._drop(self.limit - size):
                    with aside.open("wb") as out:
                        out.truncate(size)
                    return
            time.sleep(_WAIT)

    def _drop(self, limit: int) -> bool:
        """Drop files, the least recently used first, and return whether the rest takes no more than `limit` bytes."""
        files = {path: path.stat() for path in self.folder.glob("*-*") if path.suffix != ".lock"}
        total = sum(stat.st_size for stat in files.values())
        for path, stat in sorted(files.items(), key=lambda item: item[1].st_mtime_ns):
            if total <= limit:
                break
            if path.suffix == _PART and not _free(path.with_suffix(".lock")):
                continue  # it is being fetched
            if path.exists():  # else it has just been completed, and counts
                path.unlink(missing_ok=True)  # a process that has it open reads on
                total -= stat.st_size
        return total <= limit

    def _fetch(self, name: str, path: Path, expected: File | None) -> None:
        """Download a file, trying again after PAUSES; FileNotFoundError when the cache's folder vanished meanwhile."""
        aside, lasting = path.with_name(path.name + _PART), True

        def fetch() -> None:
            nonlocal lasting
            try:
                digest = self._download(name, out)
            except Exception as error:  # noqa: BLE001  (each store has errors of its own)
                status = getattr(error, "status", None)
                if isinstance(error, FileNotFoundError) or status == HTTPStatus.NOT_FOUND:
                    raise DataError(f"{self.where(name)} does not exist; check the URL") from None
                lasting &= status in _DENIED or (isinstance(error, OSError) and is_lasting(error))
                raise OSError(str(error).strip() or type(error).__name__) from None  # each is tried again
            if expected is not None and digest != expected.sha256:
                raise OSError("its content is not what dataset.json says")

        try:
            # Over the bytes that were reserved, so that they stay reserved.
            with aside.open("r+b" if aside.exists() else "wb") as out:
                patiently(fetch, self.where(name), "fetched")
                if not os.fstat(out.fileno()).st_nlink:  # what is there now is another process's
                    raise FileNotFoundError(aside)
                aside.replace(path)
        except StorageError as error:
            raise (DataError if lasting else StorageError)(str(error)) from None
        finally:
            aside.unlink(missing_ok=True)

    def _download(self, name: str, out: BinaryIO) -> str:
        digest = hashlib.sha256()
        with self._fs.open(f"{self._root}/{name}", "rb", block_size=_CHUNK, cache_type="readahead") as remote:
            out.seek(0)
            while chunk := remote.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
            out.truncate()
        return digest.hexdigest()


def _cache_error(path: Path, error: OSError) -> DataError:
    reason = error.strerror or error
    return storage_error(error, f"{path}: {reason}; free space in the cache's folder, or name another")


def _options(url: str) -> dict[str, Any]:
    """Return settings that make a stalled connection an error; trying again is ours."""
    if url.startswith("http"):
        import aiohttp  # noqa: PLC0415

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED, sock_read=STALLED)
        return {"client_kwargs": {"timeout": timeout}}
    if url.startswith("s3"):
        return {
            "config_kwargs": {"connect_timeout": STALLED, "read_timeout": STALLED, "retries": {"total_max_attempts": 1}}
        }
    return {}


def _free(lock: Path) -> bool:
    """Whether a lock is free: then its file was left by a process that was killed."""
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that goes with the process, however it ends."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def open_store(path: Path | str, cache: CacheConfig | None) -> Store:
    """Return the store of a local folder or a URL."""
    if not (isinstance(path, str) and "://" in path):
        return Store(Path(path))
    if cache is None:
        raise DataError(
            f"{path} is remote; say in the recipe where its files are kept: data.cache.folder and .gigabytes"
        )
    return RemoteStore(path, cache)
