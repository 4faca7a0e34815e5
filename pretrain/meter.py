"""Measurements of an interval, summed on the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from pretrain.fault_tolerance.spikes import LossLevel
from pretrain.monitoring.step_timer import StepTimer


class Meter:
    """Sums what the steps of an interval measured, on the device, so that no step waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.step_losses: list[float] = []
        """Loss of each step of the interval that ``means`` was asked for last, over its global batch."""
        self.level = LossLevel()
        self.timer = StepTimer(device)
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self._sums: dict[str, torch.Tensor] = {}
        self._losses: list[torch.Tensor] = []
        self._finite = torch.zeros((), device=self._device)
        self.steps = 0
        self._began = time.monotonic()

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add the measurements of a micro-batch, scalars on the device; left out where one of them is not finite.

        Its first is the loss, which is also kept by itself.
        """
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self._losses.append(stacked[0])
        finite = stacked.isfinite().all()
        self._finite = self._finite + finite
        for name, value in zip(values, torch.where(finite, stacked, 0.0), strict=True):
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def means(self) -> dict[str, float]:
        """Means over the interval and all ranks; none where nothing was finite. Collective; waits for the device."""
        self.step_losses = []
        if not self._sums:
            return {}
        stacked = torch.stack([*self._sums.values(), self._finite, *self._losses])
        dist.all_reduce(stacked)
        values = stacked.tolist()
        sums, count, losses = values[: len(self._sums)], values[len(self._sums)], values[len(self._sums) + 1 :]
        parts = len(losses) // self.steps * dist.get_world_size()
        micro_batches = zip(*[iter(losses)] * (len(losses) // self.steps), strict=True)
        self.step_losses = [sum(step) / parts for step in micro_batches]
        return {name: total / count for name, total in zip(self._sums, sums, strict=True)} if count else {}

    def seconds(self) -> float:
        """Wall-clock time of the interval, without what was excluded."""
        return time.monotonic() - self._began

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave time that is not training, such as an evaluation, out of the interval."""
        began = time.monotonic()
        self.timer.enter(None)
        try:
            yield
        finally:
            self.timer.enter("other")
            self._began += time.monotonic() - began
