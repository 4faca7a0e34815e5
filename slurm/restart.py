"""What follows the end of an incarnation of a run: a pure function of how it ended, of its past, and of the limits.

| how it ended | what follows |
|---|---|
| finished; ``slurm.stop``; scancel; an error that will repeat | nothing |
| preempted, told to stop by a signal | started again |
| time limit, a node lost, a crash, a hang | the same, after a while, unless ``max_restarts`` in a row saved nothing |
"""

import re
import signal
from dataclasses import dataclass
from typing import Literal

from pretrain.outcome import ExitCode
from slurm.preflight import missing_node

Fate = Literal["running", "requeued", "preempted", "time limit", "node lost", "cancelled", "forgotten"]
"""What Slurm says of the job whose ranks have just ended; "requeued": it will start it again by itself; "forgotten": a
slurmctld that was killed does not know it any more."""
Cause = Literal[
    "finished", "stopped", "cancelled", "will fail again", "preempted", "time limit", "node lost", "crashed", "hang",
    "lost",
]  # fmt: skip
"""Why an incarnation ended; "lost": nobody lived to tell."""
Action = Literal["none", "cancel", "leave", "requeue"]
"""What to do with the job; "leave": Slurm has requeued it; "cancel": Slurm has, and should not have."""

COUNTED: tuple[Cause, ...] = ("time limit", "node lost", "crashed", "hang", "lost")
"""Endings that may mean that the run cannot go on. Being preempted says nothing about the run."""
FAILURES_TO_EXCLUDE = 2
"""A node that was at fault, did not arrive or was slow so often is avoided by this run: once may be chance."""
_STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
_NOT_ITS_NODE = re.compile(
    r"connection (closed|reset|refused|timed)|closed by peer|broken pipe|NCCL|gloo|ECONN|DistBackendError|"
    r"DistNetworkError|DistStoreError|did not arrive| hangs: |"
    r"another process is training|port \d+ is taken",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Policy:
    """Limits of restarting."""

    max_restarts: int
    """So many restarts in a row may bring no new checkpoint."""
    retry_wait_s: float
    """Wait before the second restart without progress; four times as long before each further one."""
    save_within_s: int
    """So long before the time limit the ranks are told to save."""

    @property
    def time_to_save_s(self) -> float:
        """So long they get for it; the rest is for starting again."""
        return self.save_within_s - min(10.0, self.save_within_s / 4)


@dataclass(frozen=True)
class RankExit:
    """How one rank ended. ``code`` is main.py's exit status, or minus the signal that killed it."""

    rank: int
    node: str
    code: int
    time: float
    error: str = ""
    """The last error that the rank printed, in one line."""

    @property
    def at_fault(self) -> bool:
        """Whether it failed by itself, rather than because it lost the others or a former start is not dead yet."""
        return self.code < 0 or not _NOT_ITS_NODE.search(self.error)

    @property
    def hangs(self) -> bool:
        """Whether its own watchdog ended it."""
        return " hangs: " in self.error


@dataclass(frozen=True)
class Past:
    """An incarnation in the history. ``step`` is that of the newest checkpoint when it began."""

    step: int
    cause: Cause
    node: str = ""
    """The node at fault, where one was."""
    slow: tuple[str, ...] = ()
    """Nodes that preflight found slow."""


@dataclass(frozen=True)
class Ending:
    """All that is known when an incarnation has ended."""

    fate: Fate
    exits: tuple[RankExit, ...]
    """Earliest first; ranks that were killed with their node or by Slurm say nothing."""
    status: int
    """Of srun."""
    node_down: bool
    """Whether Slurm takes one of its nodes for dead."""
    finished: bool
    stop_request: str
    begun_at: int
    """Step of the newest checkpoint when it began."""
    saved_at: int
    """The same at its end."""
    slow: tuple[str, ...] = ()
    """Nodes that preflight found slow."""


@dataclass(frozen=True)
class Decision:
    """What is done, and why, for the history and for people."""

    action: Action
    cause: Cause
    reason: str
    wait_s: float = 0.0
    exclude: tuple[str, ...] = ()
    """All nodes that this run avoids from now on."""
    node: str = ""
    """The node at fault this time."""
    slow: tuple[str, ...] = ()
    """Nodes that preflight found slow this time."""


def decide(ending: Ending, past: list[Past], policy: Policy) -> Decision:
    """Decide what follows the end of an incarnation.

    Args:
        ending: how it ended.
        past: the incarnations before it, the earliest first.
        policy: limits.
    """
    if ending.finished:
        return _end(ending, "finished", "all steps are taken and the hand-off is written")
    if ending.stop_request:
        return _end(ending, "stopped", ending.stop_request)
    hopeless = [e for e in ending.exits if e.code == ExitCode.WILL_FAIL_AGAIN]
    if hopeless:  # all ranks of a node meet the same error and one of them prints it
        return _end(ending, "will fail again", _told(min(hopeless, key=lambda e: e.rank)))
    if ending.fate == "cancelled":
        return _end(ending, "cancelled", "cancelled with scancel")
    cause, reason, node = _why(ending)
    now = Past(ending.begun_at, cause, node, ending.slow)
    tries = restarts_without_progress([*past, now], ending.saved_at)
    if tries > policy.max_restarts:
        return _end(ending, cause, f"{reason}; gave up: {tries - 1} restarts in a row brought no new checkpoint", node)
    return Decision(
        "leave" if ending.fate == "requeued" else "requeue",
        cause,
        reason,
        wait_s=policy.retry_wait_s * 4 ** (tries - 2) if tries >= 2 else 0.0,
        exclude=nodes_to_exclude([*past, now]),
        node=node,
        slow=ending.slow,
    )


def restarts_without_progress(past: list[Past], saved_at: int) -> int:
    """How many of the newest incarnations ended badly without leading to a checkpoint beyond ``saved_at``'s."""
    count = 0
    for one in reversed(past):
        if one.step < saved_at:
            break
        count += one.cause in COUNTED
    return count


def nodes_to_exclude(past: list[Past]) -> tuple[str, ...]:
    """Nodes that were at fault, did not arrive or were slow in more than one incarnation."""
    failed = [node for one in past for node in {one.node, *one.slow} if node]
    return tuple(sorted({node for node in failed if failed.count(node) >= FAILURES_TO_EXCLUDE}))


def _end(ending: Ending, cause: Cause, reason: str, node: str = "") -> Decision:
    return Decision("cancel" if ending.fate == "requeued" else "none", cause, reason, node=node, slow=ending.slow)


def _why(ending: Ending) -> tuple[Cause, str, str]:
    """Cause, reason and the node at fault of an end that is not final by itself."""
    failed = [e for e in ending.exits if e.code not in (ExitCode.STOPPED, ExitCode.FINISHED)]
    if failed and failed[0].hangs:  # when it ended, Slurm killed those that stood still and could not notice
        failed = [failed[0], *(e for e in failed[1:] if e.code != -signal.SIGKILL)]
    stopped = [e for e in ending.exits if e.code == ExitCode.STOPPED]
    saved = f"saved at step {ending.saved_at}" if ending.saved_at else "nothing was saved"
    culprit = next((e for e in failed if e.at_fault), None)
    if ending.fate == "node lost" or (ending.node_down and culprit is None):
        return "node lost", f"a node was lost; {saved}", ""
    if ending.fate in ("preempted", "requeued"):
        return (
            "preempted",
            f"{'preempted' if ending.fate == 'preempted' else 'preempted (Slurm requeued it)'}; {saved}",
            "",
        )
    late = next((e.error for e in stopped if "had not saved" in e.error), "")
    # Whoever had not saved is ended on its node, and the others may see it gone before their own node ends them.
    lost_others = all(not e.at_fault and not e.hangs for e in failed)
    if failed and not (late and lost_others and ending.fate == "time limit"):
        first = culprit or failed[0]
        if first.hangs:
            return "hang", _told(first), ""
        return "crashed", _told(first), first.node if culprit else missing_node(e.error for e in failed)
    if ending.fate == "time limit":
        return "time limit", f"time limit{late and f' ({late})'}; {saved}", ""
    if stopped:
        return "preempted", f"told to stop by {stopped[0].error or 'a signal'}; {saved}", ""
    if ending.status - 128 in _STOP_SIGNALS:
        return "preempted", f"told to stop before training had begun; {saved}", ""
    return "lost", f"no rank lived to say why (srun ended with {ending.status}); {saved}", ""


def _told(ended: RankExit) -> str:
    return f"rank {ended.rank} on {ended.node}: {ended.error.removeprefix(f'rank {ended.rank}: ')}"
