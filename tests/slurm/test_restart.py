"""The decision after an incarnation: every way to end, every limit."""

from dataclasses import replace
from typing import Any

import pytest

from pretrain.outcome import ExitCode
from slurm.restart import Ending, Past, Policy, RankExit, decide

POLICY = Policy(max_restarts=3, retry_wait_s=60.0, save_within_s=120)
ENDED = Ending(fate="running", exits=(), status=0, node_down=False, finished=False, stop_request="", begun_at=100,
               saved_at=200)  # fmt: skip


def rank(code: int, error: str = "", *, rank: int = 0, node: str = "a") -> RankExit:
    return RankExit(rank, node, code, 0.0, error)


STOPPED = rank(ExitCode.STOPPED, "SIGUSR2")
LATE = rank(ExitCode.STOPPED, "SIGUSR2, but had not saved within 110 s", rank=1)
CRASHED = rank(ExitCode.RETRY, "RuntimeError: CUDA error: an illegal memory access", rank=3, node="b")
LOST_PEER = rank(ExitCode.RETRY, "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]")
HANG = rank(ExitCode.RETRY, "rank 0 hangs: computing, or waiting for the other ranks for 600 s")
BUSY = rank(ExitCode.RETRY, "another process is training runs/one: stop it first, or choose another name", node="b")
KILLED = rank(-9, "killed by SIGKILL", rank=2, node="c")
HOPELESS = rank(ExitCode.WILL_FAIL_AGAIN, "data/x: no such dataset")


@pytest.mark.parametrize(
    ("ending", "cause", "action"),
    [
        ({"finished": True}, "finished", "none"),
        ({"finished": True, "fate": "requeued"}, "finished", "cancel"),
        ({"finished": True, "fate": "cancelled"}, "finished", "none"),
        ({"stop_request": "stopped with slurm.stop", "exits": (STOPPED,)}, "stopped", "none"),
        ({"stop_request": "stopped with slurm.stop", "fate": "requeued"}, "stopped", "cancel"),
        ({"stop_request": "stopped with slurm.stop", "exits": (CRASHED,), "status": 1}, "stopped", "none"),
        ({"fate": "cancelled", "exits": (STOPPED,)}, "cancelled", "none"),
        ({"exits": (LOST_PEER, HOPELESS), "status": 2}, "will fail again", "none"),
        ({"exits": (HOPELESS,), "fate": "requeued"}, "will fail again", "cancel"),
        ({"fate": "requeued", "exits": (STOPPED,)}, "preempted", "leave"),
        ({"fate": "requeued", "node_down": True, "status": 137}, "node lost", "leave"),
        ({"fate": "preempted", "exits": (STOPPED,)}, "preempted", "requeue"),
        ({"fate": "time limit", "exits": (STOPPED,)}, "time limit", "requeue"),
        ({"fate": "time limit", "status": 137}, "time limit", "requeue"),
        ({"fate": "time limit", "exits": (CRASHED,), "status": 1}, "crashed", "requeue"),
        ({"fate": "time limit", "exits": (LOST_PEER,), "status": 1}, "crashed", "requeue"),
        ({"fate": "time limit", "exits": (LATE, LOST_PEER), "status": 1}, "time limit", "requeue"),
        ({"fate": "time limit", "exits": (LOST_PEER, LATE), "status": 1}, "time limit", "requeue"),
        ({"fate": "time limit", "exits": (LATE, CRASHED), "status": 1}, "crashed", "requeue"),
        ({"fate": "time limit", "exits": (HANG, LATE), "status": 1}, "hang", "requeue"),
        ({"fate": "forgotten", "exits": (CRASHED,), "status": 1}, "crashed", "requeue"),
        ({"fate": "node lost", "exits": (LOST_PEER,), "status": 1}, "node lost", "requeue"),
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
        ({"status": 128 + 12}, "preempted", "requeue"),
        ({"status": 128 + 15}, "preempted", "requeue"),
        ({"status": 137}, "lost", "requeue"),
        ({"status": 0}, "lost", "requeue"),
    ],
)
def test_every_end_has_its_cause_and_what_follows(ending: dict[str, object], cause: str, action: str) -> None:
    decision = decide(replace(ENDED, **ending), [], POLICY)
    assert (decision.cause, decision.action) == (cause, action)
    assert decision.reason
    assert "\n" not in decision.reason


