"""An archive of class folders, (SPLIT/)CLASS/**/IMAGE, such as the processed ImageNet-21k-P; never unpacked to disk."""

import os.path
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.archive import Entry, contents, entries, is_compressed
from data_pipeline.errors import DataError, printable
from data_pipeline.sources import (
    SHARD_BYTES,
    SPLIT_WORDS,
    Extent,
    SourceImage,
    Unusable,
    extent,
    is_hidden,
    may_be_image,
    split_in,
    splits_among,
)  # fmt: skip


class Archived:
    """A tar, or a compressed tar, of class folders, or of such folders for each split, also below other folders.

    Below the folders that all images share, the folders are splits if they are named so (`splits_among`), else
    classes. Files next to them, hidden ones and others that are no images are listed. The archive is read through once
    to find this, a compressed one once more for each split.

    Args:
        path: the archive.
        split: what all images become, each folder being a class; None finds splits.

    Raises:
        DataError: a split has no class in common with train.
    """

    shard_bytes = SHARD_BYTES

    def __init__(self, path: Path, split: str | None = None) -> None:
        self.path, self._compressed = path, is_compressed(path)
        folders = Counter(
            PurePosixPath(entry.name).parent
            for entry in entries(path)
            if may_be_image(PurePosixPath(entry.name).name) and not any(map(is_hidden, PurePosixPath(entry.name).parts))
        )
        shared = os.path.commonpath([str(folder) for folder in folders]) if folders else ""
        above = PurePosixPath(shared).parts
        below = {folder.parts[len(above)] for folder in folders if len(folder.parts) > len(above)}
        if PurePosixPath(shared) in folders and len(below) <= 1:  # one class; else images next to the class folders
            below, above = set(above[-1:]), above[:-1]
        self._depth = len(above)
        self._split_of = {} if split is not None else splits_among(below)
        named = next((SPLIT_WORDS[part.lower()] for part in reversed(above) if part.lower() in SPLIT_WORDS), None)
        self._split = split or named or split_in(path.name) or "train"
        self._counts: Counter[str] = Counter()
        classes: dict[str, set[str]] = {}
        for folder, count in folders.items():
            found, class_id = self._place(folder)
            self._counts[found] += count
            classes.setdefault(found, set()).update({class_id} - {""})
        self.splits = tuple(name for name in ("train", "val", "test") if name in self._counts) or (self._split,)
        names = set().union(*(found for split, found in classes.items() if split))
        self._classes = {name: name for name in sorted(names)}
        for name in self.splits[1:]:
            if not classes[name] & classes[self.splits[0]]:
                raise DataError(
                    f"{path} has no class of '{self.splits[0]}' in '{name}': its labels are elsewhere; unpack it"
                )

    def describe(self) -> dict[str, Any]:
        """Say what decides the images."""
        described = {"source": "archive of class folders", "bytes": self.path.stat().st_size}
        return described | {"path": printable(str(self.path.resolve()))}

    def class_names(self, found: Collection[str]) -> dict[str, str]:  # noqa: ARG002  (known before)
        """Return the names of the class folders, sorted."""
        return self._classes

    def count(self, split: str) -> int:
        """Return the number of images."""
        return self._counts[split]

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images of a split in the order of the archive."""
        beside: Counter[str] = Counter()
        for entry, data in contents(self.path) if self._compressed else self._extents():
            path = PurePosixPath(entry.name)
            found, class_id = self._place(path.parent)
            if any(map(is_hidden, path.parts)):
                found, class_id = "", ""
            if found == split and (class_id in self._classes or may_be_image(path.name)):
                unusable = entry.unusable or ("" if class_id else "is in no class folder")
                yield SourceImage(entry.name, class_id, Unusable(unusable) if unusable else data)
            elif not found or class_id not in self._classes:
                beside[str(path.parent)] += 1
        for folder, count in beside.items() if split == self.splits[0] else ():
            yield SourceImage(f"{folder}/", "", Unusable(f"hidden, or in no class folder of a split: {count} files"))

    def _place(self, folder: PurePosixPath) -> tuple[str, str]:
        """Return the split ('' when it has none) and the class ('' when it has none) of the members of a folder."""
        parts = (*folder.parts[self._depth :], "", "")
        return (self._split_of.get(parts[0], ""), parts[1]) if self._split_of else (self._split, parts[0])

    def _extents(self) -> Iterator[tuple[Entry, Extent | Unusable]]:
        return ((entry, extent(self.path, entry)) for entry in entries(self.path))
