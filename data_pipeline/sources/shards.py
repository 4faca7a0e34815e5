"""WebDataset shards that others made, to be converted: several layouts of samples, plain or compressed."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.archive import Entry, contents, entries, is_compressed
from data_pipeline.errors import DataError, StorageError, printable
from data_pipeline.index import STRAY, Labels, Member, Sample, samples_of
from data_pipeline.sources import SHARD_BYTES, Extent, SourceImage, Unusable

LABEL_MEMBERS = ("cls", "json", "txt")


class Shards:
    """Samples with one image and one label each; what has none is listed.

    Args:
        paths: the shards of each split.
        labels: how the class of a sample is found.
        class_names: class id -> name in the order of the labels; None takes the classes that occur.
    """

    shard_bytes = SHARD_BYTES

    def __init__(
        self, paths: Mapping[str, Sequence[Path]], labels: Labels, class_names: dict[str, str] | None = None
    ) -> None:
        self.paths, self._labels, self.stated = paths, labels, class_names
        self.splits = tuple(paths)

    def describe(self) -> dict[str, Any]:
        """Say what decides the images."""
        named = {
            split: [(printable(str(path.absolute())), path.stat().st_size) for path in paths]
            for split, paths in self.paths.items()
        }
        decided = json.dumps([named, self._labels.key, self.stated], sort_keys=True)
        files = sum(len(paths) for paths in self.paths.values())
        return {"source": "shards", "files": files, "sha256": hashlib.sha256(decided.encode()).hexdigest()}

    def class_names(self, found: Collection[str]) -> dict[str, str]:
        """Return the classes that were stated, else those that occur: numbers are labels, from 0 to the largest."""
        if self.stated is not None:
            return self.stated
        if len(self.splits) > 1:
            found = self._in_any_split
        numbers = sorted(int(class_id) for class_id in found if class_id.isdigit())
        if numbers and len(numbers) < len(found):
            name = next(class_id for class_id in sorted(found) if not class_id.isdigit())
            raise DataError(f"some labels of the shards are numbers, others are names such as {name!r}; give --classes")
        names = [str(label) for label in range(numbers[-1] + 1)] if numbers else sorted(found)
        return {name: name for name in names}

    @cached_property
    def _in_any_split(self) -> set[str]:
        """The class ids of all splits, for which the shards are read through once more."""
        return {image.class_id for split in self.splits for image in self.images(split) if image.class_id}

    def count(self, split: str) -> None:
        """Return None: shards do not hold it."""

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the samples of a split, shard by shard."""
        for path in self.paths[split]:
            strays: list[str] = []
            for sample, found in _compressed(path, strays) if is_compressed(path) else _plain(path, strays):
                yield self._image(path, sample, found)
            for name in strays:
                yield SourceImage(f"{printable(path.name)}/{name}", "", Unusable(STRAY))

    def _image(self, path: Path, sample: Sample, found: dict[str, Extent | bytes]) -> SourceImage:
        image = sample.image()
        if isinstance(image, str):
            return SourceImage(f"{printable(path.name)}/{sample.key}", "", Unusable(image))
        texts = {ext: member for ext in LABEL_MEMBERS if (member := sample.member(ext)) is not None}
        data = {extension: found[member.name] for extension, member in texts.items() if not member.unusable}
        class_id, reason = self._labels.of(
            sample, {extension: part for extension, part in data.items() if isinstance(part, bytes)}
        )
        name = f"{printable(path.name)}/{image.name}"
        return SourceImage(name, class_id, Unusable(reason) if reason else found[image.name])


def _plain(path: Path, strays: list[str]) -> Iterator[tuple[Sample, dict[str, Extent | bytes]]]:
    """Yield each sample with where its members are, and the bytes of those that may hold a label."""

    def read(member: Member) -> Extent | bytes:
        if member.extension.lower() not in LABEL_MEMBERS:
            return Extent(str(path), member.offset, member.size)
        stream.seek(member.offset)
        return stream.read(member.size)

    try:
        with path.open("rb") as stream:
            for sample in samples_of(entries(path), strays):
                yield sample, {member.name: read(member) for member in sample.members}
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}); make it readable and build again") from None


def _compressed(path: Path, strays: list[str]) -> Iterator[tuple[Sample, dict[str, Extent | bytes]]]:
    """Yield each sample with the bytes of its members."""
    held: dict[str, Extent | bytes] = {}

    def remembered() -> Iterator[Entry]:
        for entry, data in contents(path):
            held[entry.name] = data
            yield entry

    for sample in samples_of(remembered(), strays):
        yield sample, {member.name: held.pop(member.name, b"") for member in sample.members}
