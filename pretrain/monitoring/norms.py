"""Norms of gradients and weights, for each part of the network, at any ZeRO stage."""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from pretrain.checkpoints.optimizer_shards import OptimizerShard, OptimizerShards

EMBED, HEAD = "embed", "head"


def part_of(name: str) -> str:
    """The part of a network that a parameter belongs to; for a LaViT "embed", "stage1" to "stage4" or "head".

    The embedding of stages 2 to 4 belongs to its stage; the final norm and the pool belong to the head. Of other
    networks it is the module or parameter of the outermost level.
    """
    if found := re.match(r"stages\.(\d+)\.(\w+)", name):
        return EMBED if found[1] == "0" and found[2] != "blocks" else f"stage{int(found[1]) + 1}"
    first = name.partition(".")[0]
    return HEAD if first in {"norm", "pool"} else first


class PartNorms:
    """Sums of squares over the shards that this rank owns, so that adding the ranks' sums gives those of the network.

    Gradients are measured just before the optimizer steps, when they are averaged, in fp32 and in its partitions at
    every stage. They are clipped there: all by one factor, so the norm before clipping, which DeepSpeed knows, restores
    them. No host waits for the device here.

    Args:
        shards: all shards of the engine.
    """

    def __init__(self, shards: OptimizerShards) -> None:
        self._shards = shards
        self.wanted = False
        """Whether the optimizer's next step measures the gradients."""
        self.parts = list(dict.fromkeys(map(part_of, shards.names)))
        """Names of the parts, in the order of the network."""
        self._by_partition: dict[int, list[OptimizerShard]] = {}
        for shard in shards.shards:
            self._by_partition.setdefault(id(shard.partition), []).append(shard)
        self._gradients: torch.Tensor | None = None
        shards.optimizer.register_step_pre_hook(self._look)

    @torch.no_grad()
    def squares(self, device: torch.device) -> torch.Tensor:
        """Squared norms of this rank's gradients, as the optimizer saw them, and of its weights; (2, parts) fp32.

        Those of the gradients are NaN where the optimizer took no step when it was due. They are forgotten.
        """
        weights = [shard.view("parameter", self._shards.optimizer) for shard in self._shards.shards]
        by_part = self._sums(weights, self._shards.shards, device)
        gradients, self._gradients = self._gradients, None
        return torch.stack([by_part.new_full(by_part.shape, torch.nan) if gradients is None else gradients.to(device),
                            by_part])  # fmt: skip

    @torch.no_grad()
    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before the optimizer steps, at ZeRO once for each partition."""
        if not self.wanted:
            return
        found = [
            (partition.grad.view(-1).narrow(0, shard.partition_offset, shard.length), shard)
            for group in optimizer.param_groups
            for partition in group["params"]
            if partition.grad is not None
            for shard in self._by_partition.get(id(partition), ())
        ]
        squares = self._sums([view for view, _ in found], [shard for _, shard in found], None)
        self._gradients = squares if self._gradients is None else self._gradients + squares.to(self._gradients.device)

    def _sums(
        self, views: list[torch.Tensor], shards: Sequence[OptimizerShard], device: torch.device | None
    ) -> torch.Tensor:
        where = views[0].device if views else None
        by_part: dict[str, list[torch.Tensor]] = {}
        for norm, shard in zip(torch._foreach_norm(views) if views else (), shards, strict=True):  # noqa: SLF001
            by_part.setdefault(part_of(shard.name), []).append(norm)
        zero = torch.zeros((), device=where)
        sums = [torch.stack(by_part[part]).square().sum() if part in by_part else zero for part in self.parts]
        return torch.stack(sums).to(device or where or "cpu")


def norms_of(parts: Sequence[str], squares: torch.Tensor, total: float | None) -> dict[str, float]:
    """Norms ``gradient/PART`` and ``weight/PART`` from the ``squares`` of all ranks together, (2, parts).

    Those of the gradient are scaled so that all together have the norm ``total`` where it is given, and left out where
    one is not finite, as after a step that was skipped.
    """
    norms = squares.sqrt()
    if total is not None and norms[0].any():
        norms[0] *= total / norms[0].norm()
    rows = zip(("gradient", "weight"), norms.tolist(), strict=True)
    return {
        f"{what}/{part}": norm
        for what, row in rows
        if all(map(math.isfinite, row))
        for part, norm in zip(parts, row, strict=True)
    }
