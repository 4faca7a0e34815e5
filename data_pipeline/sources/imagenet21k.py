"""ImageNet-21k (winter21 or fall11): one archive of per-class archives, read through and never unpacked to disk."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.archive import Entry, entries
from data_pipeline.errors import DataError
from data_pipeline.sources import Extent, Picture

_GZIP = b"\x1f\x8b"
HELD_OUT = 50
ENOUGH = 500


class ImageNet21k:
    """A tar, or tar.gz, of one tar per WordNet id.

    A plain tar is read in place, in parallel. A compressed one can only be read from its beginning: one class at a time
    is held in memory, once for each split. From every class with at least ENOUGH pictures, HELD_OUT are the val split,
    chosen by a hash of their names (ImageNet-21k itself has no validation split).

    Args:
        path: the archive.
        classes: the WordNet ids to take, as for ImageNet-21k-P; None takes all.
    """

    splits = ("train", "val")
    shard_bytes = 256 * 2**20

    def __init__(self, path: Path, classes: list[str] | None = None) -> None:
        self.path, self._classes = path, None if classes is None else sorted(set(classes))
        try:
            with path.open("rb") as stream:
                self._compressed = stream.read(2) == _GZIP
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); name an ImageNet-21k archive") from None

    def describe(self) -> dict[str, Any]:
        """Say what decides the pictures."""
        chosen = None if self._classes is None else hashlib.sha256("\n".join(self._classes).encode()).hexdigest()
        described = {"source": "imagenet-21k", "bytes": self.path.stat().st_size, "classes_sha256": chosen}
        return described | {"held_out": HELD_OUT, "held_out_from_classes_of": ENOUGH}

    def class_names(self) -> dict[str, str] | None:
        """Return the chosen WordNet ids; the archive does not hold their words."""
        return None if self._classes is None else {wnid: wnid for wnid in self._classes}

    def count(self, split: str) -> None:
        """Return None: the archive does not say."""

    def pictures(self, split: str) -> Iterator[Picture]:
        """Yield the pictures of a split, class by class in the order of the archive."""
        seen = set()
        for wnid, members in self._compressed_classes() if self._compressed else self._plain_classes():
            seen.add(wnid)
            held_out = set()
            if len(members) >= ENOUGH:
                held_out = set(sorted((picture.name for picture in members), key=_hash)[:HELD_OUT])
            yield from (picture for picture in members if (picture.name in held_out) == (split == "val"))
        self._complete(seen)

    def _complete(self, seen: set[str]) -> None:
        missing = sorted(set(self._classes or ()) - seen)
        if missing:
            raise DataError(
                f"{self.path} has no pictures of {len(missing)} of the chosen classes, for example {missing[0]}; "
                "take them from the list, or use the release that the list was made for"
            )

    def _wanted(self, name: str) -> str | None:
        wnid = name.rpartition("/")[2].removesuffix(".tar")
        if not name.endswith(".tar"):
            raise DataError(f"{self.path} holds {name}, but ImageNet-21k is an archive of archives; check the file")
        return wnid if self._classes is None or wnid in self._classes else None

    def _plain_classes(self) -> Iterator[tuple[str, list[Picture]]]:
        outers = [(self._wanted(outer.name), outer) for outer in entries(self.path)]
        self._complete({wnid for wnid, _ in outers if wnid is not None})  # before hours of work, not after
        for wnid, outer in outers:
            if wnid is not None:
                inner = entries(self.path, outer.offset, outer.offset + outer.size)
                yield wnid, [_picture(wnid, e, Extent(str(self.path), e.offset, e.size)) for e in inner]

    def _compressed_classes(self) -> Iterator[tuple[str, list[Picture]]]:
        try:
            with tarfile.open(self.path, "r|gz") as archive:
                for info in archive:
                    archive.members = []  # type: ignore[attr-defined]  # or it keeps every header in memory
                    wnid = self._wanted(info.name) if info.isreg() else None
                    if wnid is not None:
                        data = archive.extractfile(info).read()  # type: ignore[union-attr]
                        yield wnid, _in_memory(wnid, data)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path} is damaged or ends early ({error}); download it again") from None


def _in_memory(wnid: str, data: bytes) -> list[Picture]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        found = [Entry(info.name, info.offset_data, info.size) for info in archive if info.isreg()]
    if any(entry.offset + entry.size > len(data) for entry in found):
        raise EOFError(f"{wnid}.tar ends early")
    return [_picture(wnid, entry, data[entry.offset : entry.offset + entry.size]) for entry in found]


def _picture(wnid: str, entry: Entry, data: Extent | bytes) -> Picture:
    return Picture(f"{wnid}/{entry.name}", wnid, data)


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
