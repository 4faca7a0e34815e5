"""WebDataset shards that others made, to be converted: several layouts of samples, plain or compressed."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from data_pipeline.acceptance import Rejected
from data_pipeline.archive import Content, Entry, Extent, contents
from data_pipeline.errors import DataError, StorageError, printable
from data_pipeline.shards import STRAY, Labels, Sample, samples_of
from data_pipeline.sources import Source, SourceImage

LABEL_MEMBERS = ("cls", "json", "txt")


class Shards(Source):
    """Samples with one image and one label each; what has none is listed.

    Args:
        paths: the shards of each split.
        labels: how the class of a sample is found.
        class_names: class id -> name in the order of the labels; None takes the classes that occur.
    """

    def __init__(
        self, paths: Mapping[str, Sequence[Path]], labels: Labels, class_names: dict[str, str] | None = None
    ) -> None:
        self.paths, self._labels = paths, labels
        named = {
            split: [(printable(str(path.absolute())), path.stat().st_size) for path in group]
            for split, group in paths.items()
        }
        decided = hashlib.sha256(json.dumps([named, labels.key, class_names], sort_keys=True).encode()).hexdigest()
        files = sum(map(len, paths.values()))
        super().__init__(tuple(paths), {"source": "shards", "files": files, "sha256": decided}, class_names)

    def class_names(self, found: Collection[str]) -> dict[str, str]:
        """Return the classes that were stated, else those that occur: numbers are labels, from 0 to the largest."""
        if self.classes is not None:
            return self.classes
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

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the samples of a split, shard by shard."""
        for path in self.paths[split]:
            strays: list[str] = []
            try:
                with path.open("rb") as stream:
                    yield from (self._image(path, *sample, stream) for sample in _samples(path, strays))
            except OSError as error:
                message = f"{path} cannot be read ({error.strerror}); make it readable and build again"
                raise StorageError(message) from None
            for name in strays:
                yield SourceImage(f"{printable(path.name)}/{name}", "", Rejected(STRAY))

    def _image(self, path: Path, sample: Sample, found: dict[str, Content], stream: BinaryIO) -> SourceImage:
        image = sample.image()
        if isinstance(image, str):
            return SourceImage(f"{printable(path.name)}/{sample.key}", "", Rejected(image))
        texts = {}
        for extension in LABEL_MEMBERS:
            member = sample.member(extension)
            if member is not None and not member.unusable:
                texts[extension] = _bytes(found[member.name], stream)
        class_id, reason = self._labels.of(sample, texts)
        return SourceImage(
            f"{printable(path.name)}/{image.name}", class_id, Rejected(reason) if reason else found[image.name]
        )


def _samples(path: Path, strays: list[str]) -> Iterator[tuple[Sample, dict[str, Content]]]:
    """Yield each sample with the contents of its members by name."""
    held: dict[str, Content] = {}

    def members() -> Iterator[Entry]:
        for entry, content in contents(path):
            held[entry.name] = content
            yield entry

    for sample in samples_of(members(), strays):
        yield sample, {member.name: held.pop(member.name, b"") for member in sample.members}


def _bytes(content: Content, stream: BinaryIO) -> bytes:
    """Return the bytes of a label that can be used."""
    if isinstance(content, Extent):
        stream.seek(content.offset)
        return stream.read(content.length)
    assert isinstance(content, bytes)
    return content
