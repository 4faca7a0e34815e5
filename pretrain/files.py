"""What the run's files share: JSON that is whole or absent, durability, digests."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomically

__all__ = ["digest", "digest_of_file", "fsync", "write_atomically", "write_json"]  # slurm/ takes them from here


def write_json(path: Path, content: Any) -> None:
    """Replace a file atomically with ``content`` as indented JSON."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def fsync(path: Path) -> None:
    """Make a file's content, or the renames within a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(content: bytes) -> str:
    """BLAKE2 of 16 bytes, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_of_file(path: Path) -> str:
    """``digest`` of a file's content, without holding it in memory."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
