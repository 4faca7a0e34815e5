"""An archive of class folders, (SPLIT/)CLASS/IMAGE, such as the processed ImageNet-21k-P; never unpacked to disk."""

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.archive import Entry, contents, entries, is_compressed
from data_pipeline.sources import SHARD_BYTES, Extent, SourceImage, Unusable, extent, split_in


class Archived:
    """A tar, or a compressed tar, in which each image lies in a folder named as its class.

    A folder above that one whose name contains the word train, val or test is its split. Where there are
    such folders, what lies in none of them is counted and listed; where there are none, all are the train split. A
    compressed archive is read through once to find the splits and once for each split.
    """

    shard_bytes = SHARD_BYTES

    def __init__(self, path: Path) -> None:
        self.path, self._compressed = path, is_compressed(path)
        self._counts: Counter[str] = Counter()
        self._beside: Counter[str] = Counter()
        for entry in entries(path):
            split, _ = _place(entry.name)
            self._counts[split] += 1
            self._beside[str(PurePosixPath(entry.name).parent)] += not split
        self.splits = tuple(split for split in ("train", "val", "test") if split in self._counts) or ("train",)

    def describe(self) -> dict[str, Any]:
        """Say what decides the images."""
        return {"source": "archive of class folders", "bytes": self.path.stat().st_size}

    def class_names(self, found: Collection[str]) -> dict[str, str]:
        """Return the names of the class folders that occur, sorted."""
        return {name: name for name in sorted(found)}

    def count(self, split: str) -> int:
        """Return the number of files."""
        return self._counts[split] or self._counts[""]

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images of a split in the order of the archive."""
        named = any(self._counts[name] for name in self.splits)
        if named and split == self.splits[0]:
            for folder, count in self._beside.items():
                if count:
                    yield SourceImage(f"{folder}/", "", Unusable(f"{count} files in no folder of a split"))
        for entry, data in contents(self.path) if self._compressed else self._extents():
            found, class_id = _place(entry.name)
            if found == (split if named else ""):
                unusable = entry.unusable or ("" if class_id else "lies in no class folder")
                yield SourceImage(entry.name, class_id, Unusable(unusable) if unusable else data)

    def _extents(self) -> Iterator[tuple[Entry, Extent | Unusable]]:
        return ((entry, extent(self.path, entry)) for entry in entries(self.path))


def _place(name: str) -> tuple[str, str]:
    """Return the split ('' when no folder's name has one) and the class of a member."""
    *above, folder = ("", *PurePosixPath(name).parent.parts)
    return next(filter(None, map(split_in, above)), ""), folder
