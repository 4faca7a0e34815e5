"""What runs in every task of a job: one rank of training, watched. ``python -m slurm.job RUN`` or through submitit.

It holds nothing but the run's folder. Any attempt finds the newest checkpoint there by itself; submitit's own
``checkpoint()`` and requeue are not used, since a save is collective and cannot be made in a signal handler.
"""

import argparse
import os
import re
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
from pretrain.outcome import ExitCode
from slurm.attempt import this_attempt
from slurm.folder import Attempt, SlurmFolder, read_json_object
from slurm.restart import RankExit

MAIN = Path(__file__).resolve().parent.parent / "pretrain" / "main.py"
FORWARDED = (signal.SIGTERM, signal.SIGUSR2)
DRAIN_S = 5.0
"""What a dead rank had printed is read for so long, in case something that it started holds its output open."""
_ERROR = re.compile(r"(?:\[rank\d+\]: *)?(?:error: (.*)|([A-Za-z_.]*(?:Error|Exception)\b.*))")


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    attempt: Attempt

    @classmethod
    def from_slurm(cls) -> "Place":
        """As the environment of a task of Slurm says."""
        world_size = int(os.environ["SLURM_STEP_NUM_TASKS"])
        return cls(
            rank=int(os.environ["SLURM_PROCID"]),
            world_size=world_size,
            local_rank=int(os.environ["SLURM_LOCALID"]),
            local_world_size=world_size // int(os.environ["SLURM_STEP_NUM_NODES"]),
            node=os.environ["SLURMD_NODENAME"],
            attempt=this_attempt(),
        )

    def write_exit(self, folder: SlurmFolder, code: int, cause: str, message: str, **facts: Any) -> None:
        """Write down how this rank ended."""
        ended = RankExit(self.rank, self.node, code, time.time(), cause=cause, message=message, **facts)
        folder.write_exit(self.attempt, ended)


@dataclass(frozen=True)
class Job:
    """The object that submitit pickles."""

    run: Path

    def __call__(self) -> None:
        """Run this task's rank to its end; a bad end is the exit status of the task."""
        status = run_rank(SlurmFolder(self.run), Place.from_slurm())
        if status:
            sys.exit(status)


def run_rank(folder: SlurmFolder, place: Place) -> int:
    """Start ``main.py`` as a rank, pass signals on, keep its output, write down how it ended.

    Returns:
        the exit status for the task. Having stopped as asked is 0: a task that ends with anything else makes Slurm kill
        the others, which may still be closing their files.
    """
    log, record = folder.log(place.attempt, place.rank), folder.exit_record(place.attempt, place.rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    first = os.environ["NODE_NAMES"].split(",")[0]
    if place.rank == 0 and place.node != first:
        message = f"rank 0 runs on {place.node}, but the others look for it on {first}"
        place.write_exit(folder, ExitCode.RETRY, "failed", message)
        return ExitCode.RETRY
    launch = folder.read_launch()
    limit = launch.policy.time_to_save_s
    told: list[str] = []
    overdue: list[str] = []
    child: subprocess.Popen[bytes] | None = None

    def give_up() -> None:
        if child is not None and child.poll() is None:
            overdue.append(f", but had not saved within {limit:.0f} s")
            child.kill()

    def forward(signum: int, _frame: FrameType | None) -> None:
        told.append(signal.Signals(signum).name)
        if child is not None:
            child.send_signal(signum)
        if signum == signal.SIGUSR2 and told.count("SIGUSR2") == 1:
            # At the time limit Slurm kills the batch script too, and nobody would be left to start the run again.
            timer = threading.Timer(limit, give_up)
            timer.daemon = True
            timer.start()

    for signum in FORWARDED:
        signal.signal(signum, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the terminal sends it
    if asked := folder.stop_request():  # its signal may have come before srun had any task that could hear it
        place.write_exit(folder, ExitCode.STOPPED, "stopped", asked)
        return 0
    child = subprocess.Popen(
        [sys.executable, "-u", str(MAIN), "--recipe", str(folder.recipe), "--deepspeed_config",
         str(folder.deepspeed_config), "--runs", str(folder.run.parent), "--device", launch.device],
        env=_environment(place) | {"EXIT_RECORD": str(record)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if told:  # before there was a child
        child.terminate()
    output = Output(child, log, echo=place.rank == 0)
    code = child.wait()
    printed = output.last_error()
    if overdue or (told and -code in FORWARDED):  # the latter: before it listened to signals
        code = ExitCode.STOPPED
    if code == ExitCode.FINISHED:
        place.write_exit(folder, code, "finished", "")
    elif code == ExitCode.STOPPED:
        place.write_exit(folder, code, "not saved" if overdue else "stopped", "".join((*told[:1], *overdue)))
    elif "cause" in (facts := read_json_object(record)):
        place.write_exit(folder, code, **{key: facts[key] for key in ("cause", "message", "phase", "blamed")})
    elif code < 0:
        by = f"killed by {signal.Signals(-code).name}" + (f" after: {output.error}" if output.error else "")
        place.write_exit(folder, code, "killed", by)
    else:
        place.write_exit(folder, code, "failed", printed)
    if code < 0:
        return 128 - code
    return 0 if code == ExitCode.STOPPED else code


def _environment(place: Place) -> dict[str, str]:
    return os.environ | {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "LAUNCHER_PID": str(os.getpid()),
    }


class Output:
    """Copies what a rank prints to its log, and where ``echo`` to our own output, in a thread; keeps its last error."""

    def __init__(self, child: "subprocess.Popen[bytes]", log: Path, *, echo: bool) -> None:
        assert child.stdout is not None
        self._stream = child.stdout
        self._sinks: list[IO[bytes]] = [log.open("ab", buffering=0), *([sys.stdout.buffer] if echo else [])]
        self.error = self._line = ""
        self._thread = threading.Thread(target=self._copy, name="output", daemon=True)
        self._thread.start()

    def last_error(self) -> str:
        """The last error that was printed, else the last line; one line. Call it when the rank has ended."""
        self._thread.join(DRAIN_S)
        return str(without_secrets((self.error or self._line)[:500]))

    def _copy(self) -> None:
        for line in self._stream:
            for sink in list(self._sinks):
                try:
                    sink.write(line)
                    sink.flush()
                except OSError as problem:  # a full disk must not stop the reading, on which the rank would wait
                    self._sinks.remove(sink)
                    print(f"WARNING a log of this rank ends here: {problem}", file=sys.stderr)  # noqa: T201
            text = line.decode(errors="replace").strip()
            self._line = text or self._line
            if found := _ERROR.match(text):
                self.error = found[1] or found[2]


def main(arguments: list[str] | None = None) -> int:
    """Run the rank of a task of Slurm."""
    parser = argparse.ArgumentParser(prog="python -m slurm.job", description=main.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="runs/NAME")
    return run_rank(SlurmFolder(parser.parse_args(arguments).run.resolve()), Place.from_slurm())


if __name__ == "__main__":
    sys.exit(main())
