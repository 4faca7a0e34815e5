"""How others' training scaled, and what ``pretrain.planning.scaling`` says of their machines.

Every number names where it stands. The number of parameters is that of torchvision's network of the same name, but for
ResNet-50, where the paper states it. That gradients had 32 bits and were sent during the backward pass is stated for
ResNet-50 (sections 4.1 to 4.3) and assumed for the others.
"""

from dataclasses import dataclass
from typing import Any

from pretrain.planning.memory import Engine
from pretrain.planning.scaling import Network, Reading, simulate_step

NVLINK = 80e9
"""Bytes per second between P100s of a node, one way: "80GB/s (160GB/s bi-directional)", Microway's page "NVIDIA Tesla
P100 NVLink 16GB GPU Accelerator (Pascal GP100 SXM2) Up Close"."""
GOYAL = "Goyal et al. 2017, arXiv 1706.02677"
HOROVOD = "Horovod, docs/benchmarks.rst"
TENSORFLOW = "TensorFlow, docs, r1/guide/performance/benchmarks, DGX-1"


@dataclass(frozen=True)
class Published:
    """How much of the throughput of ``few`` GPUs is left for each of ``many``."""

    source: str
    where: str
    """In the source: the efficiency, and what it was measured with."""
    network: str
    few: int
    many: int
    gpus_per_node: int
    node: float
    """Bytes per second into a node, one way."""
    parameters: int
    images_per_gpu: int
    """In a step."""
    images_per_s: float
    """Of one GPU that computes alone."""
    efficiency: float


def _ethernet(gbit: float) -> float:
    return gbit * 1e9 / 8


_EPOCH_S = 16 * 60
"""Goyal et al., section 5.5: an epoch of 1.28 million images on 8 GPUs took "over 16 minutes"."""
_HOROVOD: dict[str, Any] = {"few": 1, "gpus_per_node": 4, "node": _ethernet(25), "images_per_gpu": 64}
_TENSORFLOW: dict[str, Any] = {"few": 1, "many": 8, "gpus_per_node": 8, "node": NVLINK}
_SPEEDS = "speed of one P100 from TensorFlow's page (which Pascal GPU Horovod means is not said)"

PUBLISHED = (
    Published(
        GOYAL, "abstract; sections 4.3, 5.1, 5.5", "ResNet-50",
        few=8, many=256, gpus_per_node=8, node=_ethernet(50), parameters=25_000_000, images_per_gpu=32,
        images_per_s=1.28e6 / _EPOCH_S / 8, efficiency=0.90,
    ),
    Published(
        GOYAL, "section 5.5, figure 7: 12 % more time per step", "ResNet-50",
        few=8, many=352, gpus_per_node=8, node=_ethernet(50), parameters=25_000_000, images_per_gpu=32,
        images_per_s=1.28e6 / _EPOCH_S / 8, efficiency=1 / 1.12,
    ),
    Published(
        HOROVOD, f"first paragraph; {_SPEEDS}", "Inception V3",
        many=512, parameters=23_834_568, images_per_s=142, efficiency=0.90, **_HOROVOD,
    ),
    Published(
        HOROVOD, "first paragraph; speed: its own 1656.82 images/s on 16 GPUs", "ResNet-101",
        many=512, parameters=44_549_160, images_per_s=1656.82 / 16, efficiency=0.90, **_HOROVOD,
    ),
    Published(
        HOROVOD, f"first paragraph; {_SPEEDS}", "VGG-16",
        many=512, parameters=138_357_544, images_per_s=154, efficiency=0.68, **_HOROVOD,
    ),
    Published(
        TENSORFLOW, "training synthetic data, replicated with NCCL", "VGG-16",
        parameters=138_357_544, images_per_gpu=64, images_per_s=154, efficiency=1081 / (8 * 154), **_TENSORFLOW,
    ),
    Published(
        TENSORFLOW, "training synthetic data, replicated with NCCL", "AlexNet",
        parameters=61_100_840, images_per_gpu=512, images_per_s=2987, efficiency=17822 / (8 * 2987), **_TENSORFLOW,
    ),
)  # fmt: skip


def our_efficiency(of: Published, *, overlap: bool = True) -> float:
    """What the simulation says in place of the published efficiency.

    Args:
        of: their setting.
        overlap: whether gradients are sent while the backward pass runs.
    """
    engine = Engine(
        stage=0, ranks=of.many, accumulation=1, element=4, wide_gradients=False, low_traffic=False, states=2,
        average=False, bucket=5_000_000, contiguous=False, overlap=overlap, persistent=0, prefetch=0,
        states_on_host=False, weights_on_host=False,
    )  # fmt: skip
    network, free = Network(NVLINK, of.node, of.gpus_per_node), Reading(None, 0.0)

    def seconds(gpus: int) -> float:
        work = (of.images_per_gpu * gpus, of.images_per_s)
        return simulate_step(gpus, engine, network, free, parameters=of.parameters, work=work).seconds

    return seconds(of.few) / seconds(of.many)


def optimism() -> tuple[float, float]:
    """By how many points, least and most, the simulation is above what was published."""
    over = [100 * (our_efficiency(of) - of.efficiency) for of in PUBLISHED]
    return min(over), max(over)
