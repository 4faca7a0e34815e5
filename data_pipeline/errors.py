"""The errors that the data pipeline reports to a user, in one line each."""


class DataError(Exception):
    """Something about the data is wrong and will be wrong again when it is tried again.

    The message is one line that says what is wrong, where, and what to do. Names that are not UTF-8 are escaped in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


class StorageError(DataError):
    """What storage does not give now and may give later: the same command, run again, goes on from where it stopped."""


def printable(text: str) -> str:
    """Escape what cannot be encoded as UTF-8, such as the bytes of a file name that are not."""
    return text.encode("utf-8", "backslashreplace").decode()
