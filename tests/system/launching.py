"""Starts training as a person does, and knows every process that came of it."""

import contextlib
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from torch.multiprocessing.spawn import ProcessExitedException

from pretrain.metrics import read_metrics
from pretrain.ports import free_port
from tests import RANK_VARIABLES
from tests.pretrain.ranks import start_ranks
from tests.system.forking import Forked, write_to

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/demo.yaml"
PROGRAM = ("pretrain/main.py",)
INJECT = "tests/system/inject.py"
PATIENCE_S = 180.0
"""A start takes ten seconds on a quiet machine; the bound only keeps a hang from lasting for ever."""


class Launched:
    """A started launcher (or bare ``python``) with the log that it writes."""

    def __init__(self, command: list[str], log: Path, *, gpu: bool = False, anew: bool = False) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        if not gpu:
            environment["DS_ACCELERATOR"] = "cpu"
        self.log = log
        if anew:
            with log.open("w") as handle:
                self.process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=handle, stderr=subprocess.STDOUT, start_new_session=True
                )
        else:
            self.process = Forked(command, environment, log)
        self._seen: dict[int, psutil.Process] = {}

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """Training processes below the launcher, in the order of their rank."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    words = process.cmdline()
                    trains = any(word.endswith(("/main.py", "/inject.py")) for word in words)
                    if trains and "deepspeed.launcher.launch" not in words:
                        found.append(process)
        self._seen |= {process.pid: process for process in found}
        return sorted(found, key=lambda p: p.pid)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until ``condition`` holds; fails with the log when the run ends or time is up before."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}:\n{self.output()}"
            time.sleep(0.05)
        self.ranks()

    def wait_for_steps(self, run: Path, steps: int) -> None:
        """Wait until ``metrics.jsonl`` of a run tells of so many steps."""
        self.wait_for(lambda: reached(run) >= steps, f"step {steps}")

    def end(self, patience_s: float = PATIENCE_S) -> int:
        """The launcher's exit status; until then every rank is seen."""
        deadline = time.monotonic() + patience_s
        while self.process.poll() is None and time.monotonic() < deadline:
            self.ranks()
            time.sleep(0.2)
        return self.process.wait(0)

    def assert_no_rank_stays(self) -> None:
        """Every rank that was ever seen is gone soon."""
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=60)
        assert not alive, f"{alive} still run:\n{self.output()}"

    def kill_all(self) -> None:
        """Leave nothing behind, whatever the test did."""
        self.ranks()
        for process in [*self._seen.values()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def launched(
    folder: Path,
    *arguments: str,
    ranks: int = 2,
    launcher: str = "deepspeed",
    program: tuple[str, ...] = PROGRAM,
    gpu: bool = False,
    anew: bool = False,
) -> Iterator[Launched]:
    """Start training with ``deepspeed`` or ``torchrun`` on so many ranks; with 0, start ``program`` bare.

    Args:
        folder: that of the runs.
        arguments: of the program.
        ranks: training processes.
        launcher: what starts them.
        program: a script, with its first arguments.
        gpu: whether it may use one; else it runs on the CPU, whatever there is.
        anew: whether each process begins as a user's does, as with a GPU and under ``torchrun``; else they are forked
            from one that has imported everything.
    """
    command = [*starter(launcher, ranks), *command_line(folder, program, arguments)]
    run = Launched(command, new_log(folder), gpu=gpu, anew=anew or gpu or launcher != "deepspeed")
    try:
        yield run
    finally:
        run.kill_all()


def starter(launcher: str, ranks: int) -> list[str]:
    """The words before a program and its arguments."""
    options = {
        "deepspeed": ["--num_accelerators", str(ranks), "--master_port", str(free_port())],
        "torchrun": ["--standalone", "--nproc_per_node", str(ranks)],
    }
    binary = str(Path(sys.executable).parent / launcher)
    return [sys.executable, *([binary, *options[launcher]] if ranks else [])]


def trained(
    folder: Path,
    *arguments: str,
    ranks: int = 1,
    program: tuple[str, ...] = PROGRAM,
    file_size_limit: int | None = None,
) -> tuple[int, str]:
    """Run ``program`` to its end on ranks without a launcher: forked from a process that has imported everything.

    Args:
        folder: that of the runs.
        arguments: of the program.
        ranks: on the CPU.
        program: a script, with its first arguments.
        file_size_limit: bytes beyond which no file can grow: the write fails, as on a full disk.

    Returns:
        the exit status of the first rank that fails, negative for a signal, or 0; and the output.
    """
    log = new_log(folder)
    try:
        start_ranks(ranks, _run_script, command_line(folder, program, arguments), log, file_size_limit)
    except ProcessExitedException as ended:
        return ended.exit_code, log.read_text()
    return 0, log.read_text()


def _run_script(words: list[str], log: Path, file_size_limit: int | None) -> None:
    if file_size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    write_to(log)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def new_log(folder: Path) -> Path:
    """The file for the output of the next start in a folder of runs."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"launch-{len(list(folder.glob('launch-*.log')))}.log"
    log.touch()
    return log


def command_line(folder: Path, program: tuple[str, ...], arguments: tuple[str, ...]) -> list[str]:
    return [*program, "--recipe", str(RECIPE), "--runs", str(folder), *arguments]


def reached(run: Path) -> int:
    """The newest step that the metrics tell of."""
    with contextlib.suppress(FileNotFoundError):
        return max((row["step"] for row in read_metrics(run / "metrics.jsonl", "train")), default=0)
    return 0


def changes(**fields: object) -> list[str]:
    """``--set`` arguments; dots of a key are written as double underscores."""
    return [word for key, value in fields.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
