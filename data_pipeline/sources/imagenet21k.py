"""ImageNet-21k (winter21 or fall11), or any folder of an archive for each class; never unpacked to disk."""

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.archive import Entry, contents, entries, entries_of, is_compressed
from data_pipeline.errors import DataError
from data_pipeline.sources import SHARD_BYTES, SPLIT_WORDS, SourceImage, Unusable, extent, held_out

HELD_OUT = 50
ENOUGH = 500


class ImageNet21k:
    """A tar, a compressed tar, or a folder, of one tar for each WordNet id.

    A plain tar is read in place, in parallel. A compressed one can only be read from its beginning: one class at a time
    is held in memory, once for each split. From every class with at least ENOUGH images, HELD_OUT are the val split,
    chosen by a hash of their names (ImageNet-21k itself has no validation split).

    Args:
        path: the archive, or the folder.
        classes: the WordNet ids to take, as for ImageNet-21k-P; None takes all.
    """

    splits = ("train", "val")
    shard_bytes = SHARD_BYTES

    def __init__(self, path: Path, classes: list[str] | None = None) -> None:
        self.path, self._classes = path, None if classes is None else sorted(set(classes))
        self._compressed = not path.is_dir() and is_compressed(path)

    def describe(self) -> dict[str, Any]:
        """Say what decides the images."""
        chosen = None if self._classes is None else hashlib.sha256("\n".join(self._classes).encode()).hexdigest()
        size = sum(file.stat().st_size for file in self._archives())
        described = {"source": "imagenet-21k", "bytes": size, "classes_sha256": chosen}
        return described | {"held_out": HELD_OUT, "held_out_from_classes_of": ENOUGH}

    def class_names(self, found: Collection[str]) -> dict[str, str]:
        """Return the chosen WordNet ids, or those that occur; the archive does not hold their words."""
        return {wnid: wnid for wnid in self._classes or sorted(found)}

    def count(self, split: str) -> None:
        """Return None: the archive does not hold it."""

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images of a split, class by class in the order of the archive."""
        seen = set()
        for wnid, images in self._compressed_classes() if self._compressed else self._plain_classes():
            if not images:
                raise DataError(f"{wnid}.tar in {self.path} holds no images; download it again, or take {wnid} out")
            seen.add(wnid)
            usable = [image.name for image in images if not isinstance(image.data, Unusable)]
            chosen = held_out(usable, HELD_OUT) if len(usable) >= ENOUGH else set()
            yield from (image for image in images if (image.name in chosen) == (split == "val"))
        self._complete(seen)

    def _complete(self, seen: set[str]) -> None:
        missing = sorted(set(self._classes or ()) - seen)
        if missing:
            raise DataError(
                f"{self.path} has no images of {len(missing)} of the chosen classes, for example {missing[0]}; "
                "take them from the list, or use the release that the list was made for"
            )

    def _wanted(self, name: str) -> str | None:
        if not name.endswith(".tar"):
            raise DataError(f"{self.path} holds {name}, but ImageNet-21k is an archive of archives; check the file")
        wnid = name.rpartition("/")[2].removesuffix(".tar")
        if wnid in SPLIT_WORDS:
            raise DataError(f"{self.path} holds archives of splits, such as {name}; unpack it, and build from them")
        return wnid if self._classes is None or wnid in self._classes else None

    def _plain_classes(self) -> Iterator[tuple[str, list[SourceImage]]]:
        outers = [(self._wanted(name), file, outer) for name, file, outer in self._outers()]
        self._complete({wnid for wnid, *_ in outers if wnid is not None})  # before hours of work, not after
        for wnid, file, outer in outers:
            if wnid is None:
                continue
            if outer is None and is_compressed(file):
                raise DataError(f"{file} is compressed; unpack it with gunzip, bunzip2 or unxz")
            yield wnid, [SourceImage(f"{wnid}/{e.name}", wnid, extent(file, e)) for e in entries(file, outer)]

    def _outers(self) -> Iterator[tuple[str, Path, Entry | None]]:
        """Yield name, file and, inside an archive, member of each class's archive."""
        if self.path.is_dir():
            yield from ((file.name, file, None) for file in self._archives())
        else:
            yield from ((outer.name, self.path, outer) for outer in entries(self.path))

    def _archives(self) -> list[Path]:
        return sorted(self.path.glob("*.tar")) if self.path.is_dir() else [self.path]

    def _compressed_classes(self) -> Iterator[tuple[str, list[SourceImage]]]:
        for outer, data in contents(self.path, lambda name: self._wanted(name) is not None):
            wnid = self._wanted(outer.name)
            if wnid is None:
                continue
            images = []
            for entry in entries_of(data, outer.name, self.path):
                image = Unusable(entry.unusable) if entry.unusable else data[entry.offset : entry.offset + entry.size]
                images.append(SourceImage(f"{wnid}/{entry.name}", wnid, image))
            yield wnid, images
