"""Parent of a cluster's daemons: when whoever started it is gone, it ends them and everything that came of them.

slurmstepd detaches itself, so the death of slurmd or of a test run would leave it behind. Here it falls to this process
(a subreaper), which reads orders from its standard input and takes its end for the order to kill them all and to remove
the folder that it was given.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Start and kill programs as told, one JSON list a line: ``["start", name, log, *words]`` or ``["kill", name]``."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.setsid()  # Ctrl-C on the terminal is for the tests, which then close our input
    programs: dict[str, subprocess.Popen] = {}
    for line in sys.stdin:
        order, name, *words = json.loads(line)
        if order == "start":
            with open(words[0], "a") as log:  # noqa: PTH123
                programs[name] = subprocess.Popen(words[1:], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        elif name in programs:
            program = programs.pop(name)
            program.kill()
            program.wait()
        print("done", flush=True)
    while living := list(descendants()):
        kill_at_once(living)
        psutil.wait_procs(living, timeout=1)
    shutil.rmtree(sys.argv[1])


def kill_at_once(processes: list[psutil.Process]) -> None:
    """Stop all before the first is killed, so that none lives to report a death."""
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signum)


def descendants() -> Iterator[psutil.Process]:
    """All that came of this process and still lives; what ends while it is looked at does not count."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                yield child


if __name__ == "__main__":
    main()
