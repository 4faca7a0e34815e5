"""Finding the samples of a shard by WebDataset's conventions, as DALI's `wds2idx` and webdataset find them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from data_pipeline.archive import Entry
from data_pipeline.errors import printable

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
STRAY = "belongs to no sample: it is hidden or has no extension"
"""Why a member of a shard is left out that `samples_of` puts among the strays."""
_MAX_LABEL_DIGITS, _MAX_NAME = 5, 200


@dataclass(frozen=True)
class Member:
    """One file of a sample; offset and size in bytes."""

    extension: str
    offset: int
    size: int
    name: str
    unusable: str = ""

    @property
    def is_image(self) -> bool:
        """Whether its name ends as an image's does; "image.jpg" is one as well."""
        return self.extension.lower().rpartition(".")[2] in IMAGE_EXTENSIONS


@dataclass
class Sample:
    """Consecutive members that share a key."""

    key: str
    members: list[Member] = field(default_factory=list)
    repeated: bool = False
    """Whether the key stood before, with other members between."""

    @property
    def line(self) -> str:
        """The sample's line in the index."""
        return " ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in self.members)

    def member(self, extension: str) -> Member | None:
        """Return the only member with this extension, or None when there is none or more than one."""
        found = [m for m in self.members if m.extension.lower() == extension]
        return found[0] if len(found) == 1 else None

    def incomplete(self) -> str:
        """Say what it holds in place of one image and one label."""
        return "needs one image and one label: has " + ", ".join(m.name for m in self.members)

    def image(self) -> Member | str:
        """Return the member that is the image, or why there is not exactly one."""
        if self.repeated:
            return "its members are not adjacent"
        found = [m for m in self.members if m.is_image]
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
        sample.members.append(Member(extension, entry.offset, entry.size, entry.name, entry.unusable))
    if sample is not None:
        yield sample
