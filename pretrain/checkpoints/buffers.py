"""Buffers of a network, such as the running statistics of BatchNorm: state that the optimizer does not own.

Every rank has its own, of the images that it saw. A checkpoint holds those of all ranks, so that a run that is resumed
with as many ranks continues exactly. Their mean over the ranks is what is evaluated and handed off, and what every rank
begins with where their number changed; of integers and truth values it is the first rank's. A moving average is kept of
weights only: it is evaluated, and handed off, with the buffers of the network itself.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from pretrain.engine.distributed import gather_rows
from pretrain.outcome import UserError


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of (ranks, ...) in float64, rounded once, so that equal values stay as they are; integers: the first."""
    return values.double().mean(0).to(values.dtype) if values.is_floating_point() else values[0]


class Buffers:
    """The persistent buffers of a network on this rank. It has no state of its own but a copy for skipped steps.

    Raises:
        UserError: the network saves something that is neither parameter nor buffer.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        kept = network.state_dict().keys() - {name for name, _ in network.named_parameters(remove_duplicate=False)}
        names = [name for name, _ in network.named_buffers(remove_duplicate=False) if name in kept]
        parts = {name: name.rpartition(".") for name in names}
        self._owners = {name: (network.get_submodule(owner), own) for name, (owner, _, own) in parts.items()}
        if unknown := kept - self._owners.keys():
            raise UserError(f"the network saves {', '.join(sorted(unknown)[:3])}, neither parameter nor buffer")
        self._before = self._flat()

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name; a network may replace them by others in every forward pass."""
        return {name: getattr(*owner) for name, owner in self._owners.items()}

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into them."""
        for name, buffer in self.tensors().items():
            buffer.copy_(values[name])
        self._before = self._flat()

    @torch.no_grad()
    def step_done(self, *, skipped: bool | Tensor) -> None:
        """After a step: where it was skipped, go back to the values before it. No host waits for a flag on a device."""
        now = self._flat()
        if isinstance(skipped, Tensor):
            now = {dtype: torch.where(skipped.bool(), self._before[dtype], flat) for dtype, flat in now.items()}
        elif skipped:
            now = self._before
        if skipped is not False:
            self._write(now)
        self._before = now

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the network compute with their mean over the ranks within the block. Collective."""
        own = self._flat()
        self._write({dtype: mean_over_ranks(gather_rows(flat[None])) for dtype, flat in own.items()})
        yield
        self._write(own)

    def _by_type(self) -> dict[torch.dtype, list[Tensor]]:
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.tensors().values():
            by_type.setdefault(buffer.dtype, []).append(buffer.detach())
        return by_type

    def _flat(self) -> dict[torch.dtype, Tensor]:
        """Copies, one after the other in one tensor for each type."""
        return {dtype: torch.cat([one.flatten() for one in some]) for dtype, some in self._by_type().items()}

    @torch.no_grad()
    def _write(self, flat: Mapping[torch.dtype, Tensor]) -> None:
        for dtype, buffers in self._by_type().items():
            parts = flat[dtype].split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])
