"""Where images come from.

A source is a small class that lists images in a fixed order and where their bytes are.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.acceptance import Rejected
from data_pipeline.archive import Content
from data_pipeline.errors import DataError
from data_pipeline.shards import IMAGE_EXTENSIONS

IMAGE_SUFFIXES = tuple(
    f".{extension}" for extension in (*IMAGE_EXTENSIONS, "gif", "ppm", "pgm", "avif", "jp2", "jfif", "mpo")
)
_NO_CLASSES = {"__MACOSX", "lost+found", "@eaDir"}
SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class SourceImage:
    """One image of a source."""

    name: str
    """Unique in its split, and UTF-8; decides where the image lands in the shuffled order."""
    class_id: str
    data: Content
    """Where its bytes are, the bytes, or why it is left out."""


class Source(ABC):
    """Something that images come from.

    Args:
        splits: the splits that it can give.
        described: what decides the images, in JSON, for dataset.json and to recognize an interrupted build.
        classes: class id -> name in the order of the labels; None takes the ids that occur, sorted.
        counts: the number of images of each split, where it is known before reading them.
    """

    shard_bytes = 256 * 2**20
    """Size that shards should have."""
    options: tuple[str, ...] = ()
    """Options of the command line that it takes."""

    def __init__(
        self,
        splits: tuple[str, ...],
        described: dict[str, Any],
        classes: dict[str, str] | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        self.splits, self.described, self.classes, self.counts = splits, described, classes, counts or {}

    def class_names(self, found: Collection[str]) -> dict[str, str]:
        """Return class id -> name in the order of the labels, where the ids `found` occur."""
        return {class_id: class_id for class_id in sorted(found)} if self.classes is None else self.classes

    @abstractmethod
    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield all images of a split in a fixed order; DataError when the source is not as it should be."""


class HeldOut(Source):
    """Another source, ``name`` in messages, of whose first split a share of each class becomes the val split.

    It is chosen by a hash of the images' names.

    Raises:
        DataError: it has a val split of its own.
    """

    def __init__(self, source: Source, name: object, fraction: float) -> None:
        if "val" in source.splits:
            raise DataError(f"{name} comes with a val split; leave --val-fraction out")
        self._source, self._divided = source, source.splits[0]
        by_class: dict[str, list[str]] = {}
        for image in source.images(self._divided):
            if not isinstance(image.data, Rejected) and may_be_image(image.name):
                by_class.setdefault(image.class_id, []).append(image.name)
        self._held_out = {name for names in by_class.values() for name in held_out(names, round(fraction * len(names)))}
        self.shard_bytes = source.shard_bytes
        super().__init__((*source.splits, "val"), source.described | {"val_fraction": fraction}, source.classes)

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the source's images, those of its first split divided."""
        if split not in {self._divided, "val"}:
            return self._source.images(split)
        images = self._source.images(self._divided)
        return (image for image in images if (image.name in self._held_out) == (split == "val"))


def split_in(name: str) -> str | None:
    """Return the split that a word in a file's or folder's name names, as in "imagenet-validation-0001.tar"."""
    found = {SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def splits_among(names: Collection[str]) -> dict[str, str]:
    """Return the split of each of some folders side by side, or {} where their names are those of classes.

    One class may be called test_tube: several splits must be named, or all folders name one.
    """
    found = {name: split for name in names if (split := split_in(name)) is not None}
    return found if len(set(found.values())) > 1 or len(found) == len(names) else {}


def may_be_image(name: str) -> bool:
    """Whether a file's name is that of an image, or has no extension that excludes it."""
    return name.lower().endswith(IMAGE_SUFFIXES) or "." not in name


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or made by a system, such as __MACOSX."""
    return name.startswith(".") or name in _NO_CLASSES


def held_out(names: Collection[str], count: int) -> set[str]:
    """Choose `count` of the names by a hash of each; adding or removing a name changes at most one choice."""
    return set(sorted(names, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())[:count])
