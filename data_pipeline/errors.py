"""The one error that the data pipeline shows to a person."""


class DataError(Exception):
    """Something about the data is wrong and will be wrong again when it is tried again.

    The message is one line that says what is wrong, where, and what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
