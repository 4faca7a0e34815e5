"""What follows an attempt of a run: a pure function of its outcome, of the attempts before it, and of the limits.

| outcome | what follows |
|---|---|
| finished; ``slurm.stop``; scancel; an error that will repeat | nothing |
| preempted, asked to stop by a signal | started again |
| time limit, a node lost, a crash, a hang | the same, after a while, unless ``max_restarts`` in a row saved nothing |
"""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pretrain.outcome import ExitCode

JobState = Literal["running", "requeued", "preempted", "time limit", "node lost", "cancelled", "forgotten"]
"""Slurm's state of the job whose ranks have just ended; "requeued": it will start it again by itself; "forgotten": a
slurmctld that was killed does not know it any more."""
Cause = Literal[
    "finished", "stopped", "cancelled", "will fail again", "preempted", "time limit", "node lost", "crashed", "hang",
    "lost",
]  # fmt: skip
"""Why an attempt ended; "lost": no rank recorded why."""
Action = Literal["none", "cancel", "leave", "requeue", "release"]
"""What to do with the job; "leave": Slurm has requeued it; "cancel": Slurm has, and should not have; "release": Slurm
accepts no other job now, so ``slurm.release`` submits it."""

COUNTED: tuple[Cause, ...] = ("time limit", "node lost", "crashed", "hang", "lost")
"""Outcomes that may mean that the run cannot continue. Being preempted is not a failure of the run."""
FAILURES_TO_EXCLUDE = 2
"""A node that was at fault, did not arrive or was slow so often is avoided by this run: once may be chance."""
_ENDED_BY_SRUN = re.compile("Terminated|Killed|CANCELLED")


@dataclass(frozen=True)
class Policy:
    """Limits of restarting."""

    max_restarts: int
    """So many restarts in a row may bring no new checkpoint."""
    retry_wait_s: float
    """Wait before the second restart without progress; four times as long before each further one."""
    save_within_s: int
    """So long before the time limit the ranks are asked to save."""


@dataclass(frozen=True)
class RankExit:
    """``exit.json``: how one rank ended. ``slurm.job`` adds what it knows to what ``pretrain.outcome`` wrote."""

    rank: int
    node: str
    code: int
    """``main.py``'s exit status, or minus the signal that killed it."""
    time: float
    cause: str = "failed"
    """Of ``pretrain.outcome``; or finished, stopped, not saved (in time when asked to stop), killed."""
    blamed: Sequence[str] = ()
    """Nodes that it waited for in vain."""
    message: str = ""
    """The reason, in one line."""

    @property
    def at_fault(self) -> bool:
        """Whether it failed by itself, rather than because of others."""
        return self.cause in ("failed", "killed")


@dataclass(frozen=True)
class Attempt:
    """Which start of a run: Slurm's job and how often Slurm has restarted that job."""

    job: str
    restart: int

    def __str__(self) -> str:
        return f"{self.job}-{self.restart}"


@dataclass
class AttemptRecord:
    """One attempt, from its lines in ``history.jsonl``."""

    step: int
    """Of the newest checkpoint when it began."""
    cause: Cause = "lost"
    node: str = ""
    """The node at fault, where one was."""
    slow: Sequence[str] = ()
    """Nodes that preflight found slow."""
    job: str = ""
    restart: int = 0
    begun: float = 0.0
    nodes: list[str] = field(default_factory=list)
    ranks: int = 0
    code: str = ""
    """Digest of the code that it ran."""
    ended: float = 0.0
    """0 while its end is not recorded."""
    end_step: int = 0
    """Of the newest checkpoint at its end."""
    reason: str = ""
    action: Action | Literal[""] = ""
    next_job: str = ""
    """The job that continues in its place, where it could not be requeued."""
    submitted_again: int = 0
    """How often ``slurm.release`` has submitted a job in its place."""
    notes: list[str] = field(default_factory=list)
    """What else was done: follow-up jobs, nodes excluded, waits."""

    @property
    def attempt(self) -> Attempt:
        """Its name."""
        return Attempt(self.job, self.restart)


@dataclass(frozen=True)
class Outcome:
    """What is known when an attempt has ended, besides its record."""

    job_state: JobState
    saved_at: int
    """Step of the newest checkpoint."""
    exits: tuple[RankExit, ...] = ()
    """Earliest first; ranks that were killed with their node or by Slurm have none."""
    status: int = 0
    """Of srun."""
    node_down: bool = False
    """Whether Slurm reports one of its nodes as down."""
    finished: bool = False
    stop_request: str = ""
    srun_errors: tuple[str, ...] = ()
    """What srun and slurmstepd reported."""


