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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from data_pipeline.acceptance import Rejected
from data_pipeline.errors import DataError, StorageError, printable, reading

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
class Extent:
    """An image's bytes inside a file, to be read by whichever worker gets it."""

    path: str
    offset: int
    length: int

    def read(self, opened: IO[bytes] | None = None) -> bytes:
        """Read the bytes, of the file that is ``opened`` or of its own.

        Raises:
            StorageError: the file has vanished, is unreadable or has become shorter.
        """
        with reading(self.path), self._stream(opened) as stream:
            stream.seek(self.offset)
            data = stream.read(self.length)
        if len(data) != self.length:
            raise StorageError(f"{self.path} ended early: it changed while it was read; build again when it is at rest")
        return data

    def _stream(self, opened: IO[bytes] | None) -> AbstractContextManager[IO[bytes]]:
        return open(self.path, "rb") if opened is None else nullcontext(opened)  # noqa: PTH123  (of 14 M images)


Content = Extent | bytes | Rejected
"""Where an image's bytes are, the bytes themselves where they can only be read once through, or why it has none."""


@dataclass(frozen=True)
class Member:
    """A member of an archive that is not a folder; offset and size in bytes, counted in the (decompressed) file."""

    name: str
    """Bytes that are not UTF-8 are escaped."""
    offset: int
    size: int
    content: Content

    @property
    def extension(self) -> str:
        """What follows the first dot of the file's name, as WebDataset has it."""
        return self.name.rpartition("/")[2].partition(".")[2]


class _DamagedError(Exception):
    """Not a TarError, so that tarfile does not swallow it."""


_DAMAGES = (
    _DamagedError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, LookupError, TypeError,
    OverflowError,
)  # fmt: skip
"""What tarfile and the decompressors raise on damaged files, besides OSErrors without a number."""


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

    def _proc_pax(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type == tarfile.XGLTYPE:
            return super()._proc_pax(archive)  # type: ignore[misc]  # not in its stubs
        common, archive.pax_headers = archive.pax_headers, {}  # tarfile would add those of all members
        member: tarfile.TarInfo = super()._proc_pax(archive)  # type: ignore[misc]
        archive.pax_headers = common
        if not member.pax_headers:  # as where zeros took the place of a name: the short name would be taken for it
            raise _DamagedError("an extended header without a record")
        return member


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


def headers_only(_: str) -> bool:
    """Read no member's bytes: an `inline` of `members`."""
    return False


def members(path: Path, inside: Member | None = None, inline: Callable[[str], bool] | None = None) -> Iterator[Member]:
    """Yield the members of an archive that are not folders.

    Args:
        path: the file; if it is compressed, it is read through.
        inside: the member of the file that is itself the archive to be read.
        inline: whether the bytes of a member of this name are read at once. Others are an Extent of a plain archive,
            and b"" in a compressed one. None reads all of a compressed archive.

    Raises:
        DataError: the archive is damaged or incomplete.
        StorageError: it cannot be read.
    """
    what = str(path) if inside is None else f"{inside.name} in {path}"
    start, archive = 0, None
    try:
        with _opened(path) as (file, compressed):
            stream, streamed = file, compressed and inside is None
            if inside is not None:
                if isinstance(inside.content, Rejected):
                    raise _DamagedError(inside.content.reason)
                if isinstance(inside.content, bytes):
                    stream = io.BytesIO(inside.content)
                else:
                    start = inside.offset
                    stream = _Part(file, start, start + inside.size)
            archive = tarfile.open(fileobj=stream, mode="r|" if streamed else "r:", tarinfo=_Header)  # noqa: SIM115
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # or it keeps every header in memory
                if info.size < 0 or not info.name:
                    raise _DamagedError("a header without a name or with a negative size")
                if not info.isdir():
                    name, offset = printable(info.name), start + info.offset_data
                    content: Content = b"" if compressed else Extent(str(path), offset, info.size)
                    if unusable := _unusable(info):
                        content = Rejected(unusable)
                    elif compressed if inline is None else inline(name):
                        content = _bytes(archive, info)
                    yield Member(name, offset, info.size, content)
            _check_end(archive, stream, streamed=streamed)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path or copy it here") from None
    except (OSError, *_DAMAGES) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(f"{path} cannot be read ({error.strerror or error}); fix it and run again") from None
        at = "" if archive is None else f", at byte {start + archive.offset}"
        raise DataError(f"{what} is not an intact tar archive ({error}{at}); copy or download it again") from None


def _unusable(info: tarfile.TarInfo) -> str:
    """Say why a member's bytes cannot be used, as of a link; '' for a plain file."""
    kind = tarfile.GNUTYPE_SPARSE if info.sparse is not None else info.type
    return _KINDS.get(kind, "" if info.isreg() else "of a kind that holds no data")


def _bytes(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    data = archive.extractfile(info).read()  # type: ignore[union-attr]
    if len(data) != info.size:
        raise _DamagedError(f"it ends inside {printable(info.name)}")
    return data


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
