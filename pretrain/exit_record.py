"""What a rank records of its own exit, for a launcher that names a file in EXIT_RECORD; else nothing.

A launcher decides by these facts, so that a message may be reworded.
"""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import printable, without_secrets
from data_pipeline.files import write_atomically

Cause = Literal["failed", "peer lost", "peers missing", "busy", "hang"]
"""Why a rank fails: by itself; since another rank is gone; since others did not arrive (``blamed`` has their nodes);
since another process holds what it needs; or its watchdog ended it."""

_PEER_LOST = re.compile(
    r"connection (closed|reset|refused|timed)|closed by peer|broken pipe|NCCL|gloo|ECONN|DistBackendError|"
    r"DistNetworkError|DistStoreError",
    re.IGNORECASE,
)
"""Types and words of torch's, gloo's and NCCL's errors: gloo raises RuntimeError, whatever has happened."""
_facts: dict[str, Any] = {}


def record_exit(phase: str, message: str, *, error: BaseException | None = None, cause: Cause = "failed") -> None:
    """Record why this rank exits; the first reason is kept.

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
