"""Ends a rank that hangs, after saying where: a data stall and a collective that never returns look alike from outside.

Every rank watches itself. When one rank is stuck all others soon wait for it, so all of them run into the limit at
about the same time, and their stacks side by side show who is not where the others are.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from data_pipeline.store import hanging_read
from pretrain.outcome import ExitCode, record_exit

WRITE_LIMIT_S = 20.0
"""Longest time for writing the stacks."""
EXIT_DELAY_S = 5.0
"""The first rank to notice waits so long before it ends, since the launcher then ends the others."""
REPORT_FIRST_S = 60.0
"""Collectives may take so much longer than the limit: their own error does not name the phase of the other ranks."""


class Watchdog:
    """Watches the time since the last ``beat`` in a thread of its own.

    Args:
        folder: where the stacks are written, one file per rank and hang.
        rank: this rank.
        start_s: limit, in seconds, while starting, and within phases that may take as long.
        step_s: limit, in seconds, otherwise.
        on_hang: called with the reason, in one line, before the process ends.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        start_s: float,
        step_s: float,
        on_hang: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._folder, self._rank, self._on_hang = folder, rank, on_hang
        self._start_s, self._step_s = start_s, step_s
        self.starting = True
        """Whether the long limit holds for every phase: until the first step, which may compile, is over."""
        self._beat = (time.monotonic(), "starting", start_s)
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, phase: str, *, startup: bool = False) -> None:
        """Record that this rank proceeds to ``phase``; the limit of the start holds for it where ``startup``."""
        self._beat = (time.monotonic(), phase, self._start_s if startup or self.starting else self._step_s)

    @property
    def phase(self) -> str:
        """What this rank does, from the last ``beat``."""
        return self._beat[1]

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._step_s / 10)):
            since, phase, limit = self._beat
            if time.monotonic() - since > limit:
                self._end(phase, time.monotonic() - since)

    def _end(self, phase: str, seconds: float) -> None:
        reason = f"rank {self._rank} hangs: {phase} for {seconds:.0f} s"
        if read := hanging_read(seconds / 2):
            reason = f"{reason} ({read})"
        os.write(2, f"error: {reason}\n".encode())
        # In a thread of its own: what hangs may be the very storage that this writes to.
        report = threading.Thread(target=self._report, args=(phase, reason), daemon=True)
        report.start()
        report.join(WRITE_LIMIT_S)
        time.sleep(EXIT_DELAY_S)
        os._exit(ExitCode.RETRY)

    def _report(self, phase: str, reason: str) -> None:
        record_exit(phase, reason, cause="hang")
        file = self._folder / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-rank-{self._rank:05d}.txt"
        where = f"in {file}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with file.open("w") as handle:
                handle.write(f"{reason}\n\n")
                handle.flush()
                faulthandler.dump_traceback(handle, all_threads=True)
        except OSError as error:
            where = f"in the log, since {file} could not be written: {error}"
            faulthandler.dump_traceback(2, all_threads=True)
        self._on_hang(f"{reason}; stacks of all threads {where}")
