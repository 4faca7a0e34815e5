"""The decision after an attempt: every outcome, every limit."""

from collections.abc import Sequence
from typing import Any

import pytest

from pretrain.outcome import ExitCode
from slurm.restart import AttemptRecord as Past
from slurm.restart import Outcome, Policy, RankExit, decide, nodes_to_exclude, wait_before_restart_s

POLICY = Policy(max_restarts=3, retry_wait_s=60.0, save_within_s=120)


def decided(past: Sequence[Past] = (), begun_at: int = 100, slow: Sequence[str] = (), **outcome: Any) -> Past:
    """An attempt on nodes a and b that is decided about."""
    record = Past(begun_at, slow=slow, nodes=["a", "b"])
    return decide(record, Outcome(**{"job_state": "running", "saved_at": 200} | outcome), past, POLICY)


def rank(code: int, cause: str = "failed", message: str = "", *, rank: int = 0, node: str = "a",
         blamed: tuple[str, ...] = ()) -> RankExit:  # fmt: skip
    return RankExit(rank, node, code, 0.0, cause, blamed, message)


STOPPED = rank(ExitCode.STOPPED, "stopped", "SIGUSR2")
LATE = rank(ExitCode.STOPPED, "not saved", "SIGUSR2", rank=1)
CRASHED = rank(ExitCode.RETRY, "failed", "RuntimeError: CUDA error: an illegal memory access", rank=3, node="b")
LOST_PEER = rank(ExitCode.RETRY, "peer lost")
HANG = rank(ExitCode.RETRY, "hang", "rank 0 hangs: computing, or waiting for the other ranks for 600 s")
BUSY = rank(ExitCode.RETRY, "busy", node="b")
KILLED = rank(-9, "killed", "killed by SIGKILL", rank=2, node="c")
HOPELESS = rank(ExitCode.WILL_FAIL_AGAIN, "failed", "data/x: no such dataset")
SRUN = ("srun: error: slurm_receive_msgs: [[b]:30298] failed: Socket timed out",
        "srun: error: Task launch for StepId=4.0 failed on node b: Socket timed out")  # fmt: skip


@pytest.mark.parametrize(
    ("ending", "cause", "action"),
    [
        ({"finished": True}, "finished", "none"),
        ({"finished": True, "job_state": "requeued"}, "finished", "cancel"),
        ({"finished": True, "job_state": "cancelled"}, "finished", "none"),
        ({"stop_request": "stopped with slurm.stop", "exits": (STOPPED,)}, "stopped", "none"),
        ({"stop_request": "stopped with slurm.stop", "job_state": "requeued"}, "stopped", "cancel"),
        ({"stop_request": "stopped with slurm.stop", "exits": (CRASHED,), "status": 1}, "stopped", "none"),
        ({"job_state": "cancelled", "exits": (STOPPED,)}, "cancelled", "none"),
        ({"exits": (LOST_PEER, HOPELESS), "status": 2}, "will fail again", "none"),
        ({"exits": (HOPELESS,), "job_state": "requeued"}, "will fail again", "cancel"),
        ({"job_state": "requeued", "exits": (STOPPED,)}, "preempted", "leave"),
        ({"job_state": "requeued", "node_down": True, "status": 137}, "node lost", "leave"),
        ({"job_state": "preempted", "exits": (STOPPED,)}, "preempted", "requeue"),
        ({"job_state": "time limit", "exits": (STOPPED,)}, "time limit", "requeue"),
        ({"job_state": "time limit", "status": 137}, "time limit", "requeue"),
        ({"job_state": "time limit", "exits": (CRASHED,), "status": 1}, "crashed", "requeue"),
        ({"job_state": "time limit", "exits": (LOST_PEER,), "status": 1}, "crashed", "requeue"),
        ({"job_state": "time limit", "exits": (LATE, LOST_PEER), "status": 1}, "time limit", "requeue"),
        ({"job_state": "time limit", "exits": (LOST_PEER, LATE), "status": 1}, "time limit", "requeue"),
        ({"job_state": "time limit", "exits": (LATE, CRASHED), "status": 1}, "crashed", "requeue"),
        ({"job_state": "time limit", "exits": (HANG, LATE), "status": 1}, "hang", "requeue"),
        ({"job_state": "forgotten", "exits": (CRASHED,), "status": 1}, "crashed", "requeue"),
        ({"job_state": "node lost", "exits": (LOST_PEER,), "status": 1}, "node lost", "requeue"),
        ({"exits": (LOST_PEER,), "status": 1, "node_down": True}, "node lost", "requeue"),
        ({"exits": (CRASHED,), "status": 1}, "crashed", "requeue"),
        ({"exits": (LOST_PEER,), "status": 1}, "crashed", "requeue"),
        ({"exits": (BUSY,), "status": 1}, "crashed", "requeue"),
        ({"exits": (HANG,), "status": 1}, "hang", "requeue"),
        ({"exits": (HANG, KILLED), "status": 137}, "hang", "requeue"),
        ({"exits": (KILLED, HANG), "status": 137}, "crashed", "requeue"),
        ({"exits": (HANG, KILLED, CRASHED), "status": 137}, "crashed", "requeue"),
        ({"exits": (HANG, KILLED), "status": 137, "node_down": True}, "node lost", "requeue"),
        ({"exits": (STOPPED,)}, "preempted", "requeue"),
        ({"status": 128 + 12}, "lost", "requeue"),
        ({"status": 128 + 15, "srun_errors": SRUN}, "crashed", "requeue"),
        ({"status": 128 + 15, "srun_errors": SRUN, "job_state": "preempted"}, "preempted", "requeue"),
        ({"status": 137}, "lost", "requeue"),
        ({"status": 0}, "lost", "requeue"),
    ],
)
def test_every_end_has_its_cause_and_what_follows(ending: dict[str, Any], cause: str, action: str) -> None:
    decision = decided(**ending)
    assert (decision.cause, decision.action, decision.end_step) == (cause, action, 200)
    assert decision.reason
    assert "\n" not in decision.reason


