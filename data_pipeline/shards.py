"""WebDataset shards: how ours are written, their index, and how the samples of any shard are found.

Our shard is a USTAR archive in which each sample is two members, KEY.cls (the label, fixed-width ASCII) and KEY.jpg.
The index next to it is the one that `wds2idx` would write: `v1.2 COUNT`, then per sample `ext offset size name ...`.
Samples are found by WebDataset's conventions, as DALI's `wds2idx` and webdataset find them.
"""

import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from data_pipeline.archive import Entry
from data_pipeline.errors import printable

BLOCK = 512
CLS_WIDTH = 5
_PERMISSIONS = 0o644
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
STRAY = "belongs to no sample: it is hidden or has no extension"
"""Why a member of a shard is left out that `samples_of` puts among the strays."""
_MAX_LABEL_DIGITS, _MAX_NAME = 5, 200


def sample_bytes(length: int) -> int:
    """Return how many bytes of a shard a sample takes whose JPEG has `length` bytes."""
    return 3 * BLOCK + -(-length // BLOCK) * BLOCK


def write_shard(out: BinaryIO, samples: Iterable[tuple[str, int, bytes]]) -> None:
    """Write samples (key, label, JPEG) to an open file."""
    from webdataset.writer import TarWriter  # type: ignore[import-untyped]  # noqa: PLC0415  (slow to import)

    # Fixed times and owners: the same input gives the same bytes.
    with TarWriter(out, user="", group="", mode=_PERMISSIONS, mtime=0, encoder=False) as writer:
        for key, label, jpeg in samples:
            writer.write({"__key__": key, "cls": b"%0*d" % (CLS_WIDTH, label), "jpg": jpeg})


def header_at(shard: BinaryIO, offset: int) -> tarfile.TarInfo | None:
    """Return the header of the member whose data begin at `offset`, or None when there is none before it."""
    if offset < BLOCK:
        return None
    shard.seek(offset - BLOCK)
    try:
        return tarfile.TarInfo.frombuf(shard.read(BLOCK), "utf-8", "replace")
    except tarfile.HeaderError:
        return None


def is_image(member: Entry) -> bool:
    """Whether a member's name ends as an image's does; "image.jpg" is an extension as well."""
    return member.extension.lower().rpartition(".")[2] in IMAGE_EXTENSIONS


@dataclass
class Sample:
    """Consecutive members that share a key."""

    key: str
    members: list[Entry] = field(default_factory=list)
    repeated: bool = False
    """Whether the key stood before, with other members between."""

    def member(self, extension: str) -> Entry | None:
        """Return the only member with this extension, or None when there is none or more than one."""
        found = [m for m in self.members if m.extension.lower() == extension]
        return found[0] if len(found) == 1 else None

    def incomplete(self) -> str:
        """Say what it holds in place of one image and one label."""
        return "needs one image and one label: has " + ", ".join(m.name for m in self.members)

    def image(self) -> Entry | str:
        """Return the member that is the image, or why there is not exactly one."""
        if self.repeated:
            return "its members are not adjacent"
        found = [m for m in self.members if is_image(m)]
        if len(found) != 1:
            return self.incomplete()
        return found[0].unusable or found[0]


@dataclass(frozen=True)
class Labels:
    """How the class of a sample is found.

    Args:
        key: the field of the `json` member that holds it; None looks into `cls`, then `json` ("label"), then `txt`.
        classes: class id of each name; None takes numbers, and what names `cls` and `json` hold.
    """

    key: str | None = None
    classes: Mapping[str, str] | None = None

    def of(self, sample: Sample, contents: dict[str, bytes]) -> tuple[str, str]:
        """Return the class id and '', or '' and the reason why there is none.

        Args:
            sample: the sample.
            contents: the bytes of its members `cls`, `json` and `txt`, by extension.
        """
        if self.key is None and "cls" in contents:
            return self._class_of(_text(contents["cls"]), named=True)
        if "json" in contents:
            try:
                value = json.loads(contents["json"])
                for part in (self.key or "label").split("."):
                    value = value[part]
            except (ValueError, LookupError, TypeError, RecursionError):
                if self.key is not None or "txt" not in contents:
                    return "", f"its json member has no such field: {self.key or 'label'}"
            else:
                return self._class_of(printable(str(value)), named=isinstance(value, str))
        if self.key is None and "txt" in contents:
            return self._class_of(_text(contents["txt"]), named=False)
        return "", sample.incomplete()

    def _class_of(self, text: str, *, named: bool) -> tuple[str, str]:
        is_number = text.isascii() and text.isdigit() and len(text) <= _MAX_LABEL_DIGITS
        if self.classes is not None:
            if text in self.classes:
                return self.classes[text], ""
            if is_number and int(text) < len(self.classes):
                return str(int(text)), ""
            return "", f"its label is not in the list of classes: {text[:40]!r}"
        if is_number:
            return str(int(text)), ""
        is_name = (
            text.isprintable() and 0 < len(text) <= _MAX_NAME and not text.lstrip("+-").replace(".", "", 1).isdigit()
        )
        if named and is_name:
            return text, ""
        return "", f"its label is no number of at most {_MAX_LABEL_DIGITS} digits and no short name: {text[:40]!r}"


def _text(data: bytes) -> str:
    return data.strip().decode("utf-8", "backslashreplace")


def samples_of(members: Iterable[Entry], strays: list[str]) -> Iterator[Sample]:
    """Yield the samples of a shard in their order; append the names that belong to none to `strays`."""
    seen: set[str] = set()
    sample = None
    for entry in members:
        stem, dot, extension = entry.name.rpartition("/")[2].partition(".")
        if not stem or not dot:
            strays.append(entry.name)
            continue
        key = entry.name[: len(entry.name) - len(extension) - 1]
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key, repeated=key in seen)
            seen.add(key)
        sample.members.append(entry)
    if sample is not None:
        yield sample


def index_text(samples: Iterable[Sample]) -> str:
    """Return the text of a shard's index."""
    rows = [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in sample.members) for sample in samples]
    return "\n".join([f"v1.2 {len(rows)}", *rows, ""])
