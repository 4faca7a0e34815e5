"""Stop is a flag: signals and lost launchers set it, every loop polls it.

Imported before anything heavy, so that a launcher which dies while torch is being imported is noticed too.
"""

import contextlib
import ctypes
import os
import select
import signal
import threading
import time
from types import FrameType

import psutil

from pretrain.outcome import ExitCode

PR_SET_PDEATHSIG = 1  # prctl(2)
REPORT_WAIT_S = 15.0
"""While starting, all ranks meet the same error and the first of a node reports it: the others give it this time,
since the launcher ends it as soon as one of them exits."""


class StopFlag:
    """A request to stop, with its reason. Set from signal handlers and threads, read by the loops."""

    def __init__(self) -> None:
        self.reason = ""

    def request(self, reason: str) -> None:
        """Ask for a stop; the first reason is kept."""
        self.reason = self.reason or reason

    def __bool__(self) -> bool:
        return bool(self.reason)

    def install_signal_handlers(self) -> None:
        """Let ``stop_signals`` ask for a stop. A second SIGINT ends the process at once, unsaved."""

        def ask(signum: int, _frame: FrameType | None) -> None:
            name = signal.Signals(signum).name
            if signum == signal.SIGINT and self.reason == "SIGINT":
                os.write(2, b"stopped immediately, not saved\n")
                os._exit(ExitCode.STOPPED)
            self.request(name)

        for signum in (*stop_signals(), signal.SIGUSR2):
            signal.signal(signum, ask)


def stop_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM, and SIGHUP, which a closed terminal sends, unless it is ignored as below ``nohup``."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


def first_reports(flag: StopFlag) -> bool:
    """Whether the first rank reports the error, too: it exits then, and the launcher asks this one to stop."""
    until = time.monotonic() + REPORT_WAIT_S
    while not flag and time.monotonic() < until:
        time.sleep(0.1)
    return bool(flag)


def watch_launcher(flag: StopFlag, *, grace_s: float = 120.0) -> None:
    """Ask for a stop when the launcher above this process dies, and end the process if that hangs.

    A launcher gives its process id in LAUNCHER_PID; ``torchrun`` and ``deepspeed`` are found by their commands. The
    latter is two processes: ``deepspeed`` itself, which dies of SIGTERM without telling anyone, and its child, which
    starts the ranks.
    If it is gone nothing waits for this rank any more: it saves and exits. After ``grace_s`` seconds it ends without
    having saved.
    """
    starter = os.environ.get("LAUNCHER_PID")
    launchers = [process for process in psutil.Process().parents() if _is_launcher(process, starter)]
    if not launchers:
        # Only deepspeed's launcher sets CROSS_RANK, only torchrun sets TORCHELASTIC_RUN_ID: it died before this line.
        if starter or {"CROSS_RANK", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
            flag.request("the launcher died")
        return
    # The kernel's own word for the direct parent, also if the thread below never gets to run.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    descriptors = []
    for process in launchers:
        try:
            descriptors.append(os.pidfd_open(process.pid))
        except ProcessLookupError:
            flag.request("the launcher died")

    def wait() -> None:
        if not flag.reason:
            select.select(descriptors, [], [])
        flag.request("the launcher died")
        threading.Event().wait(grace_s)
        os.write(2, b"the launcher died and saving hangs: exiting without saving\n")
        os._exit(ExitCode.RETRY)

    threading.Thread(target=wait, name="launcher-watch", daemon=True).start()


def _is_launcher(process: psutil.Process, starter: str | None) -> bool:
    if starter:
        return process.pid == int(starter)
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        # `python .../bin/deepspeed main.py`, `python -u -m deepspeed.launcher.launch ...`, and the same of torchrun
        modules = ("deepspeed.launcher.launch", "torch.distributed.run")
        return any(word in modules or word.endswith(("/deepspeed", "/torchrun")) for word in words[:5])
    return False
