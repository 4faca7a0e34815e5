"""Read tar archives without unpacking them, and notice when a part of one is missing.

Python's tarfile ends quietly at a damaged header that is not the first, and so does its reader of streams; what
follows is lost. Here every header must be intact, the last member must be followed by the two end-of-archive blocks,
and only zeros may follow those.
"""

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from data_pipeline.acceptance import Rejected
from data_pipeline.errors import DataError, StorageError, printable

_CHUNK = 2**20
_DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_KINDS = {
    tarfile.LNKTYPE: "a hard link, which holds no data",
    tarfile.SYMTYPE: "a symbolic link, which holds no data",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file, which is not stored as it is read",
}


@dataclass(frozen=True)
class Entry:
    """A member of an archive that is not a folder; offset and size in bytes, counted in the (decompressed) file."""

    name: str
    """Bytes that are not UTF-8 are escaped."""
    offset: int
    size: int
    unusable: str = ""
    """Why its bytes cannot be used, as for a link; '' for a plain file."""

    @property
    def extension(self) -> str:
        """What follows the first dot of the file's name, as WebDataset has it."""
        return self.name.rpartition("/")[2].partition(".")[2]


@dataclass(frozen=True)
class Extent:
    """An image's bytes inside a file, to be read by whichever worker gets it."""

    path: str
    offset: int
    length: int

    def read(self) -> bytes:
        """Read the bytes; StorageError when the file has vanished, is unreadable or has become shorter."""
        try:
            with open(self.path, "rb") as stream:  # noqa: PTH123  (a path of 14 M images is kept as text)
                stream.seek(self.offset)
                data = stream.read(self.length)
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be read ({error.strerror}); make it readable and build again"
            ) from None
        if len(data) != self.length:
            raise StorageError(f"{self.path} ended early: it changed while it was read; build again when it is at rest")
        return data


Content = Extent | bytes | Rejected
"""Where an image's bytes are, the bytes themselves where they can only be read once through, or why it has none."""


class _DamagedError(Exception):
    """Not a TarError, so that tarfile does not swallow it."""


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) == tarfile.BLOCKSIZE and not any(buf):
            return super().frombuf(buf, encoding, errors)  # an end-of-archive block: tarfile ends here
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise _DamagedError("it ends without its end-of-archive blocks" if not buf else str(error)) from None
        if header.size < 0:  # tarfile would loop forever
            raise _DamagedError("a negative size")
        return header


class _Part:
    """A part of a file, as a file: tarfile must not read beyond an archive inside another."""

    def __init__(self, stream: IO[bytes], start: int, end: int) -> None:
        self._stream, self._start, self._end = stream, start, end
        stream.seek(start)

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._end - self._stream.tell())
        return self._stream.read(left if size < 0 else min(size, left))

    def seek(self, offset: int) -> None:
        self._stream.seek(self._start + offset)

    def tell(self) -> int:
        return self._stream.tell() - self._start


def is_compressed(path: Path) -> bool:
    """Whether the file begins as a gzip, bzip2 or xz file does."""
    with _opened(path) as (_, compressed):
        return compressed


def entries(path: Path) -> Iterator[Entry]:
    """Yield the members of an archive that are not folders; of a plain one only the headers are read.

    Raises:
        DataError: the archive is damaged or incomplete.
        StorageError: it cannot be read.
    """
    return (entry for entry, _ in contents(path, wanted=lambda _: False))


