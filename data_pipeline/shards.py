"""The bytes of a shard and of its index.

A shard is a USTAR archive in which each sample is two members, KEY.cls (the label, fixed-width ASCII) and KEY.jpg. The
index next to it is the one that DALI's `wds2idx` would write: `v1.2 COUNT`, then per sample `ext offset size name ...`.
"""

import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
CLS_WIDTH = 5
_PERMISSIONS = 0o644


@dataclass(frozen=True)
class Written:
    """Where an image was put."""

    offset: int
    """First byte of the JPEG in the shard."""
    index: str
    """The sample's line in the index."""


def sample_bytes(length: int) -> int:
    """Return how many bytes of a shard a sample takes whose JPEG has `length` bytes."""
    return 3 * BLOCK + -(-length // BLOCK) * BLOCK


def write_shard(out: BinaryIO, samples: Iterable[tuple[str, int, bytes]]) -> list[Written]:
    """Write samples (key, label, JPEG) to an open file and return where each one is."""
    from webdataset.writer import TarWriter  # type: ignore[import-untyped]  # noqa: PLC0415  (slow to import)

    written = []
    position = 0
    # Fixed times and owners: the same input gives the same bytes.
    with TarWriter(out, user="", group="", mode=_PERMISSIONS, mtime=0, encoder=False) as writer:
        for key, label, jpeg in samples:
            cls = b"%0*d" % (CLS_WIDTH, label)
            image = position + 3 * BLOCK
            writer.write({"__key__": key, "cls": cls, "jpg": jpeg})
            line = f"cls {image - 2 * BLOCK} {len(cls)} {key}.cls jpg {image} {len(jpeg)} {key}.jpg"
            written.append(Written(image, line))
            position += sample_bytes(len(jpeg))
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
    """Return the checksum of an image's bytes that the dataset's table holds."""
    return zlib.crc32(data)
