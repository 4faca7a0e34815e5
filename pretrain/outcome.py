"""How a run can end: exit statuses with meanings, the error for a user, and what a rank records of its exit."""

import contextlib
import json
import os
import re
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import StorageError, is_lasting, printable, without_secrets
from data_pipeline.files import write_atomically
from pretrain.state import TrainState

Cause = Literal["failed", "peer lost", "peers missing", "busy", "hang"]
"""Why a rank fails: by itself; since another rank is gone; since others did not arrive (``blamed`` has their nodes);
since another process holds what it needs; or its watchdog ended it."""


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
    exit_cause: Cause = "failed"
    """As ``record_exit`` records it."""

    def __init__(self, text: str, code: ExitCode | None = None) -> None:
        super().__init__(printable(without_secrets(text)))
        if code is not None:
            self.code = code


class BusyError(UserError):
    """Another process has what this one needs, perhaps a previous attempt on a node that is not down yet."""

    code = ExitCode.RETRY
    exit_cause: Cause = "busy"


def storage_code(error: OSError) -> ExitCode:
    """The exit status after an error of the operating system, which may pass by itself or not."""
    return ExitCode.WILL_FAIL_AGAIN if is_lasting(error) else ExitCode.RETRY


def exit_code(error: Exception) -> ExitCode:
    """The exit status of a command that ends with this error, whose text is its one line."""
    if isinstance(error, StorageError):
        return ExitCode.RETRY
    code: ExitCode = getattr(error, "code", ExitCode.WILL_FAIL_AGAIN)
    return code


_ADVICE = {
    "evaluating": "lower evaluation.batch_size",
    "probing": "give probes a smaller set, or leave them out",
    "copying a checkpoint": "the copy is pinned in the host's memory, which may be what is full: give the job "
    "more of it (--mem)",
}
_TRAINING = (
    "lower train_micro_batch_size_per_gpu, or recompute with model.activation_checkpointing; python -m pretrain.plan "
    "estimates what fits"
)


def full_memory_message(error: BaseException, phase: str, advice: str) -> str:
    """One line: what was being done, the library's words, and what to do."""
    return f"the GPU's memory is full, {phase} ({' '.join(str(error).split())[:200]}): {advice}"


def explain_full_memory(error: BaseException, phase: str, progress: TrainState | None) -> tuple[str, ExitCode]:
    """One line, and the exit code.

    What this run has done before did fit, so that something else was in the way, or the ranks are fewer; the limit of
    restarts without a new checkpoint holds. What it has never done would fail again.

    Args:
        error: of which ``gpu_memory_is_full`` is true.
        phase: what this rank was doing, in the words of ``Watchdog.beat``.
        progress: of the run; None before it is built.
    """
    text = full_memory_message(error, phase, _ADVICE.get(phase, _TRAINING))
    if progress is None or phase == "copying a checkpoint":
        return text, ExitCode.RETRY
    done = {"evaluating": progress.evaluated_at, "probing": progress.probed_at}.get(phase, progress.step)
    return text, ExitCode.RETRY if done else ExitCode.WILL_FAIL_AGAIN


_PEER_LOST = re.compile(
    r"connection (closed|reset|refused|timed)|closed by peer|broken pipe|NCCL|gloo|ECONN|DistBackendError|"
    r"DistNetworkError|DistStoreError",
    re.IGNORECASE,
)
"""Types and words of torch's, gloo's and NCCL's errors: gloo raises RuntimeError, whatever has happened."""
_facts: dict[str, Any] = {}


def record_exit(phase: str, message: str, *, error: BaseException | None = None, cause: Cause = "failed") -> None:
    """Record why this rank exits, for a launcher that names a file in EXIT_RECORD; the first reason is kept.

    A launcher decides by these facts, so that a message may be reworded.

    Args:
        phase: what it did.
        message: the reason; its first line is kept.
        error: what ended it. Its attributes ``exit_cause`` and ``nodes``, where it has them, are the cause and the
            nodes to blame.
        cause: where there is no error.
    """
    if "cause" in _facts:
        return
    if error is not None:
        lost = _PEER_LOST.search(f"{type(error).__name__}: {error}")
        cause = getattr(error, "exit_cause", "peer lost" if lost else cause)
    line = printable(without_secrets(message.partition("\n")[0][:500]))
    record(cause=cause, phase=phase, message=line, blamed=getattr(error, "nodes", ()))


def record(**facts: Any) -> None:
    """Add facts to the record, such as ``slow``: the nodes that preflight found slow."""
    _facts.update(facts)
    if path := os.environ.get("EXIT_RECORD"):
        with contextlib.suppress(OSError):
            write_atomically(Path(path), json.dumps(_facts).encode())
