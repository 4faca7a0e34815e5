"""WebDataset shards that others made, to be converted: several layouts of samples, plain or compressed."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from data_pipeline.acceptance import Rejected
from data_pipeline.errors import DataError, printable
from data_pipeline.shards import Labels, samples_in
from data_pipeline.sources import Source, SourceImage


class Shards(Source):
    """Samples with one image and one label each; what has none is listed.

    Args:
        paths: the shards of each split.
        labels: how the class of a sample is found.
        class_names: class id -> name in the order of the labels; None takes the classes that occur.
    """

    options = ("split", "classes", "label_key")

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
            for sample in samples_in(path):
                image, class_id = sample.image(), self._labels.of(sample)
                name = f"{printable(path.name)}/{sample.key if isinstance(image, Rejected) else image.name}"
                if isinstance(image, Rejected):
                    yield SourceImage(name, "", image)
                elif isinstance(class_id, Rejected):
                    yield SourceImage(name, "", class_id)
                else:
                    yield SourceImage(name, class_id, image.content)
