"""Memory of one rank: what DeepSpeed 0.19 holds at each ZeRO stage, and the moment at which most lives at once.

The sums follow what its engine does, allocation by allocation, on top of a rehearsal of the passes. They are checked
against measured peaks by ``benchmarks/memory.py``; they cannot see what is no tensor: the CUDA context, NCCL's and
DALI's own buffers, an allocator's fragmentation.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models import LaViT
from models.config import LaViTConfig
from pretrain.check import COPIES
from pretrain.engine.deepspeed_config import ResolvedDeepSpeed
from pretrain.engine.deepspeed_keys import FLOATS
from pretrain.engine.precision import Precision, input_dtype
from pretrain.planning.rehearsal import Passes, Policy, Rehearsal
from pretrain.recipe import Recipe

ALL_REDUCE = 500_000_000
"""Elements that DeepSpeed flattens at once to reduce gradients at stage 0; a constant of its engine."""
BUCKET, PERSISTENT, PREFETCH = 500_000_000, 100_000, 50_000_000
"""DeepSpeed's defaults of reduce_bucket_size, stage3_param_persistence_threshold and stage3_prefetch_bucket_size."""


@dataclass(frozen=True)
class Engine:
    """How DeepSpeed holds a network, as far as it decides about memory."""

    stage: int
    ranks: int
    accumulation: int
    element: int
    """Bytes of a weight and of its gradient in the network."""
    wide_gradients: bool
    """Whether gradients of 16 bits are summed in fp32."""
    low_traffic: bool
    """Whether gradients of 32 bits travel in 16, as under torch_autocast."""
    states: int
    """fp32 numbers of the optimizer for each weight, its master included."""
    average: bool
    bucket: int
    """Elements that are reduced at once."""
    contiguous: bool
    overlap: bool
    """Whether gradients are sent while the backward pass runs; at stage 0 they always are."""
    persistent: int
    """Stage 3: parameters of so many elements or fewer are never cut."""
    prefetch: int
    """Stage 3: elements that are gathered in one go, ahead of their use."""
    states_on_host: bool
    weights_on_host: bool

    @property
    def buckets_stay(self) -> bool:
        """Whether gradients are averaged by ``pretrain.engine.data_parallel``."""
        return self.stage == 0 and self.ranks > 1

    @classmethod
    def of(cls, recipe: Recipe, resolved: ResolvedDeepSpeed) -> "Engine":
        """As a recipe and a resolved configuration have it."""
        zero, element = resolved.config.get("zero_optimization", {}), input_dtype(resolved.precision).itemsize
        summed = resolved.config.get("data_types", {}).get("grad_accum_dtype")
        wide = element == 2 and FLOATS.get(summed, summed) == "float32"
        on_host = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
        # For these DeepSpeed takes its BF16_Optimizer, which reduces when the backward pass is over.
        at_the_end = resolved.stage == 1 and resolved.precision == "bf16" and wide and not on_host
        given = zero.get("overlap_comm")
        overlap = resolved.stage == 3 if given is None else bool(given) and not at_the_end
        return cls(
            stage=resolved.stage,
            ranks=resolved.batch.world_size,
            accumulation=resolved.batch.accumulation,
            element=element,
            wide_gradients=wide,
            low_traffic=resolved.precision == "bf16 autocast" and resolved.stage > 0,
            states=COPIES[recipe.optimizer.kind],
            average=recipe.ema is not None,
            bucket=int(zero.get("reduce_bucket_size", BUCKET)),
            contiguous=bool(zero.get("contiguous_gradients", True)),
            overlap=resolved.stage == 0 or overlap,
            persistent=int(zero.get("stage3_param_persistence_threshold", PERSISTENT)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", PREFETCH)),
            states_on_host=on_host,
            weights_on_host=(zero.get("offload_param") or {}).get("device") == "cpu",
        )


@dataclass(frozen=True)
class Moment:
    """What lives beside the standing parts, in bytes."""

    phase: str
    activations: int
    """With the temporaries of operators."""
    gradients: int
    buffers: int
    """Flattened copies of gradients, gathered weights."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.gradients + self.buffers


@dataclass(frozen=True)
class Memory:
    """Of one rank, in bytes, at its peak."""

    weights: int
    states: int
    """Masters and moments of the optimizer."""
    average: int
    standing_gradients: int
    input: int
    """Batches that the loader prepares ahead."""
    peak: Moment
    host: int
    """In the CPU's memory: what is offloaded."""

    @property
    def standing(self) -> int:
        """What is there between two steps."""
        return self.weights + self.states + self.average + self.standing_gradients + self.input

    @property
    def total(self) -> int:
        """The most that lives at once."""
        return self.standing + self.peak.total

    def parts(self) -> dict[str, int]:
        """By name, in the order of a table."""
        return {
            "weights": self.weights,
            "gradients": self.standing_gradients + self.peak.gradients,
            "optimizer": self.states,
            "ema": self.average,
            "activations": self.input + self.peak.activations,
            "buffers": self.peak.buffers,
        }


@functools.cache
def memory_model(config: LaViTConfig, precision: Precision, *, mixed: bool, gpu: bool) -> "MemoryModel":
    """Rehearse a network (seconds) and count its parameters.

    Args:
        config: the network.
        precision: what the engine computes in.
        mixed: whether mixup or CutMix make a new picture of two.
        gpu: whether autocast keeps the types that it keeps on a GPU, or those of a CPU.
    """
    with torch.device("meta"):
        model = LaViT(config)
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return MemoryModel(Rehearsal(config, precision, mixed=mixed, gpu=gpu), shapes, model.no_weight_decay())


class MemoryModel:
    """Memory of a rank that trains a network.

    Args:
        rehearsal: of the network, in the precision of the engine.
        shapes: elements of every parameter, in the model's order.
        spared: names that weight decay spares; they make up the second flat group of ZeRO 1 and 2.
    """

    def __init__(self, rehearsal: Rehearsal, shapes: Mapping[str, int], spared: set[str]) -> None:
        self._rehearsal = rehearsal
        self._elements = np.array([shapes[name] for name in rehearsal.names], np.int64)
        self._start, self._group = self._places(shapes, spared)
        self.parameters = int(self._elements.sum())

    def memory(self, engine: Engine, policy: Policy, micro_batch: int, *, ahead: int = 0) -> Memory:
        """At this engine, policy of recomputation and micro-batch.

        Args:
            engine: how DeepSpeed is set up; its accumulation is that of the planned micro-batch.
            policy: as ``LaViT.set_activation_checkpointing`` takes it.
            micro_batch: pictures.
            ahead: bytes that the loader holds for each of them beside the batch that is trained on.
        """
        passes = self._rehearsal.passes(policy, micro_batch)
        share = math.ceil(self.parameters / engine.ranks) if engine.stage else self.parameters
        states = 4 * share * (engine.states if engine.stage else engine.states - 1)  # at stage 0 weights are masters
        average = 4 * share * engine.average
        weights, gradients = engine.element * self.parameters, 0
        if engine.stage == 3:
            small = int(self._elements[self._elements <= engine.persistent].sum())
            weights = engine.element * (small + share * (not engine.weights_on_host))
            gradients = share * (4 if engine.wide_gradients else engine.element) * (not engine.states_on_host)
        elif engine.wide_gradients and engine.stage == 2:
            gradients = 4 * share
        elif engine.buckets_stay:
            gradients = 4 * self.parameters
        peak = max(self._moments(engine, passes, share), key=lambda moment: moment.total)
        host = (states + average + 4 * share) * engine.states_on_host + engine.element * share * engine.weights_on_host
        if engine.states_on_host:
            states = average = 0
        return Memory(weights, states, average, gradients, ahead * micro_batch, peak, host)

    def largest(
        self, engine: Engine, policy: Policy, capacity: float, *, limit: int, step: int = 1, ahead: int = 0
    ) -> int:
        """The largest micro-batch, a multiple of ``step`` and at most ``limit``, within ``capacity`` bytes; or 0."""
        low, high = 0, limit // step
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.memory(engine, policy, middle * step, ahead=ahead).total <= capacity
            low, high = (middle, high) if fits else (low, middle - 1)
        return low * step

    def _moments(self, engine: Engine, passes: Passes, share: int) -> Iterator[Moment]:
        gathered = flat = 0
        if engine.stage == 3:
            # What was gathered in one go stays until its last weight has been copied out of it and used.
            gathered = engine.element * int(self._elements[self._elements > engine.persistent].sum())
            flat = min(gathered, engine.element * engine.prefetch)
        yield Moment("forward", passes.forward_peak, 0, gathered + flat)
        if engine.stage == 3:
            yield from self._scattering(engine, passes, gathered)
        elif engine.buckets_stay:
            yield from self._reducing_into_buckets(engine, passes)
        elif engine.stage == 2 or (engine.stage == 1 and engine.overlap):
            for rank in {0, engine.ranks - 1}:
                yield from self._reducing_on_the_way(engine, passes, share, rank)
        else:
            yield from self._reducing_at_the_end(engine, passes)
        yield from self._step(engine, share)

    def _reducing_into_buckets(self, engine: Engine, passes: Passes) -> Iterator[Moment]:
        """Stage 0 on several ranks: a full bucket is copied to where it stays, and its gradients are dropped."""
        if engine.accumulation > 1:  # those of the first micro-batch are still whole when the last one begins
            yield Moment("backward", int(passes.live.max()), 4 * self.parameters, 0)
            return
        pending = 0
        for elements, live in zip(self._elements.tolist(), passes.live.tolist(), strict=True):
            yield Moment("backward", live, 4 * pending, 0)
            pending = 0 if pending + elements >= engine.bucket else pending + elements
        yield Moment("reduce", 0, 4 * pending, 0)

    def _reducing_at_the_end(self, engine: Engine, passes: Passes) -> Iterator[Moment]:
        """Stage 1, or a single rank: all gradients are kept until the last micro-batch is through."""
        width = 4 if engine.wide_gradients else engine.element
        arrived = width * (np.cumsum(self._elements) - self._elements)
        if engine.accumulation > 1:
            arrived[:] = width * self.parameters
        at = int(np.argmax(passes.live + arrived))
        yield Moment("backward", int(passes.live[at]), int(arrived[at]), 0)
        bucket = ALL_REDUCE if engine.stage == 0 else engine.bucket
        copy = max(self._buckets(bucket)) * width
        if engine.stage == 1 and engine.contiguous:
            copy += width * (min(engine.bucket, self.parameters) + math.ceil(self.parameters / engine.ranks))
        yield Moment("reduce", 0, width * self.parameters, copy + (copy // 2 if engine.low_traffic else 0))

    def _reducing_on_the_way(self, engine: Engine, passes: Passes, share: int, rank: int) -> Iterator[Moment]:
        """Stage 2: a full bucket is reduced, and what another rank owns is dropped."""
        width, first = engine.element, share * rank
        mine = self._group == 0  # of the group that decays, which is nearly all, this rank owns a stretch
        mine &= (self._start < first + share) & (self._start + self._elements > first)
        keeps = mine & (not engine.wide_gradients) if engine.stage == 2 else np.ones_like(mine)
        buffers = 0
        if engine.contiguous:
            buffers = width * min(engine.bucket, self.parameters) * (1 + engine.overlap) + width * share
        kept = width * int(self._elements[mine].sum()) if engine.accumulation > 1 and engine.stage == 2 else 0
        if engine.accumulation > 1 and engine.stage == 1:
            kept = width * self.parameters
        pending = late = pending_owned = 0
        for elements, live, owned in zip(self._elements.tolist(), passes.live.tolist(), keeps.tolist(), strict=True):
            if pending + elements > engine.bucket and pending:
                held = kept + (0 if engine.contiguous else width * (pending + late))
                copy = pending * (width + 2 * engine.low_traffic)
                yield Moment("backward", live, held, buffers + copy)
                kept += width * pending_owned * (not engine.contiguous)
                late = pending if engine.overlap and not engine.contiguous else 0
                pending = pending_owned = 0
            yield Moment("backward", live, kept + (0 if engine.contiguous else width * (pending + late)), buffers)
            pending += elements
            pending_owned += elements * owned
        held = kept + (0 if engine.contiguous else width * (pending + late))
        yield Moment("reduce", 0, held, buffers + pending * (width + 2 * engine.low_traffic))

    def _scattering(self, engine: Engine, passes: Passes, gathered: int) -> Iterator[Moment]:
        """Stage 3: a full bucket is scattered from a padded copy; weights once gathered stay until their backward."""
        width, pending = engine.element, 0
        buffers = gathered + width * engine.contiguous * min(engine.bucket, self.parameters)
        for elements, live in zip(self._elements.tolist(), passes.live.tolist(), strict=True):
            if pending + elements > engine.bucket and pending:
                copy = pending * (width + 2 * engine.low_traffic)
                yield Moment("backward", live, width * pending, buffers + copy)
                pending = 0
            yield Moment("backward", live, width * pending, buffers)
            pending += elements
        yield Moment("reduce", 0, width * pending, buffers + width * pending)

    def _step(self, engine: Engine, share: int) -> Iterator[Moment]:
        """Before the optimizer steps a partition its gradients are flattened and brought to fp32."""
        norm = 8 * min(int(self._elements.max()), share)  # DeepSpeed takes norms in fp64, tensor by tensor
        if engine.stage == 0:
            yield Moment("step", 0, 0 if engine.buckets_stay else 4 * self.parameters, 0)
        elif engine.stage == 3:
            yield Moment("step", 0, 0, 4 * share if engine.element == 4 else (2 + 4) * share)
        else:
            width = 4 if engine.wide_gradients else engine.element
            yield Moment("step", 0, width * share, max(norm, share * (width + 4 * (width == 2))))

    def _buckets(self, size: int) -> Iterator[int]:
        """Elements of the buckets that gradients fill one after the other."""
        pending = 0
        for elements in self._elements[::-1].tolist():
            if pending + elements > size and pending:
                yield pending
                pending = 0
            pending += elements
        yield pending

    def _places(self, shapes: Mapping[str, int], spared: set[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of every parameter in the order of arrival: its first element in its flat group, and the group."""
        ends, start = [0, 0], {}
        for name, elements in shapes.items():
            group = int(name in spared)
            start[name] = (ends[group], group)
            ends[group] += elements
        places = np.array([start[name] for name in self._rehearsal.names], np.int64)
        return places[:, 0], places[:, 1]
