"""Files that are absent, old or complete, whatever happens."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a stream to `PATH.part`; when the block ends well, it is synced to disk and takes the place of `path`."""
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())
    aside.replace(path)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a small file."""
    with replacing(path) as out:
        out.write(data)
