"""Finding the samples of a shard that is already written, as DALI's `wds2idx` finds them."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.archive import entries


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
    """Return the samples of a shard in their order; DataError when the file is not a whole tar archive."""
    samples: list[Sample] = []
    for entry in entries(path):
        stem, dot, extension = entry.name.rpartition("/")[2].partition(".")
        if not stem or not dot:
            continue  # hidden files, and files that belong to no sample
        key = entry.name[: len(entry.name) - len(extension) - 1]
        member = Member(extension, entry.offset, entry.size, entry.name)
        if samples and samples[-1].key == key:
            samples[-1] = Sample(key, (*samples[-1].members, member))
        else:
            samples.append(Sample(key, (member,)))
    return samples
