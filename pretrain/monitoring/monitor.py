"""Measures a run and returns plain values and images; nothing of it changes what is trained, and it writes nothing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist

from data_pipeline.batch import Batch
from data_pipeline.preview import Pixels, draw_grid, to_pixels
from data_pipeline.transforms import InputConfig
from models.cost import count_macs
from pretrain.checkpoints.optimizer_shards import OptimizerShards
from pretrain.engine.deepspeed_config import Precision, input_dtype
from pretrain.ledger import StepRecorder
from pretrain.monitoring.attention import draw_attention, measure_attention
from pretrain.monitoring.efficiency import model_flops_per_image, peak_of
from pretrain.monitoring.norms import PartNorms, norms_of
from pretrain.monitoring.step_timer import PHASES, StepTimer

GRID = 32
"""Training images that are drawn at a time."""
GIB = 2**30


@dataclass(frozen=True)
class Interval:
    """An interval of training: means over the ranks, equal on all of them; rates by this rank's clock."""

    losses: dict[str, float]
    """Means of the loss and its parts; empty where nothing was finite."""
    grad_norm: float | None
    """Of the whole gradient before clipping, in the last step; None where it is not known."""
    norms: dict[str, float]
    """Of each part of the network: of the gradient before clipping, in the last step, and of the weights."""
    seconds: dict[str, float]
    """Of a step, as the mean over the ranks: "total" and each phase; "slowest_data": of the rank that waits longest."""
    images_per_second: float
    """Over all ranks."""
    data_wait: float
    """Share of the step's time that went into waiting for data."""
    mfu: float | None
    """Model FLOPs utilization; None where the device's peak is not known."""
    memory_gib: float
    """Of the rank that has most: on a GPU the most that was allocated so far, else what the process occupies now."""
    images_requested: bool
    """Whether images were asked for on rank 0."""

    def rates(self) -> dict[str, float]:
        """Throughput and memory, rounded, as they are logged."""
        values = {"images_per_second": round(self.images_per_second, 2), "data_wait": round(self.data_wait, 4)}
        if self.mfu is not None:
            values["mfu"] = round(self.mfu, 4)
        return values | {"memory_gib": round(self.memory_gib, 3)}


class Monitor:
    """Measures one rank. Losses are summed on the device, so that no step waits for it.

    Args:
        engine: ``deepspeed.DeepSpeedEngine``.
        shards: of the engine.
        device: of this rank.
        precision: what the engine computes in.
        attention_images: images whose attention is measured and drawn; 0 for none, as for other networks than LaViT.
        data: how the images were made, to show them as they were.
        class_names: captions of the training images, by label.
        show_batch: keep the next training batch, to show it.
        macs: multiply-accumulates of one image; None counts those of a LaViT.
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
        show_batch: bool = False,
        macs: int | None = None,
    ) -> None:
        self._engine, self._device, self._dtype, self._data = engine, device, input_dtype(precision), data
        self._flops = model_flops_per_image(count_macs(engine.module.config) if macs is None else macs)
        self._peak = peak_of(device, precision)
        self._attention_images, self._names = attention_images, class_names
        self._evaluated: torch.Tensor | None = None
        """(m, 3, H, W) normalized images whose attention is shown; None before the first evaluation."""
        self.norms = PartNorms(shards)
        self.timer = StepTimer(device)
        self.steps = StepRecorder(engine, device)
        self.show_batch = show_batch
        """Whether the next training batch is kept for ``training_images``."""
        self._batch: tuple[torch.Tensor, torch.Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self._sums: dict[str, torch.Tensor] = {}
        self._finite = torch.zeros((), device=self._device)
        self._steps = 0
        self._began = time.monotonic()

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
        self.steps.add_batch(batch.digest)
        if self.show_batch:
            self._batch, self.show_batch = (batch.images[:GRID].clone(), batch.labels[:GRID].clone()), False

    def see_evaluation(self, batch: Batch, _: torch.Tensor) -> None:
        """Keep the first images of the first evaluation batch, for ``attention``."""
        if self._evaluated is None and self._attention_images:
            self._evaluated = batch.images[: self._attention_images].clone()

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Add the losses of a micro-batch, scalars on the device; left out of the means where one is not finite.

        The first is the loss that is minimized; it is also kept for the ledger.
        """
        stacked = torch.stack([value.detach().float() for value in losses.values()])
        self.steps.add_loss(stacked[0])
        finite = stacked.isfinite().all()
        self._finite = self._finite + finite
        for name, value in zip(losses, torch.where(finite, stacked, 0.0), strict=True):
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def step_done(self) -> None:
        """Count a step of the optimizer."""
        self.timer.enter("other")
        self._steps += 1

    def means(self) -> tuple[dict[str, float], float]:
        """``losses`` of the interval so far, and over how many micro-batches. Collective; waits for the device."""
        if not self._sums:
            return {}, 0
        stacked = torch.stack([*self._sums.values(), self._finite])
        dist.all_reduce(stacked)
        *sums, count = stacked.tolist()
        return {name: total / count for name, total in zip(self._sums, sums, strict=True)} if count else {}, count

    @torch.no_grad()
    def measure(self, *, global_batch: int, images_requested: bool) -> Interval:
        """Measure the interval so far. Collective; waits for the device.

        Args:
            global_batch: images of a step, over all ranks.
            images_requested: whether images are asked for, on rank 0.
        """
        ranks, parts = dist.get_world_size(), self.norms.parts
        losses, _ = self.means()
        norm = self._engine.get_global_grad_norm()
        norm = None if norm is None or norm < 0 else float(norm)  # DeepSpeed writes -1 for a non-finite norm
        rate = self._steps * global_batch / (time.monotonic() - self._began)
        gradients, weights = self.norms.squares(self._device)
        split = self.timer.split()
        by_rank = torch.zeros(ranks, len(PHASES) + 1)
        by_rank[dist.get_rank()] = torch.tensor(
            [*(split[phase] / self._steps for phase in PHASES), self._memory() / GIB]
        )
        requested = torch.tensor([float(images_requested and dist.get_rank() == 0)])
        shared = torch.cat([gradients.cpu(), weights.cpu(), requested, by_rank.flatten()]).to(self._device)
        dist.all_reduce(shared)
        values = shared.tolist()
        of_gradients = norms_of(parts, values[: len(parts)], norm)
        of_weights = norms_of(parts, values[len(parts) : 2 * len(parts)], None)
        by_rank = torch.tensor(values[2 * len(parts) + 1 :]).view(ranks, -1)
        mean, most = by_rank.mean(0).tolist(), by_rank.max(0).values.tolist()
        seconds = dict(zip(PHASES, mean, strict=False))
        return Interval(
            losses=losses,
            grad_norm=norm,
            norms=_rounded(
                {f"gradient/{part}": value for part, value in of_gradients.items()}
                | {f"weight/{part}": value for part, value in of_weights.items()}
            ),
            seconds=_rounded({"total": sum(mean[:-1]), **seconds, "slowest_data": most[PHASES.index("data")]}),
            images_per_second=rate,
            data_wait=seconds["data"] / max(sum(mean[:-1]), 1e-9),
            mfu=None if self._peak is None else rate * self._flops / (ranks * self._peak),
            memory_gib=most[-1],
            images_requested=bool(values[2 * len(parts)]),
        )

    def training_images(self) -> Pixels | None:
        """Draw the training images that were kept, once; None where there are none."""
        if self._batch is None:
            return None
        (images, labels), self._batch = self._batch, None
        captions = [self._names[label] for label in labels.tolist()]
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


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in values.items()}
