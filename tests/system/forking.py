"""Starts Python programs by forking a server that has imported all of training: that saves seconds of each process.

What DeepSpeed's launcher starts is forked in turn: its half that starts the ranks, and those. Each process shows the
command line of the program that it is, so that it is found by that.
"""

import atexit
import ctypes
import os
import runpy
import subprocess
import sys
import traceback
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

from tests.pages import ROOT
from tests.pretrain.ranks import preload

EXECUTE = subprocess.Popen._execute_child


class Forked(ForkServerProcess):
    """A program in a session of its own, with the methods of `subprocess.Popen` that tests need."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        preload()
        super().__init__(target=_start, args=(command, environment, log))
        self.start()

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(str(self), timeout)
        return self.exitcode


def _start(command: list[str], environment: dict[str, str], log: Path) -> NoReturn:
    os.setsid()
    write_to(log)
    _become(command, environment)


def write_to(log: Path) -> None:
    """Let this process and its children write to a file, and work in the repository."""
    with log.open("a") as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(ROOT)


def _become(command: list[str], environment: dict[str, str]) -> NoReturn:
    code: Any = 0
    try:
        _show(command)
        os.environ.clear()
        os.environ.update(environment)
        _, *words = (word for word in command if word != "-u")
        module = words.pop(0) if words[0] == "-m" else None
        starts_others = words[0] == "deepspeed.launcher.launch" or words[0].endswith("/deepspeed")
        subprocess.Popen._execute_child = _fork if starts_others else EXECUTE
        sys.argv = words
        sys.path.insert(0, str(ROOT if module else Path(words[0]).parent))
        if module:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:  # noqa: BLE001 - as Python does at the end of a program
        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        os._exit(code)


def _fork(self: subprocess.Popen, command: list[str], *how: Any) -> None:
    """In the place of the method of `subprocess.Popen` that starts its program."""
    if command[0] != sys.executable:
        EXECUTE(self, command, *how)
        return
    self._child_created = True
    self.pid = os.fork()
    if self.pid == 0:
        _become(command, environment=how[5])


def _show(command: list[str]) -> None:
    """Write a command line over the one that this process has, as far as there is room."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = map(int, fields[45:47])  # arg_start and arg_end of proc(5), which counts from 1 and two fields before
    line = "\0".join(command).encode()[: end - begin - 1]
    ctypes.memmove(begin, line.ljust(end - begin, b"\0"), end - begin)
