"""Where images come from.

A source is a small class that lists images in a fixed order and where their bytes are.
"""

import hashlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.archive import Entry
from data_pipeline.errors import StorageError
from data_pipeline.index import IMAGE_EXTENSIONS

SHARD_BYTES = 256 * 2**20
IMAGE_SUFFIXES = tuple(
    f".{extension}" for extension in (*IMAGE_EXTENSIONS, "gif", "ppm", "pgm", "avif", "jp2", "jfif", "mpo")
)
_NO_CLASSES = {"__MACOSX", "lost+found", "@eaDir"}
SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Extent:
    """An image's bytes inside a file, to be read by whichever worker gets it."""

    path: str
    offset: int
    length: int

    def read(self) -> bytes:
        """Read the bytes; StorageError when the file has vanished, is unreadable or has become shorter."""
        try:
            with open(self.path, "rb") as stream:  # noqa: PTH123  (a path of 14 M images is kept as text)
                stream.seek(self.offset)
                data = stream.read(self.length)
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be read ({error.strerror}); make it readable and build again"
            ) from None
        if len(data) != self.length:
            raise StorageError(f"{self.path} ended early: it changed while it was read; build again when it is at rest")
        return data


@dataclass(frozen=True)
class Unusable:
    """Stands for bytes that are not an image or cannot be assigned to a class: listed with the reason."""

    reason: str


@dataclass(frozen=True)
class SourceImage:
    """One image of a source."""

    name: str
    """Unique in its split, and UTF-8; decides where the image lands in the shuffled order."""
    class_id: str
    data: Extent | bytes | Unusable
    """Where the bytes are, or the bytes themselves when the source can only be read once through."""


class Source(Protocol):
    """Something that images come from."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that this source can give."""

    @property
    def shard_bytes(self) -> int:
        """Size that shards should have."""

    def describe(self) -> dict[str, Any]:
        """Say in JSON what decides the images, for dataset.json and to recognize an interrupted build."""

    def class_names(self, found: Collection[str]) -> dict[str, str]:
        """Return class id -> name in the order of the labels, for a source in which the ids `found` occur."""

    def count(self, split: str) -> int | None:
        """Return the number of images when that is known before reading them."""

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield all images of a split in a fixed order; DataError when the source is not as it should be."""


def extent(path: Path, entry: Entry) -> Extent | Unusable:
    """Return where the bytes of a plain archive's member are, or why it has none."""
    return Unusable(entry.unusable) if entry.unusable else Extent(str(path), entry.offset, entry.size)


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