def decide(record: AttemptRecord, outcome: Outcome, past: Sequence[AttemptRecord], policy: Policy) -> AttemptRecord:
    """Decide what follows an attempt.

    Args:
        record: the attempt as it began, with the nodes that preflight found slow.
        outcome: how it ended.
        past: the attempts before it, the earliest first.
        policy: limits.

    Returns:
        the record with cause, reason, action, node at fault and last step.
    """
    requeued = outcome.job_state == "requeued"
    final = replace(record, end_step=outcome.saved_at, action="cancel" if requeued else "none")
    if outcome.finished:
        return replace(final, cause="finished", reason="all steps are taken and the hand-off is written")
    if outcome.stop_request:
        return replace(final, cause="stopped", reason=outcome.stop_request)
    hopeless = [e for e in outcome.exits if e.code == ExitCode.WILL_FAIL_AGAIN]
    if hopeless:  # all ranks of a node meet the same error and one of them prints it
        return replace(final, cause="will fail again", reason=_reason(min(hopeless, key=lambda e: e.rank)))
    if outcome.job_state == "cancelled":
        return replace(final, cause="cancelled", reason="cancelled with scancel")
    cause, reason, node = _why(outcome, record.nodes)
    ended = replace(final, cause=cause, reason=reason, node=node)
    tries = restarts_without_progress([*past, ended])
    if tries > policy.max_restarts:
        return replace(ended, reason=f"{reason}; gave up: {tries - 1} restarts in a row brought no new checkpoint")
    return replace(ended, action="leave" if requeued else "requeue")


def restarts_without_progress(records: Sequence[AttemptRecord]) -> int:
    """How many of the newest attempts ended badly without leading to a checkpoint beyond that of the last one's end."""
    count = 0
    for one in reversed(records):
        if one.step < records[-1].end_step:
            break
        count += one.cause in COUNTED
    return count


def wait_before_restart_s(records: Sequence[AttemptRecord], policy: Policy) -> float:
    """How long the next attempt has to wait."""
    tries = restarts_without_progress(records)
    return policy.retry_wait_s * 4 ** (tries - 2) if tries >= 2 else 0.0


def nodes_to_exclude(past: Sequence[AttemptRecord]) -> tuple[str, ...]:
    """Nodes that were at fault, did not arrive or were slow in more than one attempt."""
    failed = [node for one in past for node in {one.node, *one.slow} if node]
    return tuple(sorted({node for node in failed if failed.count(node) >= FAILURES_TO_EXCLUDE}))


def _why(outcome: Outcome, nodes: Sequence[str]) -> tuple[Cause, str, str]:
    """Cause, reason and the node at fault of an outcome that is not final by itself."""
    failed = [e for e in outcome.exits if e.code not in (ExitCode.STOPPED, ExitCode.FINISHED)]
    if failed and failed[0].cause == "hang":  # when it ended, Slurm killed those that hung, too
        failed = [failed[0], *(e for e in failed[1:] if e.code != -signal.SIGKILL)]
    stopped = [e for e in outcome.exits if e.code == ExitCode.STOPPED]
    saved = f"saved at step {outcome.saved_at}" if outcome.saved_at else "nothing was saved"
    culprit = next((e for e in failed if e.at_fault), None)
    if outcome.job_state == "node lost" or (outcome.node_down and culprit is None):
        return "node lost", f"a node was lost; {saved}", ""
    if outcome.job_state in ("preempted", "requeued"):
        by_slurm = " (Slurm requeued it)" if outcome.job_state == "requeued" else ""
        return "preempted", f"preempted{by_slurm}; {saved}", ""
    late = next((e.message for e in stopped if e.cause == "not saved"), "")
    # A rank that had not saved is ended on its node, and the others may see it gone before their own node ends them.
    lost_others = all(not e.at_fault and e.cause != "hang" for e in failed)
    if failed and not (late and lost_others and outcome.job_state == "time limit"):
        first = culprit or failed[0]
        if first.cause == "hang":
            return "hang", _reason(first), ""
        return "crashed", _reason(first), first.node if culprit else _missing_node(failed)
    if outcome.job_state == "time limit":
        return "time limit", f"time limit{late and f' ({late})'}; {saved}", ""
    if stopped:
        return "preempted", f"stopped by {stopped[0].message or 'a signal'}; {saved}", ""
    if outcome.srun_errors:
        words = "; ".join(outcome.srun_errors)[:300]
        return "crashed", f"{words} (srun ended with {outcome.status})", _named(nodes, outcome.srun_errors)
    return "lost", f"no rank wrote an exit record (srun ended with {outcome.status}); {saved}", ""


def _missing_node(exits: list[RankExit]) -> str:
    """The one node that did not arrive; "" where several did not, or where a rank of it reported what it waited for."""
    named = {e.blamed[0] for e in exits if e.cause == "peers missing" and len(e.blamed) == 1}
    busy = {e.node for e in exits if e.cause == "busy"}
    return named.pop() if len(named) == 1 and not named & busy else ""


def _named(nodes: Sequence[str], errors: Sequence[str]) -> str:
    """The one node on which srun or slurmstepd report an error that is not the end of the others."""
    lines = [line for line in errors if not _ENDED_BY_SRUN.search(line)]
    named = {node for node in nodes if any(re.search(rf"\b{re.escape(node)}\b", line) for line in lines)}
    return named.pop() if len(named) == 1 else ""


def _reason(ended: RankExit) -> str:
    return f"rank {ended.rank} on {ended.node}: {ended.message.removeprefix(f'rank {ended.rank}: ')}"