def test_the_rank_at_fault_is_told_once_rather_than_those_that_lost_it() -> None:
    decision = decide(replace(ENDED, exits=(LOST_PEER, CRASHED), status=1), [], POLICY)
    assert decision.reason == "rank 3 on b: RuntimeError: CUDA error: an illegal memory access"
    full = rank(ExitCode.WILL_FAIL_AGAIN, "rank 3: the GPU's memory is full", rank=3, node="b")
    assert decide(replace(ENDED, exits=(full,)), [], POLICY).reason == "rank 3 on b: the GPU's memory is full"


def without_progress(number: int, cause: str = "crashed") -> list[Past]:
    return [Past(0, "preempted"), Past(100, "finished"), *[Past(200, cause) for _ in range(number)]]


@pytest.mark.parametrize(
    ("ending", "past", "wait"),
    [
        ({}, without_progress(0), 0),
        ({}, without_progress(1), 60),
        ({}, without_progress(2), 240),
        ({"saved_at": 201}, without_progress(50), 0),  # a new checkpoint starts the count anew
        ({}, without_progress(50, "preempted"), 0),  # being preempted is never too often
        ({"fate": "preempted", "exits": (), "status": 0}, without_progress(50, "preempted"), 0),
    ],
)
def test_each_restart_without_progress_waits_longer(ending: dict[str, Any], past: list[Past], wait: float) -> None:
    crash = {"exits": (CRASHED,), "status": 1, "begun_at": 200}
    decision = decide(replace(ENDED, **crash | ending), past, POLICY)
    assert (decision.action, decision.wait_s) == ("requeue", wait)


@pytest.mark.parametrize("cause", ["crashed", "hang", "lost", "node lost", "time limit"])
def test_after_the_limit_it_gives_up_and_says_why(cause: str) -> None:
    ending = replace(ENDED, exits=(CRASHED,), status=1, begun_at=200)
    decision = decide(ending, without_progress(3, cause), POLICY)
    assert (decision.action, decision.cause) == ("none", "crashed")
    assert "gave up: 3 restarts in a row brought no new checkpoint" in decision.reason
    assert (
        decide(replace(ending, fate="requeued", node_down=True, exits=()), without_progress(3), POLICY).action
        == "cancel"
    )


def missing(nodes: str, *, rank_number: int = 0, node: str = "a", ranks: str = "1") -> RankExit:
    text = f"{nodes} (rank {ranks}) did not arrive within 600 s"
    return rank(ExitCode.RETRY, text, rank=rank_number, node=node)


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
        ((rank(ExitCode.RETRY, "port 12345 is taken: choose another one"),), ""),
        ((missing("b"), missing("b", rank_number=2, node="c")), "b"),
        ((missing("b, c", ranks="1, 2"), missing("a", rank_number=1, node="b", ranks="0")), "a"),  # a cannot be reached
        ((missing("b, c", ranks="1, 2"),), ""),
        ((missing("b"), missing("a", rank_number=1, node="b", ranks="0")), ""),  # each says it of the other
        ((missing("b"), CRASHED), "b"),
        ((missing("c"), CRASHED), "b"),  # which had a reason of its own for not being there
    ],
)
def test_the_node_of_the_rank_at_fault_or_the_one_that_did_not_arrive_is_blamed(
    exits: tuple[RankExit, ...], blamed: str
) -> None:
    assert decide(replace(ENDED, exits=exits, status=1), [], POLICY).node == blamed


CRASH = {"exits": (CRASHED,), "status": 1}
PREEMPTED = {"fate": "preempted", "exits": (STOPPED,)}


@pytest.mark.parametrize(
    ("ending", "past", "excluded"),
    [
        (PREEMPTED | {"slow": ("b", "c")}, [], ()),
        (PREEMPTED | {"slow": ("b", "c")}, [Past(0, "crashed", "b"), Past(5, "preempted", "", ("d",))], ("b",)),
        (CRASH | {"slow": ("b",)}, [], ()),  # one incarnation counts once
        (CRASH, [Past(0, "crashed", "a")], ()),
        (CRASH, [Past(0, "crashed", "b"), Past(5, "crashed", "a")], ("b",)),
        (PREEMPTED, [Past(0, "crashed", "b"), Past(5, "crashed", "b")], ("b",)),
    ],
)
def test_a_node_that_failed_or_was_slow_twice_is_avoided_whatever_ended_the_run(
    ending: dict[str, Any], past: list[Past], excluded: tuple[str, ...]
) -> None:
    decision = decide(replace(ENDED, **ending), past, POLICY)
    assert (decision.slow, decision.exclude) == (ending.get("slow", ()), excluded)
