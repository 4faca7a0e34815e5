"""Ranks agree on a stop at a step boundary. The flag itself is in ``fault_tolerance.signals``, which needs no torch."""

from typing import Protocol

import torch
import torch.distributed as dist


class Flag(Protocol):
    """What is agreed on once it is set on any rank: ``StopFlag``, or a deadline."""

    reason: str

    def __bool__(self) -> bool: ...


class StopAgreement:
    """Makes all ranks see a stop at the same step boundary, without waiting for each other in a good step.

    Each boundary starts an asynchronous maximum over the ranks' flags and reads the one that the boundary before
    started, so the answer is the same everywhere and one step old. It runs on a CPU (gloo) group: the device is
    never synchronized.
    """

    def __init__(self, flag: Flag, group: dist.ProcessGroup) -> None:
        self.flag = flag
        self.agreed = False
        self.group = group
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def at_step_boundary(self) -> bool:
        """Whether all ranks stop here. Collective: every rank must call this equally often."""
        if self.agreed:
            return True
        if self._pending is not None:
            work, value = self._pending
            work.wait()
            self.agreed = bool(value.item())
        if not self.agreed:
            value = torch.tensor([int(bool(self.flag))], dtype=torch.int32)
            work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
            assert work is not None
            self._pending = (work, value)
        return self.agreed

    def reason(self) -> str:
        """The reason of the lowest rank that has one. Collective: call it on all ranks, once agreed."""
        reasons: list[str] = [""] * dist.get_world_size(self.group)
        dist.all_gather_object(reasons, self.flag.reason, group=self.group)
        return next((reason for reason in reasons if reason), "asked to stop")
