"""The errors that the data pipeline reports to a user, in one line each."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_USER = re.compile(r"(?<=://)[^/?#\s'\"<>]*@")
_QUERY = re.compile(r"(://[^?\s'\"<>]*)\?[^\s'\"<>]*?(?=[);,:.]*(?:[\s'\"<>]|$))")


class DataError(Exception):
    """Something about the data is wrong and will be wrong again when it is tried again.

    The message is one line that says what is wrong, where, and what to do. Names that are not UTF-8 are escaped in it,
    and URLs lose what may be a secret.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(without_secrets(" ".join(message.split()))))


class StorageError(DataError):
    """Storage or network failed, not the data: another start may succeed."""


_LASTING = frozenset(
    {
        errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
        errno.EINVAL, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
    }
)  # fmt: skip


def is_lasting(error: OSError) -> bool:
    """Whether an error of the operating system stays until a user changes something; EIO, ESTALE and others may pass.

    File systems of fsspec raise the two classes without a number.
    """
    return isinstance(error, FileNotFoundError | PermissionError) or error.errno in _LASTING


def storage_error(error: OSError, message: str) -> DataError:
    """Return what to raise in place of an error of the operating system: a StorageError where it may pass."""
    return (DataError if is_lasting(error) else StorageError)(message)


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Report that a file of the source cannot be read, whether it stays so or may pass."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}); make it readable and build again") from None


def printable(text: str) -> str:
    """Escape what is not UTF-8, such as bytes of a file name, and control characters, which a terminal would obey."""
    if text.isprintable():
        return text
    encoded = text.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", encoded)


def without_secrets(content: Any) -> Any:
    """Remove user information and queries, which may hold signatures and tokens, from all URLs of a text.

    Dictionaries, lists and tuples are searched through; all else is returned as it is.
    """
    if isinstance(content, str):
        return _QUERY.sub(r"\1", _USER.sub("", content)) if "://" in content else content
    if isinstance(content, dict):
        return {key: without_secrets(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(without_secrets, content))
    return content
