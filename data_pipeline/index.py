"""Finding the samples of a shard that is already written, as DALI's `wds2idx` finds them."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError


@dataclass(frozen=True)
class Member:
    """One file of a sample; offset and size in bytes."""

    extension: str
    offset: int
    size: int
    name: str


@dataclass(frozen=True)
class Sample:
    """Consecutive members that share a key."""

    key: str
    members: tuple[Member, ...]

    @property
    def line(self) -> str:
        """The sample's line in the index."""
        return " ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in self.members)

    def member(self, *extensions: str) -> Member | None:
        """Return the only member with one of these extensions, or None when there is none or more than one."""
        found = [m for m in self.members if m.extension.lower() in extensions]
        return found[0] if len(found) == 1 else None


def scan(path: Path) -> list[Sample]:
    """Return the samples of a shard in their order.

    Raises:
        DataError: the file is not a whole tar archive.
    """
    samples: list[Sample] = []
    try:
        for member in _members(path):
            stem, dot, extension = member.name.rpartition("/")[2].partition(".")
            if not stem or not dot:
                continue  # hidden files, and files that belong to no sample
            key = member.name[: len(member.name) - len(extension) - 1]
            if samples and samples[-1].key == key:
                samples[-1] = Sample(key, (*samples[-1].members, _with(member, extension)))
            else:
                samples.append(Sample(key, (_with(member, extension),)))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"{path} is not a whole tar archive ({error}); copy it again or build the dataset again"
        ) from None
    return samples


def _with(member: Member, extension: str) -> Member:
    return Member(extension, member.offset, member.size, member.name)


def _members(path: Path) -> Iterator[Member]:
    size = path.stat().st_size
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # or it keeps every header in memory
            if info.offset_data + info.size > size:
                raise EOFError(f"it ends inside {info.name}")
            if info.isreg():
                yield Member("", info.offset_data, info.size, info.name)
