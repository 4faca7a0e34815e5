"""ImageNet-21k (winter21 or fall11), or any folder of an archive for each class; never unpacked to disk."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline.acceptance import Rejected
from data_pipeline.archive import Content, Entry, contents, is_compressed
from data_pipeline.errors import DataError
from data_pipeline.sources import SPLIT_WORDS, Source, SourceImage, held_out

HELD_OUT = 50
ENOUGH = 500


class ImageNet21k(Source):
    """A tar, a compressed tar, or a folder, of one tar for each WordNet id.

    A plain tar is read in place, in parallel. A compressed one can only be read from its beginning: one class at a time
    is held in memory, once for each split. From every class with at least ENOUGH images, HELD_OUT are the val split,
    chosen by a hash of their names (ImageNet-21k itself has no validation split).

    Args:
        path: the archive, or the folder.
        classes: the WordNet ids to take, as for ImageNet-21k-P; None takes all.
    """

    def __init__(self, path: Path, classes: list[str] | None = None) -> None:
        self.path, self._classes = path, None if classes is None else sorted(set(classes))
        self._compressed = not path.is_dir() and is_compressed(path)
        self._archives = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        chosen = None if self._classes is None else hashlib.sha256("\n".join(self._classes).encode()).hexdigest()
        size = sum(file.stat().st_size for file in self._archives)
        described = {"source": "imagenet-21k", "bytes": size, "classes_sha256": chosen}
        described |= {"held_out": HELD_OUT, "held_out_from_classes_of": ENOUGH}
        # The archive does not hold the words of its WordNet ids.
        super().__init__(("train", "val"), described, {wnid: wnid for wnid in self._classes or ()} or None)

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images of a split, class by class in the order of the archive."""
        seen = set()
        for wnid, images in self._by_class():
            if not images:
                raise DataError(f"{wnid}.tar in {self.path} holds no images; download it again, or take {wnid} out")
            seen.add(wnid)
            usable = [image.name for image in images if not isinstance(image.data, Rejected)]
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

    def _by_class(self) -> Iterator[tuple[str, list[SourceImage]]]:
        outers: Iterable[tuple[str | None, Path, tuple[Entry, Content] | None]] = self._outers()
        if not self._compressed:
            outers = list(outers)
            self._complete({wnid for wnid, *_ in outers if wnid is not None})  # before hours of work, not after
        for wnid, file, outer in outers:
            if wnid is not None:
                yield wnid, [SourceImage(f"{wnid}/{e.name}", wnid, data) for e, data in contents(file, outer)]

    def _outers(self) -> Iterator[tuple[str | None, Path, tuple[Entry, Content] | None]]:
        """Yield WordNet id, file and, inside an archive, member of each class's archive."""
        if self.path.is_dir():
            yield from ((self._wanted(file.name), file, None) for file in self._archives)
        else:
            for outer in contents(self.path, wanted=lambda name: self._wanted(name) is not None):
                yield self._wanted(outer[0].name), self.path, outer
