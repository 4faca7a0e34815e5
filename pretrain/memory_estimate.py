"""Memory of one GPU: activations from a fake-tensor trace of the network, and what DeepSpeed 0.19 holds as sums.

One forward and backward pass of the network runs under torch's FakeTensorMode, with shapes and data types but without
memory, and torch's MemTracker counts the live tensors. Two micro-batches give every other one, because bytes
are affine in it. What the engine holds follows the source of DeepSpeed (``runtime/zero/stage_1_and_2.py``,
``stage3.py``). ``tests/system/test_planned_memory.py`` compares the sum with
measured peaks. What is no tensor is not counted: CUDA context, buffers of NCCL and DALI, fragmentation.
"""

import bisect
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from models import LaViT
from models.config import STAGES
from pretrain.check import COPIES
from pretrain.engine.deepspeed_config import Precision, ResolvedDeepSpeed, input_dtype
from pretrain.engine.deepspeed_keys import FLOATS
from pretrain.factory import NetworkConfig, call_network, drawn_branches, on_meta, recompute_activations, users_code
from pretrain.recipe import Recipe

Ints = NDArray[np.int64]
Policy = Literal["none", "all"] | Sequence[bool]
"""Stages whose activations are recomputed, as ``LaViT.set_activation_checkpointing`` takes it."""
PREFIXES: dict[str, Policy] = {
    "none": "none",
    "stage 1": (True, False, False, False),
    "stages 1-2": (True, True, False, False),
    "stages 1-3": (True, True, True, False),
    "all": "all",
}
"""First stages whose activations are recomputed: these keep most of them."""
TRACED = (2, 4)
"""Micro-batches that are traced."""
ALL_REDUCE = 500_000_000
"""Elements that DeepSpeed flattens at once to reduce gradients at stage 0; a constant of its engine."""
BUCKET, PERSISTENT, PREFETCH = 500_000_000, 100_000, 50_000_000
"""DeepSpeed's defaults of reduce_bucket_size, stage3_param_persistence_threshold and stage3_prefetch_bucket_size."""


class Activations(NamedTuple):
    """Bytes of one micro-batch, without weights and gradients that have arrived."""

    elements: Ints
    """(parameters,) elements of each parameter, in the order in which their gradients arrive."""
    kept: int
    """At the end of the forward pass: what the backward pass needs, the batch, the loss."""
    forward: int
    """Peak until then."""
    live: Ints
    """(parameters,) peak in the backward pass until each gradient arrives, since the one before."""


def activations(
    config: NetworkConfig, precision: Precision, policy: Policy, micro_batch: int, *, mixed: bool, gpu: bool
) -> Activations:
    """Activations of so many images, where the stages of ``policy`` are recomputed. Takes seconds at first.

    ``mixed``: whether mixup or CutMix allocate a second batch. ``gpu``: count what autocast keeps on a GPU, otherwise
    on a CPU. UserError where a network of a factory cannot be traced.
    """
    policy, gpu = policy if isinstance(policy, str) else tuple(policy), gpu and precision == "bf16 autocast"
    small, large = (trace(config, precision, policy, size, mixed=mixed, gpu=gpu) for size in TRACED)
    more = (micro_batch - TRACED[0]) / (TRACED[1] - TRACED[0])
    kept, forward = (round(one + more * (other - one)) for one, other in zip(small[1:3], large[1:3], strict=True))
    live = np.round(small.live + more * (large.live - small.live)).astype(np.int64)
    return Activations(small.elements, kept, forward, live)


def as_booleans(policy: Policy) -> tuple[bool, ...]:
    """Whether each stage is recomputed."""
    return (policy == "all",) * STAGES if isinstance(policy, str) else tuple(policy)


class _Tracker(MemTracker):
    """MemTracker with the peak of what is neither weight nor gradient of a weight, since it was last read.

    Without its peaks by module, which take most of its time.
    """

    peak = 0

    @property
    def live(self) -> int:
        return sum(one["Total"] - one["Parameter"] - one["Gradient"] for one in self._curr_mem_snap.values())

    def read_peak(self) -> int:
        peak, self.peak = self.peak, self.live
        return peak

    def _update_peak_stats(self, peak_state: object) -> None:  # noqa: ARG002 - called after every operator
        self.peak = max(self.peak, self.live)