def contents(
    path: Path, inside: tuple[Entry, Content] | None = None, wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[Entry, Content]]:
    """Yield the members of an archive that are not folders, each with its content: an Extent in a plain archive.

    Args:
        path: the file; if it is compressed, it is read through.
        inside: what this function yielded for the member of the file that is itself the archive to be read.
        wanted: whether the bytes of a compressed archive's member of this name are read; others have none.

    Raises:
        DataError: the archive is damaged or incomplete.
        StorageError: it cannot be read.
    """
    outer = None if inside is None else inside[1]
    with _reported(path, inside), _opened(path) as (stream, compressed):
        if isinstance(outer, Rejected):
            raise _DamagedError(outer.reason)
        if isinstance(outer, bytes):
            for entry, _ in _members(io.BytesIO(outer), 0, streamed=False):
                yield entry, _content(entry, outer[entry.offset : entry.offset + entry.size])
        elif compressed:
            for entry, read in _members(stream, 0, streamed=True):
                yield entry, _content(entry, read() if not entry.unusable and wanted(entry.name) else b"")
        else:
            start, size = (outer.offset, outer.length) if isinstance(outer, Extent) else (0, path.stat().st_size)
            for entry, _ in _members(_Part(stream, start, start + size), start, streamed=False):
                yield entry, _content(entry, Extent(str(path), entry.offset, entry.size))


def _content(entry: Entry, content: Content) -> Content:
    return Rejected(entry.unusable) if entry.unusable else content


def _members(stream: Any, start: int, *, streamed: bool) -> Iterator[tuple[Entry, Callable[[], bytes]]]:
    """Yield each member with a function that reads its bytes before the next one is asked for."""
    archive = None
    try:
        archive = tarfile.open(fileobj=stream, mode="r|" if streamed else "r:", tarinfo=_Header)  # noqa: SIM115
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # or it keeps every header in memory
            if info.size < 0 or not info.name:
                raise _DamagedError("a header without a name or with a negative size")
            if info.isdir():
                continue
            sparse = tarfile.GNUTYPE_SPARSE if info.sparse is not None else info.type
            unusable = _KINDS.get(sparse, "" if info.isreg() else "of a kind that holds no data")
            entry = Entry(printable(info.name), start + info.offset_data, info.size, unusable)

            def read(member: tarfile.TarInfo = info) -> bytes:
                data = archive.extractfile(member).read()  # type: ignore[union-attr]
                if len(data) != member.size:
                    raise _DamagedError(f"it ends inside {printable(member.name)}")
                return data

            yield entry, read
        _check_end(archive, stream, streamed=streamed)
    except (_DamagedError, tarfile.TarError, ValueError, LookupError, TypeError, OverflowError) as error:
        place = 0 if archive is None else archive.offset
        raise _DamagedError(f"{error}, at byte {start + place}") from None


def _check_end(archive: tarfile.TarFile, stream: Any, *, streamed: bool) -> None:
    """Raise unless the members are followed by two blocks of zeros, and by nothing but zeros."""
    source = archive.fileobj if streamed else stream
    if streamed:
        zeros = tarfile.BLOCKSIZE  # tarfile has read the first of the two blocks
    else:
        stream.seek(archive.offset)
        zeros = 0
    while chunk := source.read(_CHUNK):
        if any(chunk):
            raise _DamagedError("data follow its end, as in two archives that were joined")
        zeros += len(chunk)
    if zeros < 2 * tarfile.BLOCKSIZE:
        raise _DamagedError("it ends without its end-of-archive blocks")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, bool]]:
    """Give a stream of the decompressed file, and whether it is compressed."""
    with path.open("rb") as stream:
        begin = stream.read(8)
        stream.seek(0)
        opener = next((opener for magic, opener in _DECOMPRESSORS.items() if begin.startswith(magic)), None)
        if opener is None:
            yield stream, False
            return
        with opener(stream, "rb") as decompressed:
            yield decompressed, True


@contextmanager
def _reported(path: Path, inside: tuple[Entry, Content] | None) -> Iterator[None]:
    """Turn what goes wrong while an archive is read into one line."""
    what = f"{inside[0].name} in {path}" if inside is not None else str(path)
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path or copy it here") from None
    except (_DamagedError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{what} is not an intact tar archive ({error}); copy or download it again") from None
    except OSError as error:
        if error.errno is None:  # of a decompressor
            raise DataError(f"{what} is not an intact archive ({error}); copy or download it again") from None
        raise StorageError(f"{path} cannot be read ({error.strerror or error}); fix it and run again") from None
