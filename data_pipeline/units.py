"""The first half of building: images, checked and normalized, in sorted runs on disk.

Building is an external merge sort by a random key, so that a shuffle of all images needs little memory:
the source is cut into units of at most UNIT_IMAGES images or UNIT_BYTES bytes; a worker decodes the images of one
unit, sorts them by key and writes them to scratch. `data_pipeline.assemble` then merges all units into shards.
"""

import hashlib
import sys
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, BaseModel

from data_pipeline.acceptance import Rejected, normalize
from data_pipeline.archive import Extent
from data_pipeline.files import replacing
from data_pipeline.manifest import Reject
from data_pipeline.sources import SourceImage
from data_pipeline.workers import Job

SHUFFLE_SEED = 0
UNIT_IMAGES = 4096
UNIT_BYTES = 256 * 2**20
_NAME_BYTES = 48  # of the original name, kept in the shard's member names so that a user can find the image again


class Unit(BaseModel):
    """What a unit holds."""

    images: int
    class_ids: list[Annotated[str, AfterValidator(sys.intern)]]
    """In the order of the table's class numbers; also of images that cannot be used, so that a class of such images
    only is seen to have none."""
    rejected: list[Reject]


def cut(images: Iterable[SourceImage], scratch: Path, max_side: int | None) -> Iterator[Job[Unit]]:
    """Group a source's images into units to be made."""
    group: list[SourceImage] = []
    size = number = 0

    def job() -> Job[Unit]:
        path = scratch / f"unit-{number:06d}"
        listed = "".join(f"{image.name}\0{image.class_id}\0{_size(image)}\n" for image in group)
        digest = hashlib.sha256(listed.encode()).hexdigest()
        return Job(path, len(group), digest, partial(make, path, tuple(group), max_side), Unit)

    for image in images:
        group.append(image)
        size += _size(image)
        if len(group) == UNIT_IMAGES or size >= UNIT_BYTES:
            yield job()
            group, size, number = [], 0, number + 1
    if group:
        yield job()


def _size(image: SourceImage) -> int:
    if isinstance(image.data, Rejected):
        return 0
    return image.data.length if isinstance(image.data, Extent) else len(image.data)


def make(path: Path, images: tuple[SourceImage, ...], max_side: int | None) -> Unit:
    """Write the images of one unit (PATH.bin) and its table (PATH.npz)."""
    kept, rejected = [], []
    for image in images:
        data = image.data.read() if isinstance(image.data, Extent) else image.data
        result = data if isinstance(data, Rejected) else normalize(data, max_side)
        if isinstance(result, Rejected):
            rejected.append(Reject(name=image.name, reason=result.reason))
        else:
            kept.append((_key(image.name), image, result))
    kept.sort(key=lambda entry: entry[:1])
    class_ids = sorted({image.class_id for image in images if image.class_id})
    number_of = {class_id: number for number, class_id in enumerate(class_ids)}
    with replacing(path.with_suffix(".bin")) as out:
        out.writelines(result.jpeg for _, _, result in kept)
    with replacing(path.with_suffix(".npz")) as out:
        np.savez(
            out,
            allow_pickle=False,
            key=np.array([key for key, _, _ in kept], np.uint64),
            name=np.array([_short(image.name) for _, image, _ in kept], f"S{_NAME_BYTES}"),
            class_number=np.array([number_of[image.class_id] for _, image, _ in kept], np.int32),
            length=np.array([len(result.jpeg) for _, _, result in kept], np.int32),
            width=np.array([result.width for _, _, result in kept], np.uint16),
            height=np.array([result.height for _, _, result in kept], np.uint16),
            crc32=np.array([zlib.crc32(result.jpeg) for _, _, result in kept], np.uint32),
        )
    return Unit(images=len(kept), class_ids=class_ids, rejected=rejected)


def _key(name: str) -> int:
    """Return the position of an image in the shuffled order: a hash, so independent of how the source is cut."""
    key = SHUFFLE_SEED.to_bytes(8, "little")
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")


def _short(name: str) -> bytes:
    """Return the end of the name's stem in the characters that every tar tool agrees on; dots would end a key."""
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in stem).encode()[-_NAME_BYTES:]
