"""The bytes of a shard and of its index.

A shard is a USTAR archive in which each sample is two members, KEY.cls (the label, fixed-width ASCII) and KEY.jpg. The
index beside it is the one that DALI's `wds2idx` would write: `v1.2 COUNT`, then per sample `ext offset size name ...`.
"""

import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
CLS_WIDTH = 5
_END = tarfile.RECORDSIZE  # an archive is filled up to a multiple of this, as GNU tar does
_PERMISSIONS = 0o644


@dataclass(frozen=True)
class Written:
    """Where a picture was put."""

    offset: int
    """First byte of the JPEG in the shard."""
    index: str
    """The sample's line in the index."""


def sample_bytes(length: int) -> int:
    """Return how many bytes of a shard a sample takes whose JPEG has `length` bytes."""
    return 3 * BLOCK + -(-length // BLOCK) * BLOCK


def _member(name: str, data: bytes) -> Iterator[bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), _PERMISSIONS  # mtime, uid and gid stay 0: the same input gives the same bytes
    yield info.tobuf(tarfile.USTAR_FORMAT)
    yield data
    yield bytes(-len(data) % BLOCK)


def write_shard(out: BinaryIO, samples: Iterable[tuple[str, int, bytes]]) -> list[Written]:
    """Write samples (key, label, JPEG) to an open file and say where each one is."""
    written = []
    position = 0
    for key, label, jpeg in samples:
        cls = b"%0*d" % (CLS_WIDTH, label)
        picture = position + 3 * BLOCK
        for part in (*_member(f"{key}.cls", cls), *_member(f"{key}.jpg", jpeg)):
            position += out.write(part)
        line = f"cls {picture - 2 * BLOCK} {len(cls)} {key}.cls jpg {picture} {len(jpeg)} {key}.jpg"
        written.append(Written(picture, line))
    out.write(bytes(2 * BLOCK))
    out.write(bytes(-(position + 2 * BLOCK) % _END))
    return written


def index_text(lines: Iterable[str]) -> str:
    """Return the text of a shard's index from its samples' lines."""
    rows = list(lines)
    return "\n".join([f"v1.2 {len(rows)}", *rows, ""])


def member_name(shard: BinaryIO, offset: int) -> str:
    """Return the name of the member whose data begin at `offset`, or '' when there is no header before it."""
    header = _header(shard, offset)
    return "" if header is None else header.name


def member_size(shard: BinaryIO, offset: int) -> int | None:
    """Return the bytes of the member whose data begin at `offset`, or None when there is no header before it."""
    header = _header(shard, offset)
    return None if header is None else header.size


def _header(shard: BinaryIO, offset: int) -> tarfile.TarInfo | None:
    if offset < BLOCK:
        return None
    shard.seek(offset - BLOCK)
    try:
        return tarfile.TarInfo.frombuf(shard.read(BLOCK), "utf-8", "replace")
    except tarfile.HeaderError:
        return None


def crc32(data: bytes) -> int:
    """Return the checksum of a picture's bytes that the dataset's table holds."""
    return zlib.crc32(data)
