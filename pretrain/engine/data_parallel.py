"""ZeRO stage 0, plain data parallelism: gradients are averaged while the backward pass still runs, then clipped.

DeepSpeed's own way at this stage averages when the backward pass is over, through copies that it allocates anew in
every step, and clips parameter by parameter. This is what torch's DistributedDataParallel does (Li et al., arXiv
2006.15704).
"""

from typing import Any

import torch
import torch.distributed as dist


def install_data_parallel(engine: Any) -> None:
    """Give an engine at stage 0 this averaging, where there are several ranks, and this clipping.

    Args:
        engine: ``deepspeed.DeepSpeedEngine``. Its internals are used: DeepSpeed's version is pinned. Where its
            configuration asks for another way of averaging (``prescale_gradients``, ``gradient_predivide_factor``,
            ``communication_data_type``) its own is left in place.
    """
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    holders: list[torch.Tensor] = parameters
    plain = engine.postscale_gradients() and engine.gradient_predivide_factor() == 1.0
    if dist.get_world_size() > 1 and plain and engine.communication_data_type == torch.float32:
        buckets = GradientBuckets(engine, parameters, engine.zero_reduce_bucket_size())
        holders = buckets.flats
        engine.allreduce_gradients = buckets.finish

    def clip() -> None:
        norm = torch.nn.utils.clip_grad_norm_(holders, engine.gradient_clipping(), foreach=True)
        engine._global_grad_norm = norm  # noqa: SLF001 - where the metrics look for it; DeepSpeed's leaves none

    engine.clip_fp32_gradients = clip


class GradientBuckets:
    """Averages gradients over the ranks, bucket by bucket, from the last layers to the first, during the backward pass.

    After it every parameter's gradient is a view into its bucket.

    Args:
        engine: tells whether a backward pass is the last one before the optimizer steps; only then is there averaging.
        parameters: fp32, in the order of the forward pass; each rank gives the same ones.
        bucket_size: elements; a bucket is closed when it holds so many.
    """

    def __init__(self, engine: Any, parameters: list[torch.nn.Parameter], bucket_size: int) -> None:
        self._engine = engine
        self._buckets: list[list[torch.nn.Parameter]] = [[]]
        held = 0
        for parameter in reversed(parameters):
            if held >= bucket_size:
                self._buckets.append([])
                held = 0
            self._buckets[-1].append(parameter)
            held += parameter.numel()
        self.flats = [_flat(bucket) for bucket in self._buckets]
        """(elements,) fp32 for each bucket; its ``grad`` is its own memory, so that it is clipped like a parameter."""
        self._views = [_views(flat, bucket) for flat, bucket in zip(self.flats, self._buckets, strict=True)]
        self._missing = [len(bucket) for bucket in self._buckets]
        self._works: list[dist.Work] = []
        for index, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._arrived(index))

    def finish(self, **_: Any) -> None:
        """Wait for the averages, called by DeepSpeed after a backward pass.

        A parameter that had no gradient on this rank counts as zero.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            return
        while len(self._works) < len(self._buckets):
            self._send(len(self._works))
        for work in self._works:
            work.wait()
        torch._foreach_mul_(self.flats, 1.0 / dist.get_world_size())
        self._works = []
        self._missing = [len(bucket) for bucket in self._buckets]

    def _arrived(self, index: int) -> None:
        """A gradient of this bucket is there: send all that are complete, in the same order on every rank."""
        if not self._engine.is_gradient_accumulation_boundary():
            return
        self._missing[index] -= 1
        while len(self._works) < len(self._buckets) and not self._missing[len(self._works)]:
            self._send(len(self._works))

    def _send(self, index: int) -> None:
        pairs = list(zip(self._buckets[index], self._views[index], strict=True))
        gradients = [(view, parameter.grad) for parameter, view in pairs if parameter.grad is not None]
        if len(gradients) < len(pairs):
            self.flats[index].zero_()
        if gradients:
            torch._foreach_copy_([view for view, _ in gradients], [gradient for _, gradient in gradients])
        for parameter, view in pairs:
            parameter.grad = view
        work = dist.all_reduce(self.flats[index], async_op=True)
        assert work is not None
        self._works.append(work)


def _flat(bucket: list[torch.nn.Parameter]) -> torch.Tensor:
    flat = torch.zeros(sum(p.numel() for p in bucket), device=bucket[0].device, requires_grad=False)
    flat.grad = flat.detach()  # the same memory
    return flat


def _views(flat: torch.Tensor, bucket: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    pieces = flat.split([parameter.numel() for parameter in bucket])
    return [piece.view(parameter.shape) for piece, parameter in zip(pieces, bucket, strict=True)]
