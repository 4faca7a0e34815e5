"""Measures a run and returns plain values and images; nothing of it changes what is trained, and it writes nothing."""

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from data_pipeline.batch import Batch
from data_pipeline.preview import Pixels, draw_grid, to_pixels
from data_pipeline.transforms import InputConfig
from pretrain.checkpoints.optimizer_shards import OptimizerShards
from pretrain.devices import DEVICES, FLOPS_PER_MAC
from pretrain.engine.deepspeed_config import Precision, input_dtype
from pretrain.ledger import Row
from pretrain.monitoring.attention import draw_attention, measure_attention
from pretrain.monitoring.norms import PartNorms, norms_of
from pretrain.monitoring.step_timer import PHASES, StepTimer
from pretrain.state import TrainState

GRID = 32
"""Training images that are drawn at a time."""
GIB = 2**30


class Monitor:
    """Measures one rank. What steps computed stays on the device until it is asked for, so that no step waits for it.

    Args:
        engine: ``deepspeed.DeepSpeedEngine``.
        shards: of the engine.
        device: of this rank.
        precision: what the engine computes in.
        attention_images: images whose attention is measured and drawn; 0 for none, as for other networks than LaViT.
        data: how the images were made, to show them as they were.
        class_names: captions of the training images, by label.
        macs: multiply-accumulates of one image.
        show_batch: keep the next training batch, to show it.
    """

    def __init__(
        self,
        engine: Any,
        shards: OptimizerShards,
        *,
        device: torch.device,
        precision: Precision,
        attention_images: int,
        data: InputConfig,
        class_names: tuple[str, ...],
        macs: int,
        show_batch: bool = False,
    ) -> None:
        self._engine, self._device, self._dtype, self._data = engine, device, input_dtype(precision), data
        self._flops, self._peak = FLOPS_PER_MAC * macs, peak_of(device, precision)
        self._attention_images, self.class_names = attention_images, class_names
        self._evaluated: torch.Tensor | None = None
        """(m, 3, H, W) normalized images whose attention is shown; None before the first evaluation."""
        self.timer, self.norms = StepTimer(device), PartNorms(shards)
        self.show_batch = show_batch
        """Whether the next training batch is kept for ``training_images``."""
        self._batch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._digest = 0
        self._losses: list[torch.Tensor] = []
        """Of each micro-batch since the last ``take``, (losses,) fp32 on the device."""
        self._ends: list[tuple[Any, torch.Tensor | bool, int]] = []
        """Of each step since then: gradient norm, whether it was skipped, digest of this rank's images."""
        self._names: tuple[str, ...] = ()
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self._taken: list[list[float]] = []
        """Losses of each step of the interval, over all ranks."""
        self._steps, self._began = 0, time.monotonic()

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave time that is not training, such as an evaluation, out of the interval."""
        began = time.monotonic()
        self.timer.enter(None)
        try:
            yield
        finally:
            self.timer.enter("other")
            self._began += time.monotonic() - began

    def see_batch(self, batch: Batch) -> None:
        """Note what a training batch holds; keep its first images, on the device, where they are wanted."""
        self._digest += batch.digest
        if self.show_batch:
            self._batch, self.show_batch = (batch.images[:GRID].clone(), batch.labels[:GRID].clone()), False

    def see_evaluation(self, batch: Batch, _: torch.Tensor) -> None:
        """Keep the first images of the first evaluation batch, for ``attention``."""
        if self._evaluated is None and self._attention_images:
            self._evaluated = batch.images[: self._attention_images].clone()

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Add the losses of a micro-batch, scalars on the device; the first is the one that is minimized."""
        self._names = tuple(losses)
        self._losses.append(torch.stack([value.detach().float() for value in losses.values()]))

    def end_step(self, skipped: torch.Tensor | bool) -> None:
        """End a step of the optimizer, with what ``NonFiniteSteps.note_step`` returned."""
        norm = self._engine.get_global_grad_norm()
        self._ends.append((math.nan if norm is None else norm, skipped, self._digest % 2**64))
        self._digest = 0
        self._steps += 1
        self.timer.enter("other")

    def take(self, state: TrainState) -> list[Row]:
        """Rows of the ledger, without the setup, of the steps since the last call; the last one led to ``state``.

        Collective; waits for the device.
        """
        ends, losses, count = self._ends, self._losses, len(self._ends)
        self._ends, self._losses = [], []
        if not ends:
            return []
        # Sums in fp64 of losses in fp32 are exact, in any order, while the losses differ by less than 2**29 together.
        by_step = torch.stack(losses).double().view(count, -1, len(self._names))
        sums, micro_batches = by_step.sum(1), by_step.shape[1] * dist.get_world_size()
        digests = torch.from_numpy(np.array([digest for *_, digest in ends], np.uint64).view(np.int64)).to(self._device)
        dist.all_reduce(sums)
        dist.all_reduce(digests)  # modulo 2**64
        means = (sums / micro_batches).tolist()
        self._taken += means
        own = [torch.as_tensor(x, dtype=torch.float64, device=self._device) for end in ends for x in end[:2]]
        rows = zip(means, torch.stack(own).view(count, 2).tolist(), digests.tolist(), strict=True)
        batch = self._engine.train_batch_size()
        return [
            {
                "step": state.step - left,
                "samples_seen": state.samples_seen - left * batch,
                "loss": loss,
                "grad_norm": None if skipped or math.isnan(norm) else norm,
                "skipped": bool(skipped),
                "batch": f"{digest % 2**64:016x}",
            }
            for left, ((loss, *_), (norm, skipped), digest) in zip(reversed(range(count)), rows, strict=True)
        ]

    def means(self) -> dict[str, float]:
        """Means of the losses over the steps of the interval that were taken, without those that are not finite."""
        finite = [losses for losses in self._taken if all(map(math.isfinite, losses))]
        return dict(zip(self._names, map(fmean, zip(*finite, strict=True)), strict=True)) if finite else {}

    def measure(self, *, global_batch: int, images_requested: bool) -> tuple[dict[str, dict[str, float]], bool]:
        """Measure the interval so far. Collective; waits for the device.

        Args:
            global_batch: images of a step, over all ranks.
            images_requested: whether images are asked for, on rank 0.

        Returns:
            measurements by kind, rounded, and whether images were asked for. "train": the norm of the gradient before
            clipping in the last step, images per second over all ranks, the share of the time that waits for data, MFU,
            GiB of the rank that has most (on a GPU the most that was allocated so far, else what the process occupies
            now); without what is not known. "norms": of each part of the network, of the gradient before clipping in
            the last step, and of the weights. "time": seconds of a step, as means over the ranks, "total" and each
            phase; "slowest_data": of the rank that waits longest.
        """
        ranks, rate = dist.get_world_size(), self._steps * global_batch / (time.monotonic() - self._began)
        split, by_rank = self.timer.split(), torch.zeros(ranks, len(PHASES) + 2)
        own = [*(split[phase] / self._steps for phase in PHASES), self._memory() / GIB]
        by_rank[dist.get_rank()] = torch.tensor([*own, images_requested and dist.get_rank() == 0])
        by_rank, squares = by_rank.to(self._device), self.norms.squares(self._device)
        dist.all_reduce(by_rank)
        dist.all_reduce(squares)
        mean, most = by_rank.mean(0).tolist(), by_rank.amax(0).tolist()
        seconds = dict(zip(PHASES, mean, strict=False))
        total, norm = sum(seconds.values()), self._engine.get_global_grad_norm()
        norm = None if norm is None or norm < 0 else float(norm)  # DeepSpeed writes -1 where not finite
        train = {} if norm is None else {"grad_norm": norm}
        train |= {"images_per_second": round(rate, 2), "data_wait": round(seconds["data"] / max(total, 1e-9), 4)}
        if self._peak is not None:
            train["mfu"] = round(rate * self._flops / (ranks * self._peak), 4)
        time_rows = {"total": total, **seconds, "slowest_data": most[PHASES.index("data")]}
        rows = {
            "train": train | {"memory_gib": round(most[-2], 3)},
            "norms": _rounded(norms_of(self.norms.parts, squares, norm)),
            "time": _rounded(time_rows),
        }
        return rows, bool(most[-1])

    def training_images(self) -> Pixels | None:
        """Draw the training images that were kept, once; None where there are none."""
        if self._batch is None:
            return None
        (images, labels), self._batch = self._batch, None
        captions = [self.class_names[label] for label in labels.tolist()]
        return draw_grid(to_pixels(images, self._data.mean, self._data.std), captions)

    def attention(self) -> tuple[dict[str, float], Pixels] | None:
        """Measure and draw the attention of a few images of the validation split, fixed for this attempt.

        Returns:
            the numbers of every block, and the drawing; None where there are no images yet, and on other ranks than 0.
            Collective at ZeRO stage 3.
        """
        first = dist.get_rank() == 0
        if self._evaluated is None or not (first or self._engine.zero_optimization_stage() == 3):
            return None
        numbers, maps = measure_attention(self._engine.module, self._evaluated, self._dtype)
        if not first:
            return None
        return _rounded(numbers), draw_attention(to_pixels(self._evaluated, self._data.mean, self._data.std), maps)

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        rss: int = psutil.Process().memory_info().rss
        return rss


def peak_of(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device in what a run multiplies in; None on a CPU and on a GPU whose peak is not known here.

    ``precision`` is as ``Precision`` names it.
    """
    if device.type != "cuda":
        return None
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16  # of float16 it is the same
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"  # `allow_tf32` cannot be read once this one was set
    name = torch.cuda.get_device_name(device)
    return next((known.peak(dtype, tf32=tf32) for known in DEVICES.values() if re.search(known.pattern, name)), None)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in values.items()}
