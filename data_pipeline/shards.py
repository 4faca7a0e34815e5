"""WebDataset shards: how ours are written, their index, and how the samples of any shard are found.

Our shard is a USTAR archive in which each sample is two members, KEY.cls (the label, fixed-width ASCII) and KEY.jpg.
The index next to it is the one that `wds2idx` would write: `v1.2 COUNT`, then per sample `ext offset size name ...`.
Samples are found by WebDataset's conventions, as DALI's `wds2idx` and webdataset find them.
"""

import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data_pipeline.acceptance import Rejected
from data_pipeline.archive import Member, is_compressed, members
from data_pipeline.errors import printable, reading

BLOCK = 512
CLS_WIDTH = 5
_PERMISSIONS = 0o644
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
LABEL_MEMBERS = ("cls", "json", "txt")
STRAY = "belongs to no sample: it is hidden or has no extension"
REPEATED = "its members are not adjacent"
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


def is_image(member: Member) -> bool:
    """Whether a member's name ends as an image's does; "image.jpg" is an extension as well."""
    return member.extension.lower().rpartition(".")[2] in IMAGE_EXTENSIONS


@dataclass
class Sample:
    """Consecutive members that share a key."""

    key: str
    members: list[Member] = field(default_factory=list)
    fault: str = ""
    """Why it is no sample, whatever it holds: STRAY or REPEATED."""

    def member(self, extension: str) -> Member | None:
        """Return the only member with this extension, or None when there is none or more than one."""
        found = [m for m in self.members if m.extension.lower() == extension]
        return found[0] if len(found) == 1 else None

    def incomplete(self) -> Rejected:
        """Say what it holds in place of one image and one label."""
        return Rejected("needs one image and one label: has " + ", ".join(m.name for m in self.members))

    def image(self) -> Member | Rejected:
        """Return the member that is the image, or why there is not exactly one."""
        if self.fault:
            return Rejected(self.fault)
        found = [m for m in self.members if is_image(m)]
        if len(found) != 1:
            return self.incomplete()
        return found[0].content if isinstance(found[0].content, Rejected) else found[0]


@dataclass(frozen=True)
class Labels:
    """How the class of a sample is found.

    Args:
        key: the field of the `json` member that holds it; None looks into `cls`, then `json` ("label"), then `txt`.
        classes: class id of each name; None takes numbers, and what names `cls` and `json` hold.
    """

    key: str | None = None
    classes: Mapping[str, str] | None = None

    def of(self, sample: Sample, extensions: Sequence[str] = LABEL_MEMBERS) -> str | Rejected:
        """Return the class id, or the reason why there is none; only members with these extensions are looked into."""
        found = {}
        for extension in extensions:
            member = sample.member(extension)
            if member is not None and isinstance(member.content, bytes):
                found[extension] = member.content
        if self.key is None and "cls" in found:
            return self._class_of(_text(found["cls"]), named=True)
        if "json" in found:
            try:
                value = json.loads(found["json"])
                for part in (self.key or "label").split("."):
                    value = value[part]
            except (ValueError, LookupError, TypeError, RecursionError):
                if self.key is not None or "txt" not in found:
                    return Rejected(f"its json member has no such field: {self.key or 'label'}")
            else:
                return self._class_of(printable(str(value)), named=isinstance(value, str))
        if self.key is None and "txt" in found:
            return self._class_of(_text(found["txt"]), named=False)
        return sample.incomplete()

    def _class_of(self, text: str, *, named: bool) -> str | Rejected:
        is_number = text.isascii() and text.isdigit() and len(text) <= _MAX_LABEL_DIGITS
        if self.classes is not None:
            if text in self.classes:
                return self.classes[text]
            if is_number and int(text) < len(self.classes):
                return str(int(text))
            return Rejected(f"its label is not in the list of classes: {text[:40]!r}")
        if is_number:
            return str(int(text))
        is_name = (
            text.isprintable() and 0 < len(text) <= _MAX_NAME and not text.lstrip("+-").replace(".", "", 1).isdigit()
        )
        if named and is_name:
            return text
        return Rejected(
            f"its label is no number of at most {_MAX_LABEL_DIGITS} digits and no short name: {text[:40]!r}"
        )


def _text(data: bytes) -> str:
    return data.strip().decode("utf-8", "backslashreplace")


def samples_in(path: Path) -> Iterator[Sample]:
    """Yield the samples of a shard; labels are read, and of a compressed shard images as well."""
    with reading(path):
        compressed = is_compressed(path)
    yield from samples_of(members(path, inline=lambda name: compressed or name.lower().endswith(LABEL_MEMBERS)))


def samples_of(members: Iterable[Member]) -> Iterator[Sample]:
    """Yield the samples of a shard in their order; a member that belongs to none is yielded with that as its fault."""
    seen: set[str] = set()
    sample = None
    for member in members:
        stem, dot, extension = member.name.rpartition("/")[2].partition(".")
        if not stem or not dot:
            yield Sample(member.name, [member], STRAY)
            continue
        key = member.name[: len(member.name) - len(extension) - 1]
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key, fault=REPEATED if key in seen else "")
            seen.add(key)
        sample.members.append(member)
    if sample is not None:
        yield sample


def index_text(samples: Iterable[Sample]) -> str:
    """Return the text of a shard's index."""
    found = (sample.members for sample in samples if sample.fault != STRAY)
    rows = [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in members) for members in found]
    return "\n".join([f"v1.2 {len(rows)}", *rows, ""])
