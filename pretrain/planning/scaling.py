"""One optimizer step on 8 to 1,024 GPUs, on paper: computing, talking, reading.

Every assumption is a field of ``Network`` or said here: all GPUs compute equally fast and as fast per picture at every
micro-batch; collectives are NCCL's rings (or double binary trees, where these are faster) over the slowest link that
they cross; the forward pass is a third of the computing, the backward pass two thirds. What is sent when is read in
``pretrain.engine.data_parallel`` and in DeepSpeed 0.19 (``runtime/zero/stage_1_and_2.py``, ``stage3.py``,
``partitioned_param_coordinator.py``); a test counts on two ranks how much it is:

- Stages 0 and 1 average gradients by an all-reduce, once a step: what hides it is the last micro-batch's backward pass.
- Stage 2 does so in every micro-batch, stage 3 by a reduce-scatter: each time the backward pass of that one hides it.
- Stages 1 and 2 gather all weights when the optimizer has stepped. Nothing hides that.
- Stage 3 gathers them in every micro-batch's forward pass and keeps them until its backward pass. The first
  ``stage3_prefetch_bucket_size`` of them come in one piece for which the second layer waits, which nothing hides; the
  rest comes while the forward pass computes. Small ones that are never cut (``stage3_param_persistence_threshold``) are
  gathered once a step, and counted here as the others.

Anything hides only where the engine overlaps: always at stage 0, else by ``overlap_comm``. Nothing else is hidden.
"""

import math
from dataclasses import dataclass

from pretrain.planning.memory import Engine

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Network:
    """Links, one way, in bytes per second; latencies in seconds."""

    link: float
    """Between the GPUs of a node."""
    node: float
    """Into and out of a node, all its adapters together."""
    gpus_per_node: int = 8
    latency: float = 10e-6
    """Of one hop of a collective; an assumption."""


@dataclass(frozen=True)
class Reading:
    """The storage."""

    bytes_per_s: float | None
    """For all GPUs together; None: more than is asked for."""
    bytes_per_image: float


@dataclass(frozen=True)
class Step:
    """One step, in seconds."""

    gpus: int
    images_per_gpu: float
    compute: float
    talk: float
    """Of all collectives."""
    exposed: float
    """Of these, what does not hide behind computing."""
    read: float
    """Until the storage has given the batch; hidden behind the rest where it is shorter."""

    @property
    def seconds(self) -> float:
        """From one step to the next."""
        return max(self.compute + self.exposed, self.read)

    @property
    def efficiency(self) -> float:
        """Share of the time in which GPUs compute."""
        return self.compute / self.seconds


def simulate_step(
    gpus: int, engine: Engine, network: Network, reading: Reading, *, parameters: int, work: tuple[int, float]
) -> Step:
    """Time one step.

    Args:
        gpus: how many.
        engine: decides which collectives there are; its ``ranks`` are not read.
        network: the links.
        reading: the storage.
        parameters: of the network.
        work: pictures of the step, and pictures per second of one GPU that computes alone.
    """
    global_batch, images_per_s = work
    share = global_batch / gpus
    compute = share / images_per_s
    times = engine.accumulation if engine.stage >= 2 else 1
    buckets = max(1, math.ceil(parameters / engine.bucket))
    gradients = parameters * (2 if engine.low_traffic else engine.element)
    reduce = times * (_half if engine.stage == 3 else _all_reduce)(gradients, gpus, network, buckets)
    waited, ahead = _gather(engine, network, gpus, parameters)
    hidden = 0.0
    if engine.overlap:
        hidden = min(reduce, 2 / 3 * compute * times / engine.accumulation) + min(ahead, compute / 3)
    talk = reduce + waited + ahead
    read = 0.0 if reading.bytes_per_s is None else global_batch * reading.bytes_per_image / reading.bytes_per_s
    return Step(gpus, share, compute, talk, max(0.0, talk - hidden), read)


def _gather(engine: Engine, network: Network, gpus: int, parameters: int) -> tuple[float, float]:
    """Seconds of a step's gathering of weights: what is waited for, and what is gathered ahead of the forward pass."""
    if engine.stage == 0:
        return 0.0, 0.0
    if engine.stage < 3:
        return _half(parameters * engine.element, gpus, network, 1), 0.0
    element = 2 if engine.low_traffic else engine.element
    first = min(parameters, engine.prefetch or parameters)
    rest = parameters - first
    ahead = _half(rest * element, gpus, network, math.ceil(rest / first)) if rest else 0.0
    return engine.accumulation * _half(first * element, gpus, network, 1), engine.accumulation * ahead


def _all_reduce(size: float, gpus: int, network: Network, calls: int) -> float:
    ring = 2 * _half(size, gpus, network, calls)
    nodes = math.ceil(gpus / network.gpus_per_node)
    slowest = network.link if nodes == 1 else network.node
    tree = 2 * size / slowest + calls * 2 * network.latency * math.ceil(math.log2(max(gpus, 2)))
    return min(ring, tree) if gpus > 1 else 0.0


def _half(size: float, gpus: int, network: Network, calls: int) -> float:
    """An all-gather or a reduce-scatter: half an all-reduce over a ring that enters every node once."""
    if gpus == 1:
        return 0.0
    slowest = network.link if gpus <= network.gpus_per_node else min(network.link, network.node)
    return (gpus - 1) / gpus * size / slowest + calls * (gpus - 1) * network.latency
