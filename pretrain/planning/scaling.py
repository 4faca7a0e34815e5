"""One optimizer step on 8 to 1,024 GPUs, on paper: computing, talking, reading.

Every assumption is a field of ``Network`` or said here: all GPUs compute equally fast and as fast per picture at every
micro-batch; collectives are NCCL's rings (or double binary trees, where these are faster) over the slowest link that
they cross; what DeepSpeed overlaps hides behind the backward pass, two thirds of the computing; nothing else is hidden.
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
    """Of these, what does not hide behind the backward pass."""
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
    gradients = parameters * (2 if engine.low_traffic else engine.element)
    weights = parameters * engine.element
    all_reduces, gathers = {0: (1, 0), 1: (1, 1), 2: (1, 1), 3: (0, 2)}[engine.stage]
    buckets = max(1, math.ceil(parameters / engine.bucket))
    talk = all_reduces * _all_reduce(gradients, gpus, network, buckets) + gathers * _half(weights, gpus, network, 1)
    if engine.stage == 3:  # every micro-batch gathers anew and scatters its gradients
        talk = engine.accumulation * (talk + _half(gradients, gpus, network, buckets))
    hidden = 2 / 3 * compute if engine.overlap else 0.0
    read = 0.0 if reading.bytes_per_s is None else global_batch * reading.bytes_per_image / reading.bytes_per_s
    return Step(gpus, share, compute, talk, max(0.0, talk - hidden), read)


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
