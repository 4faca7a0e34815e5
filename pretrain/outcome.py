"""How a run can end: exit statuses with meanings, and the error for a user."""

from enum import IntEnum

from data_pipeline.errors import StorageError, is_lasting, printable, without_secrets


class ExitCode(IntEnum):
    """Exit status of ``pretrain/main.py``. Launchers decide by these alone.

    Python ends with 1 on an uncaught exception and argparse with 2 on bad usage, so those numbers keep their sense.
    """

    FINISHED = 0
    """All samples were trained on and the hand-off is written. Do not start again."""
    RETRY = 1
    """Something broke that another start may survive: a lost peer, a lost node, a crash."""
    WILL_FAIL_AGAIN = 2
    """The recipe, the data or the command is wrong; starting again unchanged is pointless."""
    STOPPED = 75
    """Asked to stop, saved, can be resumed (75 is EX_TEMPFAIL of sysexits.h)."""


class UserError(Exception):
    """Something that the user has to change. Its text is one line: what is wrong, where, and what to do.

    Control characters are escaped in it, and URLs lose what may be a secret.
    """

    code = ExitCode.WILL_FAIL_AGAIN
    exit_cause = "failed"
    """As ``pretrain.exit_record`` has it."""

    def __init__(self, text: str, code: ExitCode | None = None) -> None:
        super().__init__(printable(without_secrets(text)))
        if code is not None:
            self.code = code


class BusyError(UserError):
    """Another process has what this one needs, perhaps a previous attempt on a node that is not down yet."""

    code = ExitCode.RETRY
    exit_cause = "busy"


def storage_code(error: OSError) -> ExitCode:
    """The exit status after an error of the operating system, which may pass by itself or not."""
    return ExitCode.WILL_FAIL_AGAIN if is_lasting(error) else ExitCode.RETRY


def exit_code(error: Exception) -> ExitCode:
    """The exit status of a command that ends with this error, whose text is its one line."""
    if isinstance(error, StorageError):
        return ExitCode.RETRY
    code: ExitCode = getattr(error, "code", ExitCode.WILL_FAIL_AGAIN)
    return code
