"""Times a start, from the start of the process to the end of its first step."""

import os
import time
from pathlib import Path


class StartUp:
    """Seconds of each phase of a start, in the order in which they first ended.

    Args:
        phase: name of the phase that began with this process and ends now.
    """

    def __init__(self, phase: str) -> None:
        self.seconds: dict[str, float] = {}
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        self._ended = time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - began)
        self.end(phase)

    def end(self, phase: str) -> None:
        """End a phase, which began when the one before ended. The seconds of phases of the same name are added up."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._ended
        self._ended = now

    def table(self) -> str:
        """The names of the phases in one line, and their seconds below."""
        columns = {**self.seconds, "total": sum(self.seconds.values())}
        values = "  ".join(f"{seconds:{len(name)}.2f}" for name, seconds in columns.items())
        return f"start-up (s)  {'  '.join(columns)}\n              {values}"
