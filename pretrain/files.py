"""File helpers for run folders: atomic JSON, JSON lines, durability, locks, digests."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data_pipeline.files import replacing, write_atomically

# slurm/ imports them from here
__all__ = [
    "digest", "digest_of_file", "fsync", "json_lines", "json_object", "lock", "replacing", "write_atomically",
    "write_json",
]  # fmt: skip


def write_json(path: Path, content: Any) -> None:
    """Replace a file atomically with ``content`` as indented JSON."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def json_object(line: bytes) -> dict[str, Any] | None:
    """One line of a file of JSON objects; None where it is not one, such as a line that a crash cut."""
    try:
        row = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def json_lines(path: Path, offset: int = 0) -> Iterator[dict[str, Any] | None]:
    """Read a file of JSON objects line by line, from a byte offset: ``json_object`` of each line."""
    with path.open("rb") as handle:
        handle.seek(offset)
        yield from map(json_object, handle)


def fsync(path: Path) -> None:
    """Make a file's content, or the renames within a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path) -> IO[str] | None:
    """Lock a file for as long as the result is open; it is made where there is none.

    Returns:
        None where another one has locked it. A lock goes with its process, however that ends.
    """
    handle = path.open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


def digest(content: bytes) -> str:
    """BLAKE2 of 16 bytes, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_of_file(path: Path) -> str:
    """``digest`` of a file's content, without holding it in memory."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