@functools.cache
def trace(
    config: Any, precision: Precision, policy: Policy, micro_batch: int, *, mixed: bool, gpu: bool
) -> Activations:
    """Trace one micro-batch as ``Trainer.train_step`` runs it."""
    dtype, autocast, tracker = input_dtype(precision), precision == "bf16 autocast", _Tracker()
    arrived: list[tuple[int, int]] = []
    model = copy.deepcopy(on_meta(config)).to(dtype)
    stages = model.stages if isinstance(model, LaViT) else ()
    unknown = f"the memory of {config.name} is not known: it cannot be traced without computing"
    recompute_activations(model, policy)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda one: arrived.append((one.numel(), tracker.read_peak())))
        if gpu:
            for module in (model, *(block for stage in stages for block in stage.blocks)):
                # Blocks, too: the backward pass calls them to recompute.
                module.forward = functools.partial(_as_on_gpu, module.forward)
        with users_code(unknown), tracker:
            batch = torch.empty(micro_batch, 3, *config.image_size)
            images = batch.clone() if mixed else batch
            targets = torch.empty(micro_batch, config.num_classes)
            branches = drawn_branches(model)
            uniforms = torch.empty(branches, micro_batch) if branches else None
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits, diagonality = call_network(model, model, images.to(dtype), uniforms)
            loss = F.cross_entropy(logits.float(), targets)
            if diagonality is not None:
                loss = loss + diagonality.float()
            del images, targets, uniforms, logits, diagonality  # the loader's batch stays until the next one
            forward, kept = tracker.read_peak(), tracker.live
            loss.backward()
    elements, live = map(np.array, zip(*arrived, strict=True))
    return Activations(elements, kept, forward, live)


class GpuAutocast(TorchFunctionMode):
    """In addition to autocast for CPUs: what autocast for GPUs computes in fp32, of the functions that LaViT calls.

    Fake tensors on "cuda" would need a build of torch for CUDA. Lists: aten/src/ATen/autocast_mode.h of torch,
    AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE.
    """

    FP32 = frozenset({F.layer_norm})
    FP32_RESULT = frozenset({torch.Tensor.softmax, torch.Tensor.sum})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FP32:
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        elif func in self.FP32_RESULT and args[0].dtype in {torch.bfloat16, torch.float16}:
            kwargs.setdefault("dtype", torch.float32)
        return func(*args, **kwargs)