def test_the_rank_at_fault_is_told_once_rather_than_those_that_lost_it() -> None:
    told = decided(exits=(LOST_PEER, CRASHED), status=1).reason
    assert told == "rank 3 on b: RuntimeError: CUDA error: an illegal memory access"
    full = rank(ExitCode.WILL_FAIL_AGAIN, "failed", "rank 3: the GPU's memory is full", rank=3, node="b")
    assert decided(exits=(full,)).reason == "rank 3 on b: the GPU's memory is full"


def without_progress(number: int, cause: str = "crashed") -> list[Past]:
    return [Past(0, "preempted"), Past(100, "finished"), *[Past(200, cause)] * number]


CRASH = {"exits": (CRASHED,), "status": 1}
PREEMPTED = {"job_state": "preempted", "exits": (STOPPED,)}


@pytest.mark.parametrize(
    ("ending", "past", "wait"),
    [
        (CRASH, without_progress(0), 0),
        (CRASH, without_progress(1), 60),
        (CRASH, without_progress(2), 240),
        (CRASH | {"saved_at": 201}, without_progress(50), 0),  # a new checkpoint starts the count anew
        (CRASH, without_progress(50, "preempted"), 0),  # being preempted is never too often
        (PREEMPTED, without_progress(50, "preempted"), 0),
    ],
)
def test_each_restart_without_progress_waits_longer(ending: dict[str, Any], past: list[Past], wait: float) -> None:
    decision = decided(past, begun_at=200, **ending)
    assert decision.action == "requeue"
    assert wait_before_restart_s([*past, decision], POLICY) == wait


@pytest.mark.parametrize("cause", ["crashed", "hang", "lost", "node lost", "time limit"])
def test_after_the_limit_it_gives_up_and_says_why(cause: str) -> None:
    past = without_progress(3, cause)
    decision = decided(past, begun_at=200, **CRASH)
    assert (decision.action, decision.cause) == ("none", "crashed")
    assert "gave up: 3 restarts in a row brought no new checkpoint" in decision.reason
    assert decided(past, begun_at=200, job_state="requeued", node_down=True).action == "cancel"


def missing(*nodes: str, rank_number: int = 0, node: str = "a") -> RankExit:
    return rank(ExitCode.RETRY, "peers missing", rank=rank_number, node=node, blamed=nodes)


@pytest.mark.parametrize(
    ("exits", "blamed"),
    [
        ((LOST_PEER, CRASHED), "b"),
        ((LOST_PEER, KILLED), "c"),
        ((HANG, KILLED, CRASHED), "b"),
        ((LOST_PEER,), ""),
        ((HANG,), ""),
        ((HANG, LOST_PEER), ""),
        ((HANG, KILLED), ""),
        ((BUSY,), ""),
        ((BUSY, missing("b")), ""),  # its port was taken
        ((missing("b"), missing("b", rank_number=2, node="c")), "b"),
        ((missing("b", "c"), missing("a", rank_number=1, node="b")), "a"),  # a cannot be reached
        ((missing("b", "c"),), ""),
        ((missing("b"), missing("a", rank_number=1, node="b")), ""),  # each says it of the other
        ((missing("b"), CRASHED), "b"),
        ((missing("c"), CRASHED), "b"),  # which had a reason of its own for not being there
    ],
)
def test_the_node_of_the_rank_at_fault_or_the_one_that_did_not_arrive_is_blamed(
    exits: tuple[RankExit, ...], blamed: str
) -> None:
    assert decided(exits=exits, status=1).node == blamed


@pytest.mark.parametrize(
    ("errors", "blamed"),
    [
        (SRUN, "b"),
        (("srun: error: b: task 1: Exited with exit code 127", "srun: error: a: task 0: Terminated"), "b"),
        (("srun: error: b: task 1: Exited with exit code 2", "srun: error: a: task 0: Exited with exit code 2"), ""),
        (("srun: error: bb: task 1: Exited with exit code 2",), ""),
    ],
)
def test_the_node_that_srun_names_is_blamed_and_its_words_are_the_reason(errors: tuple[str, ...], blamed: str) -> None:
    decision = decided(status=143, srun_errors=errors)
    assert (decision.cause, decision.node) == ("crashed", blamed)
    assert errors[0] in decision.reason


@pytest.mark.parametrize(
    ("ending", "past", "excluded"),
    [
        (PREEMPTED | {"slow": ("b", "c")}, [], ()),
        (PREEMPTED | {"slow": ("b", "c")}, [Past(0, "crashed", "b"), Past(5, "preempted", "", ("d",))], ("b",)),
        (CRASH | {"slow": ("b",)}, [], ()),  # one attempt counts once
        (CRASH, [Past(0, "crashed", "a")], ()),
        (CRASH, [Past(0, "crashed", "b"), Past(5, "crashed", "a")], ("b",)),
        (PREEMPTED, [Past(0, "crashed", "b"), Past(5, "crashed", "b")], ("b",)),
    ],
)
def test_a_node_that_failed_or_was_slow_twice_is_avoided_whatever_ended_the_run(
    ending: dict[str, Any], past: list[Past], excluded: tuple[str, ...]
) -> None:
    assert nodes_to_exclude([*past, decided(past, **ending)]) == excluded
