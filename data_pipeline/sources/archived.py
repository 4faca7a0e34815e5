"""An archive of class folders, (SPLIT/)CLASS/**/IMAGE, such as the processed ImageNet-21k-P; never unpacked to disk."""

import os.path
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_pipeline.acceptance import Rejected
from data_pipeline.archive import contents, entries
from data_pipeline.errors import DataError, printable
from data_pipeline.sources import (
    SPLIT_WORDS,
    Source,
    SourceImage,
    is_hidden,
    may_be_image,
    split_in,
    splits_among,
)


class Archived(Source):
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

    def __init__(self, path: Path, split: str | None = None) -> None:
        self.path = path
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
        counts: Counter[str] = Counter()
        classes: dict[str, set[str]] = {}
        for folder, count in folders.items():
            found, class_id = self._place(folder)
            counts[found] += count
            classes.setdefault(found, set()).update({class_id} - {""})
        splits = tuple(name for name in ("train", "val", "test") if name in counts) or (self._split,)
        for name in splits[1:]:
            if not classes[name] & classes[splits[0]]:
                raise DataError(
                    f"{path} has no class of '{splits[0]}' in '{name}': its labels are elsewhere; unpack it"
                )
        self._names = set().union(*(found for split, found in classes.items() if split))
        described = {"source": "archive of class folders", "bytes": path.stat().st_size}
        described |= {"path": printable(str(path.resolve()))}
        super().__init__(splits, described, {name: name for name in sorted(self._names)}, counts)

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images of a split in the order of the archive."""
        beside: Counter[str] = Counter()
        for entry, content in contents(self.path):
            path = PurePosixPath(entry.name)
            found, class_id = self._place(path.parent)
            if any(map(is_hidden, path.parts)):
                found, class_id = "", ""
            if found == split and (class_id in self._names or may_be_image(path.name)):
                usable = class_id or isinstance(content, Rejected)
                yield SourceImage(entry.name, class_id, content if usable else Rejected("is in no class folder"))
            elif not found or class_id not in self._names:
                beside[str(path.parent)] += 1
        for folder, count in beside.items() if split == self.splits[0] else ():
            yield SourceImage(f"{folder}/", "", Rejected(f"hidden, or in no class folder of a split: {count} files"))

    def _place(self, folder: PurePosixPath) -> tuple[str, str]:
        """Return the split ('' when it has none) and the class ('' when it has none) of the members of a folder."""
        parts = (*folder.parts[self._depth :], "", "")
        return (self._split_of.get(parts[0], ""), parts[1]) if self._split_of else (self._split, parts[0])
