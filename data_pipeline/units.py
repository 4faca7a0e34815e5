"""The first half of building: images, checked and normalized, in sorted runs on disk.

Building is an external merge sort by a random key, so that a shuffle of all images needs little memory:
the source is cut into units of at most UNIT_IMAGES images or UNIT_BYTES bytes; a worker decodes the images of one
unit, sorts them by key and writes them to scratch. `data_pipeline.assemble` then merges all units into shards.
A unit is complete when its .npz exists, so an interrupted build resumes after the last complete unit.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.acceptance import Rejected, normalize
from data_pipeline.archive import Extent
from data_pipeline.files import replacing, write_atomically
from data_pipeline.sources import SourceImage

SHUFFLE_SEED = 0
UNIT_IMAGES = 4096
UNIT_BYTES = 256 * 2**20
_NAME_BYTES = 48  # of the original name, kept in the shard's member names so that a user can find the image again


@dataclass(frozen=True)
class Job:
    """One unit to be made."""

    number: int
    images: tuple[SourceImage, ...]
    scratch: Path
    max_side: int | None

    @property
    def path(self) -> Path:
        """The unit's table; its images are next to it."""
        return self.scratch / f"unit-{self.number:06d}.npz"

    def digest(self) -> str:
        """Identify the images that the unit is made of."""
        total = hashlib.sha256()
        for image in self.images:
            total.update(f"{image.name}\0{image.class_id}\0{_size(image)}\n".encode())
        return total.hexdigest()


def made(job: Job) -> int | None:
    """Return how many images the unit holds if an earlier build has made it, from the same images."""
    if not job.path.exists():
        return None
    with np.load(job.path) as table:
        return len(table["key"]) if str(table["digest"]) == job.digest() else None


def cut(images: Iterable[SourceImage], scratch: Path, max_side: int | None) -> Iterator[Job]:
    """Group a source's images into units."""
    group: list[SourceImage] = []
    size = number = 0
    for image in images:
        group.append(image)
        size += _size(image)
        if len(group) == UNIT_IMAGES or size >= UNIT_BYTES:
            yield Job(number, tuple(group), scratch, max_side)
            group, size, number = [], 0, number + 1
    if group:
        yield Job(number, tuple(group), scratch, max_side)


def _size(image: SourceImage) -> int:
    if isinstance(image.data, Rejected):
        return 0
    return image.data.length if isinstance(image.data, Extent) else len(image.data)


def make(job: Job) -> int:
    """Make one unit and return how many images it holds."""
    kept, rejected = [], []
    for image in job.images:
        data = image.data.read() if isinstance(image.data, Extent) else image.data
        result = data if isinstance(data, Rejected) else normalize(data, job.max_side)
        if isinstance(result, Rejected):
            rejected.append({"name": image.name, "reason": result.reason})
        else:
            kept.append((_key(image.name), image, result))
    kept.sort(key=lambda entry: entry[:1])
    job.path.unlink(missing_ok=True)  # an older one is of other images
    # On the disk before the table, also when the power fails.
    with replacing(job.path.with_suffix(".bin")) as out:
        out.writelines(result.jpeg for _, _, result in kept)
    # Also of images that cannot be used, so that a class of such images only is seen to have none.
    classes = sorted({image.class_id for image in job.images if image.class_id})
    number_of = {class_id: number for number, class_id in enumerate(classes)}
    with replacing(job.path) as out:
        np.savez(
            out,
            allow_pickle=False,
            digest=job.digest(),
            key=np.array([key for key, _, _ in kept], np.uint64),
            name=np.array([_short(image.name) for _, image, _ in kept], f"S{_NAME_BYTES}"),
            class_ids=np.array(classes, str),
            class_number=np.array([number_of[image.class_id] for _, image, _ in kept], np.int32),
            length=np.array([len(result.jpeg) for _, _, result in kept], np.int32),
            width=np.array([result.width for _, _, result in kept], np.uint16),
            height=np.array([result.height for _, _, result in kept], np.uint16),
            crc32=np.array([zlib.crc32(result.jpeg) for _, _, result in kept], np.uint32),
        )
        # Before the table, whose presence means that the unit is complete.
        write_atomically(job.path.with_suffix(".rejected.json"), json.dumps(rejected).encode())
    return len(kept)


def _key(name: str) -> int:
    """Return the position of an image in the shuffled order: a hash, so independent of how the source is cut."""
    key = SHUFFLE_SEED.to_bytes(8, "little")
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")


def _short(name: str) -> bytes:
    """Return the end of the name's stem in the characters that every tar tool agrees on; dots would end a key."""
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in stem).encode()[-_NAME_BYTES:]