def _as_on_gpu(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with GpuAutocast():
        return forward(*args, **kwargs)


class Engine:
    """What of a resolved DeepSpeed configuration determines memory and communication."""

    def __init__(self, recipe: Recipe, resolved: ResolvedDeepSpeed) -> None:
        zero = resolved.config.get("zero_optimization", {})
        self.stage, self.ranks = resolved.stage, resolved.batch.world_size
        self.accumulation = resolved.batch.accumulation
        self.element = input_dtype(resolved.precision).itemsize  # bytes of a weight and of its gradient in the network
        summed = resolved.config.get("data_types", {}).get("grad_accum_dtype")
        self.wide_gradients = self.element == 2 and FLOATS.get(summed, summed) == "float32"  # 16 bits, summed in 32
        self.low_traffic = resolved.precision == "bf16 autocast" and self.stage > 0  # 32 bits, communicated in 16
        self.copies = COPIES[recipe.optimizer.kind]  # fp32 values for each weight, the master weight included
        self.ema = recipe.ema is not None
        self.bucket = int(zero.get("reduce_bucket_size", BUCKET))  # elements that are reduced at once
        self.contiguous = bool(zero.get("contiguous_gradients", True))
        self.persistent = int(zero.get("stage3_param_persistence_threshold", PERSISTENT))  # elements; not partitioned
        self.prefetch = int(zero.get("stage3_prefetch_bucket_size", PREFETCH))  # elements that are gathered ahead
        # Whether gradients are reduced during the backward pass. DeepSpeed's BF16_Optimizer does not read overlap_comm.
        bf16_optimizer = self.stage == 1 and resolved.precision == "bf16" and self.wide_gradients
        given = zero.get("overlap_comm")
        self.overlap = self.stage > 0 and (self.stage == 3 if given is None else bool(given) and not bf16_optimizer)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak."""

    weights: int
    gradients: int
    optimizer: int  # master weights and moments
    ema: int
    activations: int  # with temporary tensors of operators and the batches of the loader
    buffers: int  # flattened copies of gradients, gathered weights
    peak: str  # when it occurs: "forward", "backward", "reduce" (gradients), "step"

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations + self.buffers


class MemoryEstimate:
    """Memory of one rank that trains a recipe's network with a resolved DeepSpeed configuration.

    ``gpu``: count what autocast keeps on a GPU, otherwise on a CPU. ``loader_batches``: those that the loader holds in
    addition to the one in use.
    """

    def __init__(
        self, recipe: Recipe, resolved: ResolvedDeepSpeed, config: NetworkConfig, *, gpu: bool, loader_batches: int = 0
    ) -> None:
        self.engine, self.precision, mixed = Engine(recipe, resolved), resolved.precision, recipe.mixing.in_pairs
        self._activations = functools.partial(activations, config, resolved.precision, mixed=mixed, gpu=gpu)
        self._policy, self._batch, self._multiple = recipe.model.activation_checkpointing, resolved.batch, 1 + mixed
        self._loader = 4 * loader_batches * 3 * math.prod(config.image_size)

    def memory(self, policy: Policy | None = None, micro_batch: int | None = None) -> Memory:
        """At the recipe's or another recomputation policy, at the configured or another micro-batch."""
        policy, micro_batch = policy or self._policy, micro_batch or self._batch.micro_batch
        engine, network = self.engine, self._activations(policy, micro_batch)
        elements, parameters = network.elements, int(network.elements.sum())
        share = math.ceil(parameters / engine.ranks) if engine.stage else parameters
        # At stage 0 the weights are their own masters.
        optimizer, ema = 4 * share * (engine.copies - (engine.stage == 0)), 4 * share * engine.ema
        weights = engine.element * parameters
        gradients = 4 * share * (engine.wide_gradients and engine.stage == 2)  # those that exist between steps, too
        if engine.stage == 3:
            whole = int(elements[elements <= engine.persistent].sum())
            weights = engine.element * (whole + share)
            gradients = share * (4 if engine.wide_gradients else engine.element)
        phase, live, arrived, buffers = max(_peaks(engine, network), key=lambda peak: sum(peak[1:]))
        live += self._loader * micro_batch
        return Memory(weights, gradients + arrived, optimizer, ema, live, buffers, phase)

    def largest_micro_batch(self, policy: Policy, capacity: float) -> int:
        """The largest micro-batch up to a rank's share of the global batch that fits in ``capacity`` bytes; or 0."""
        sizes = range(self._multiple, self._batch.global_batch // self._batch.world_size + 1, self._multiple)
        return self._multiple * bisect.bisect_right(sizes, capacity, key=lambda size: self.memory(policy, size).total)


def _peaks(engine: Engine, network: Activations) -> Iterator[tuple[str, int, int, int]]:
    """Phases of a step, each with bytes of activations, gradients and buffers where these are largest together."""
    stage, element, elements, live = engine.stage, engine.element, network.elements, network.live
    total = int(elements.sum())
    share = math.ceil(total / engine.ranks) if stage else total
    width = 4 if engine.wide_gradients else element
    several, none = engine.accumulation > 1, np.zeros_like(live)
    arrived = np.cumsum(elements) - elements
    pending, last = _fill(elements, engine.bucket)
    flat = element * min(engine.bucket, total) * engine.contiguous
    # A full bucket is flattened, and cast where it is communicated in 16 bits.
    copy = element + 2 * engine.low_traffic
    copies = copy * np.where(pending + elements > engine.bucket, pending, 0)
    gathered = element * int(elements[elements > engine.persistent].sum()) * (stage == 3)
    # What is gathered stays until the backward pass; a prefetched piece, until its weights have been copied out of it.
    yield "forward", network.forward, 0, gathered + min(gathered, element * engine.prefetch)
    if stage == 3:
        held, buffers = element * pending, copies + gathered + flat
        reduce = (element * last, gathered + flat + element * last)
    elif stage == 2 or (stage == 1 and engine.overlap):
        # The last rank owns what arrives first. With overlap, the bucket before may still be under way.
        owned = total if stage == 1 else share * (not engine.wide_gradients)
        before = arrived - pending
        held = np.minimum(before, owned) + pending + np.minimum(before, engine.bucket) * engine.overlap
        held = element * (held * (not engine.contiguous) + (total if stage == 1 else share) * several)
        standing = flat * (1 + engine.overlap) + element * share * engine.contiguous
        buffers, reduce = copies + standing, (int(held[-1]), standing + copy * last)
    else:  # gradients are reduced when the backward pass of the last micro-batch has ended
        held, buffers = width * (none + total if several else arrived), none
        flattened = width * min(ALL_REDUCE if stage == 0 else engine.bucket, total)
        flattened += (flat + width * share) * (stage == 1 and engine.contiguous)
        reduce = (width * total, flattened + flattened // 2 * engine.low_traffic)
    at = int(np.argmax(live + held + buffers))
    yield "backward", int(live[at]), int(held[at]), int(buffers[at])
    yield "reduce", 0, *reduce
    if stage == 0:
        yield "step", 0, 4 * total, 0
    elif stage == 3:
        yield "step", 0, 0, share * (4 if element == 4 else 2 + 4)
    else:  # a partition's gradients are flattened and cast to fp32; norms are computed in fp64, tensor by tensor
        norm = 8 * min(int(elements.max()), share)
        yield "step", 0, width * share, max(norm, share * (width + 4 * (width == 2)))


def _fill(elements: Ints, bucket: int) -> tuple[Ints, int]:
    """Elements in the bucket as each gradient arrives, and after the last one."""
    pending = [0]
    for count in elements.tolist():
        pending.append(pending[-1] + count if pending[-1] + count <= bucket else count)
    return np.array(pending[:-1]), pending[-1]
