"""The same job on this machine without Slurm: one process per rank, restarted by the same rules."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from pretrain.fault_tolerance.signals import stop_signals
from pretrain.outcome import ExitCode
from pretrain.ports import free_port
from slurm.folder import Incarnation, SlurmFolder
from slurm.history import History
from slurm.restart import Ending, decide

POLL_S = 0.2
OTHERS_GET_S = 30.0
"""When a rank has failed, the others have so long to end by themselves, as they do when their peer is gone."""


def run_here(folder: SlurmFolder, ranks: int) -> int:
    """Run to the end; Ctrl-C, SIGTERM and a closed terminal save and end, as ``slurm.stop`` does.

    Returns:
        the exit status, as ``pretrain/main.py`` has it.
    """
    history, policy = History(folder.history), folder.read_launch().policy
    told: list[str] = []

    def note(signum: int, _frame: FrameType | None) -> None:
        told.append(signal.Signals(signum).name)

    for signum in stop_signals():
        signal.signal(signum, note)
    job, node = f"local{int(time.time())}", socket.gethostname()
    for restart in itertools.count():
        incarnation = Incarnation(job, restart)
        begun_at = folder.saved_step()
        history.begin(incarnation, nodes=[node], ranks=ranks, step=begun_at)
        status = _run_ranks(folder, incarnation, ranks, told)
        state = folder.state()
        ending = Ending(
            fate="running",
            exits=tuple(folder.read_exits(incarnation)),
            status=status,
            node_down=False,
            finished=state is not None and state.state == "finished",
            stop_request=folder.stop_request() or (f"{told[0]} on this machine" if told else ""),
            begun_at=begun_at,
            saved_at=folder.saved_step(),
        )
        decision = decide(ending, history.past(incarnation), policy)
        history.end(incarnation, decision, step=folder.saved_step())
        _say(f"{decision.cause}: {decision.reason}")
        if decision.action == "none":
            return {"finished": ExitCode.FINISHED, "stopped": ExitCode.STOPPED}.get(decision.cause, status)
        deadline = time.monotonic() + decision.wait_s
        while time.monotonic() < deadline and not told:
            time.sleep(POLL_S)
    raise AssertionError


def _run_ranks(folder: SlurmFolder, incarnation: Incarnation, ranks: int, told: list[str]) -> int:
    """Start all ranks and wait for them; when one fails the others are ended. The highest exit status."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_NAMES": socket.gethostname()}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "slurm.job", str(folder.run), "--local", str(incarnation.job),
             str(incarnation.restart), str(rank), str(ranks)],
            env=os.environ | common, start_new_session=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    passed_on, deadline = 0, float("inf")
    while any(task.poll() is None for task in tasks):
        living = [task for task in tasks if task.poll() is None]
        if folder.stop_request() and not told:
            told.append("slurm.stop")
        if len(told) > passed_on:
            passed_on = len(told)
            for task in living:
                task.send_signal(signal.SIGTERM)
        if any(task.poll() for task in tasks):
            deadline = min(deadline, time.monotonic() + OTHERS_GET_S)
        if time.monotonic() > deadline:
            for task in living:
                task.kill()
        time.sleep(POLL_S)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
