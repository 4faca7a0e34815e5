"""What submitit runs in every task of a job: one rank of training, watched.

It holds nothing but the run's folder. Any attempt finds the newest checkpoint there by itself; submitit's own
``checkpoint()`` and requeue are not used, since a save is collective and cannot be made in a signal handler.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from data_pipeline.errors import without_secrets
from pretrain.files import write_atomically
from pretrain.outcome import ExitCode
from slurm.attempt import ROOT, this_attempt
from slurm.folder import SlurmFolder, read_json_object

MAIN = ROOT / "pretrain" / "main.py"
FORWARDED = (signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True)
class Job:
    """The object that submitit pickles."""

    run: Path

    def __call__(self) -> None:
        """Run this task's rank to its end; a bad end is the exit status of the task."""
        if status := run_rank(SlurmFolder(self.run)):
            sys.exit(status)


def run_rank(folder: SlurmFolder) -> int:
    """Start ``main.py`` as the rank of this task, pass signals on, keep its output, write down how it ended.

    Returns:
        the exit status for the task. Having stopped as asked is 0: a task that ends with anything else makes Slurm kill
        the others, which may still be closing their files.
    """
    attempt, rank, node = this_attempt(), int(os.environ["SLURM_PROCID"]), os.environ["SLURMD_NODENAME"]
    record = folder.exit_record(attempt, rank)

    def write_exit(code: int, **facts: Any) -> int:
        """Complete what ``main.py`` recorded (see ``RankExit``); the exit status for the task."""
        known = {"rank": rank, "node": node, "code": code, "time": time.time(), **facts}
        write_atomically(record, json.dumps(read_json_object(record) | known).encode())
        if code == ExitCode.STOPPED:
            return 0
        return code if code >= 0 else 128 - code

    if rank == 0 and node != (first := os.environ["NODE_NAMES"].split(",")[0]):
        return write_exit(ExitCode.RETRY, cause="failed", message=f"rank 0 runs on {node}, but is expected on {first}")
    launch = folder.read_launch()
    limit = launch.policy.save_within_s - min(10.0, launch.policy.save_within_s / 4)  # the rest is for starting again
    received: list[str] = []
    overdue: list[str] = []
    child: subprocess.Popen[bytes] | None = None

    def give_up() -> None:
        if child is not None and child.poll() is None:
            overdue.append(f", but had not saved within {limit:.0f} s")
            child.kill()

    def forward(signum: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(signum).name)
        if child is not None:
            child.send_signal(signum)
        if signum == signal.SIGUSR2 and received.count("SIGUSR2") == 1:
            # At the time limit Slurm kills the batch script too, and nothing would restart the run.
            timer = threading.Timer(limit, give_up)
            timer.daemon = True
            timer.start()

    for signum in FORWARDED:
        signal.signal(signum, forward)
    if asked := folder.stop_request():  # its signal may have come before srun had any task that could hear it
        return write_exit(ExitCode.STOPPED, cause="stopped", message=asked)
    ranks = int(os.environ["SLURM_STEP_NUM_TASKS"])
    child = subprocess.Popen(
        [sys.executable, "-u", str(MAIN), "--recipe", str(folder.recipe), "--deepspeed_config",
         str(folder.deepspeed_config), "--runs", str(folder.run.parent), "--device", launch.device],
        env=os.environ | {
            "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(ranks // int(os.environ["SLURM_STEP_NUM_NODES"])),
            "LAUNCHER_PID": str(os.getpid()), "EXIT_RECORD": str(record),
        },
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if received:  # before there was a child
        child.terminate()
    output = Output(child, folder.log(attempt, rank), echo=rank == 0)
    code = child.wait()
    printed = output.last_line()
    if overdue or (received and -code in FORWARDED):  # the latter: before it listened to signals
        code = ExitCode.STOPPED
    if code == ExitCode.FINISHED:
        return write_exit(code, cause="finished")
    if code == ExitCode.STOPPED:
        return write_exit(code, cause="not saved" if overdue else "stopped", message="".join((*received[:1], *overdue)))
    if "cause" in read_json_object(record):
        return write_exit(code)
    if code < 0:
        return write_exit(code, cause="killed", message=f"killed by {signal.Signals(-code).name} after: {printed}")
    return write_exit(code, cause="failed", message=printed)


class Output:
    """Copies what a rank prints to its log, and where ``echo`` to our own output, in a thread."""

    def __init__(self, child: "subprocess.Popen[bytes]", log: Path, *, echo: bool) -> None:
        assert child.stdout is not None
        self._stream = child.stdout
        self._sinks: list[IO[bytes]] = [log.open("ab", buffering=0), *([sys.stdout.buffer] if echo else [])]
        self._line = ""
        self._thread = threading.Thread(target=self._copy, name="output", daemon=True)
        self._thread.start()

    def last_line(self) -> str:
        """The last line that was printed, such as that of an exception. Call it when the rank has ended."""
        self._thread.join(5.0)  # not for ever: something that it started may hold its output open
        return str(without_secrets(self._line[:500].removeprefix("error: ")))

    def _copy(self) -> None:
        for line in self._stream:
            for sink in list(self._sinks):
                try:
                    sink.write(line)
                    sink.flush()
                except OSError as problem:  # a full disk must not stop the reading, on which the rank would wait
                    self._sinks.remove(sink)
                    print(f"WARNING a log of this rank ends here: {problem}", file=sys.stderr)  # noqa: T201
            self._line = line.decode(errors="replace").strip() or self._line
