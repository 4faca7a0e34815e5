"""The optimizer's state under any ZeRO stage, as named shards of parameters.

DeepSpeed keeps fp32 master weights and moments in flat partitions whose layout depends on stage and world size. An
``OptimizerShard`` has views of the elements of each parameter that a rank owns, so that a checkpoint
keyed by (name, offset, length) can be written and read under any layout.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpoints.buffers import Buffers
from pretrain.deepspeed_compat import flat_partitions, list_shards, torch_optimizer, update_weights

AVERAGE = "average"


@dataclass(frozen=True)
class OptimizerShard:
    """Elements ``[offset, offset + length)`` of a flattened parameter, owned by this rank."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    offset: int
    length: int
    partition: torch.Tensor
    """The fp32 tensor that the optimizer steps: a flat partition, or the parameter itself at stage 0."""
    partition_offset: int
    """Where the shard begins in the flattened ``partition``."""

    def view(self, kind: str, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """A writable 1-D view, fp32, ``length`` elements.

        Args:
            kind: "parameter" for the master weights, or the name of a state of the partition: a moment, the average.
            optimizer: holds the partitions' state.
        """
        whole = self.partition.data if kind == "parameter" else optimizer.state[self.partition][kind]
        return whole.view(-1).narrow(0, self.partition_offset, self.length)


class OptimizerShards:
    """All shards that this rank owns of a DeepSpeed engine, with the means to fill them.

    With ``average`` a moving average of the weights is kept next to the moments.
    """

    def __init__(self, engine: Any, *, average: bool = False) -> None:
        self._engine = engine
        self.stage: int = engine.zero_optimization_stage()
        """ZeRO stage of the engine."""
        self.optimizer = torch_optimizer(engine)
        """The torch optimizer that steps the partitions."""
        sgd = isinstance(self.optimizer, torch.optim.SGD)
        self._moments = ("momentum_buffer",) if sgd else ("exp_avg", "exp_avg_sq")
        self.kinds = ("parameter", *self._moments, *((AVERAGE,) if average else ()))
        """What a checkpoint holds of every shard."""
        names = {parameter: name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
        self.names = list(names.values())
        """Names of all parameters that are trained, on whatever rank."""
        fields = list_shards(engine, names) if self.stage else self._assign_parameters(names)
        self.shards = [OptimizerShard(*values) for values in fields]
        """This rank's shards, in the order of the model's parameters."""
        self.buffers = Buffers(engine.module)
        """What the network keeps in addition to its parameters."""
        self._prepare_state()

    def _prepare_state(self) -> None:
        """Give every partition zero moments and a zero step count, where the optimizer has not made them yet."""
        capturable = self.optimizer.defaults.get("fused") or self.optimizer.defaults.get("capturable")
        for partition in self._partitions():
            state = self.optimizer.state[partition]
            for kind in self._moments:
                state.setdefault(kind, torch.zeros_like(partition.data))
            if AVERAGE in self.kinds and AVERAGE not in state:
                state[AVERAGE] = partition.data.clone()
            state.setdefault("step", torch.zeros((), device=partition.device if capturable else "cpu"))

    def step_of(self, shard: OptimizerShard) -> float:
        """How many steps the optimizer has taken on this shard."""
        return float(self.optimizer.state[shard.partition]["step"])

    def filled(self, steps: dict[str, float]) -> None:
        """After all shards were filled: set step counts from those of the parameters, and update the model. Collective.

        Raises:
            ValueError: parameters that share a flat partition here took different numbers of steps.
        """
        by_partition: dict[torch.Tensor, set[float]] = {}
        for shard in self.shards:
            by_partition.setdefault(shard.partition, set()).add(steps[shard.name])
        for partition, values in by_partition.items():
            if len(values) != 1:
                raise ValueError(f"parameters of one partition have different optimizer steps: {sorted(values)}")
            self.optimizer.state[partition]["step"].fill_(values.pop())

        if self.stage:
            update_weights(self._engine)
            return
        for parameter, rank in self._stage0_rank.items():  # every rank holds all state, and has filled what it owns
            state = self.optimizer.state[parameter]
            for tensor in (parameter.data, *(state[kind] for kind in (*self.kinds[1:], "step"))):
                value = tensor.to(parameter.device)
                dist.broadcast(value, src=rank)
                tensor.copy_(value)

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the average of the weights towards them: ``average = decay * average + (1 - decay) * weights``.

        It is kept on the same flat fp32 partitions as the weights, so it needs no communication at any stage.
        """
        partitions = self._partitions()
        averages = [self.optimizer.state[partition][AVERAGE] for partition in partitions]
        torch._foreach_lerp_(averages, [partition.data for partition in partitions], 1.0 - decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Let the model compute with the average of its weights within the block, which must end alike on all ranks.

        Collective.
        """
        self._swap_average()
        yield
        self._swap_average()  # not after an error, which may be this rank's alone

    @torch.no_grad()
    def _swap_average(self) -> None:
        for partition in self._partitions():
            average = self.optimizer.state[partition][AVERAGE]
            weights = partition.data.clone()
            partition.data.copy_(average)
            average.copy_(weights)
        if self.stage:  # at stage 0 the partitions are the model's parameters themselves, on every rank
            update_weights(self._engine)

    def _partitions(self) -> list[torch.Tensor]:
        """All that the optimizer steps on this rank, flat partitions of padding only among them."""
        return flat_partitions(self._engine) if self.stage else list(self._stage0_rank)

    def _assign_parameters(self, names: dict[torch.nn.Parameter, str]) -> Iterator[tuple[Any, ...]]:
        """At stage 0 every rank has all parameters; spread the writing, largest first onto the least loaded rank."""
        load = [0] * dist.get_world_size()
        self._stage0_rank: dict[torch.nn.Parameter, int] = {}
        for parameter in sorted(names, key=lambda p: -p.numel()):
            rank = load.index(min(load))
            load[rank] += parameter.numel()
            self._stage0_rank[parameter] = rank
        for parameter, name in names.items():
            if self._stage0_rank[parameter] == dist.get_rank():
                yield name, tuple(parameter.shape), 0, parameter.numel(), parameter, 0
