"""Where pictures come from.

A source is a small class that names pictures in a fixed order and says where their bytes are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from data_pipeline.errors import DataError


@dataclass(frozen=True)
class Extent:
    """A picture's bytes inside a file, to be read by whichever worker gets it."""

    path: str
    offset: int
    length: int

    def read(self) -> bytes:
        """Read the bytes; DataError when the file has vanished, is unreadable or has become shorter."""
        try:
            with open(self.path, "rb") as stream:  # noqa: PTH123  (a path of 14 M pictures is kept as text)
                stream.seek(self.offset)
                data = stream.read(self.length)
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read ({error.strerror}); make it readable and build again"
            ) from None
        if len(data) != self.length:
            raise DataError(f"{self.path} ended early: it changed while it was read; build again from a quiet source")
        return data


@dataclass(frozen=True)
class Picture:
    """One picture of a source."""

    name: str
    """Unique in its split; decides where the picture lands in the shuffled order."""
    class_id: str
    data: Extent | bytes
    """Where the bytes are, or the bytes themselves when the source can only be read once through."""


class Source(Protocol):
    """Something that pictures come from."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that this source can give."""

    @property
    def shard_bytes(self) -> int:
        """Size that shards should have."""

    def describe(self) -> dict[str, Any]:
        """Say in JSON what decides the pictures, for dataset.json and to recognise an interrupted build."""

    def class_names(self) -> dict[str, str] | None:
        """Return class id -> name in the order of the labels, or None: the ids that occur, sorted."""

    def count(self, split: str) -> int | None:
        """Return the number of pictures when that is known before reading them."""

    def pictures(self, split: str) -> Iterator[Picture]:
        """Yield all pictures of a split in a fixed order; DataError when the source is not as it should be."""
