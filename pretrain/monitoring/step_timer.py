"""Where the time of a step goes."""

import time
from collections import deque
from typing import Any, Literal, get_args

import torch

Phase = Literal["data", "forward", "backward", "optimizer", "other"]
"""Waiting for data; network and loss; gradients with their averaging; the optimizer's step with clipping and, from ZeRO
stage 1 on, the exchange of weights; and the rest: metrics, agreements between ranks, the loop itself."""
PHASES: tuple[Phase, ...] = get_args(Phase)
MARKS = 1024
"""So many changes of phase are kept before the oldest are summed up: it bounds the events of a long interval."""


class StepTimer:
    """Splits the time of an interval's steps into phases, on the device's own clock where it is a GPU.

    There the host runs ahead of the device, so its clock does not measure the device's work: an event is put into the
    stream at every change of phase, and the events are read when they are over. The phase "data" is then the time that
    the device had nothing to do because data were missing.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._free: list[torch.cuda.Event] = []
        self._marks: deque[tuple[Phase | None, Any]] = deque()
        """Phases with their beginning: an event of the device's stream, or seconds of the host's clock."""
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: Phase | None) -> None:
        """From here on time is of this phase; None: of none, as during an evaluation."""
        mark: Any = time.monotonic()
        if self._cuda:
            mark = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((phase, mark))
        while len(self._marks) > MARKS and (not self._cuda or self._marks[1][1].query()):
            self._sum_oldest()

    def split(self) -> dict[Phase, float]:
        """Seconds of each phase since the last call. The host waits for the device, up to here."""
        self.enter("other")
        if self._cuda:
            self._marks[-1][1].synchronize()
        while len(self._marks) > 1:
            self._sum_oldest()
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds

    def _sum_oldest(self) -> None:
        (phase, began), (_, ended) = self._marks.popleft(), self._marks[0]
        if self._cuda:
            took = began.elapsed_time(ended) / 1e3
            self._free.append(began)
        else:
            took = ended - began
        if phase is not None:
            self._seconds[phase] += took
