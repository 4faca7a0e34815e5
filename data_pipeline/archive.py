"""Finding the members of tar archives without unpacking them, also of an archive inside another."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError


@dataclass(frozen=True)
class Entry:
    """A plain file in an archive; offset and size in bytes, counted in the outermost file."""

    name: str
    offset: int
    size: int


def entries(path: Path, start: int = 0, end: int | None = None) -> Iterator[Entry]:
    """Yield the plain files of an uncompressed archive, reading their headers only.

    Args:
        path: the file.
        start: where in the file the archive begins.
        end: where it ends at the latest; None is the end of the file.

    Raises:
        DataError: the archive is damaged, ends early or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            limit = path.stat().st_size if end is None else end
            stream.seek(start)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for info in archive:
                    archive.members = []  # type: ignore[attr-defined]  # or it keeps every header in memory
                    if info.offset_data + info.size > limit:
                        raise EOFError(f"it ends inside {info.name}")
                    if info.isreg():
                        yield Entry(info.name, info.offset_data, info.size)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path or copy it here") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} is not a whole tar archive ({error}); copy it again") from None
