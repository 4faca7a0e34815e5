"""Puts together what is measured and shown of a run beside its loss; nothing of it changes what is trained."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from data_pipeline.batch import Batch
from data_pipeline.transforms import InputConfig
from models.cost import count_macs
from pretrain.checkpoints.optimizer_shards import OptimizerShards
from pretrain.engine.precision import Precision, input_dtype
from pretrain.metrics import MetricsWriter
from pretrain.monitoring.attention import AttentionWatch
from pretrain.monitoring.efficiency import model_flops_per_image, peak_of
from pretrain.monitoring.norms import PartNorms, norms_of
from pretrain.monitoring.pictures import draw_attention, draw_grid, to_pixels
from pretrain.monitoring.step_timer import PHASES, StepTimer

GRID = 32
"""Training pictures that are drawn at a time."""
GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """An interval of training, equal on all ranks."""

    norms: dict[str, float]
    """Of each part of the network: of the gradient before clipping, in the interval's last step, and of the weights."""
    seconds: dict[str, float]
    """Of a step, as the mean over the ranks: "total" and each phase; "slowest_data": of the rank that waits longest."""
    data_wait: float
    """Share of the step's time that went into waiting for data."""
    mfu: float | None
    """Model FLOPs utilisation; None where the device's peak is not known."""
    memory_gib: float
    """Of the rank that has most: on a GPU the most that was allocated so far, else what the process occupies now."""


class Monitor:
    """The measuring of one rank. ``measure`` is collective, and ``look`` is at ZeRO stage 3; rank 0 alone shows.

    Args:
        engine: ``deepspeed.DeepSpeedEngine`` of a LaViT.
        shards: of the engine.
        device: of this rank.
        precision: what the engine computes in.
        attention_pictures: pictures whose attention is looked at; 0 for none.
        data: how the pictures were made, to show them as they were.
        class_names: captions of the training pictures, by label.
        request: while this file exists, pictures are asked for; it is removed when they are drawn.
        fresh: whether the run begins here, so that its first training pictures are shown.
    """

    def __init__(
        self,
        engine: Any,
        shards: OptimizerShards,
        *,
        device: torch.device,
        precision: Precision,
        attention_pictures: int,
        data: InputConfig,
        class_names: tuple[str, ...],
        request: Path,
        fresh: bool,
    ) -> None:
        self._engine, self._device, self._dtype, self._data = engine, device, input_dtype(precision), data
        self._first = dist.get_rank() == 0
        self.norms = PartNorms(shards)
        self._flops, self._peak = model_flops_per_image(count_macs(engine.module.config)), peak_of(device, precision)
        self._attention = AttentionWatch(attention_pictures)
        self._names, self._request = class_names, request
        self._wants_batch = fresh and self._first
        self._batch: tuple[torch.Tensor, torch.Tensor] | None = None

    def see(self, batch: Batch) -> None:
        """Look at a training batch; keeps its first pictures, on the device, where they are wanted."""
        if self._wants_batch:
            self._batch, self._wants_batch = (batch.images[:GRID].clone(), batch.labels[:GRID].clone()), False

    def keep(self, batch: Batch, _: torch.Tensor) -> None:
        """Look at a batch of evaluation and its logits; the first one's first pictures are those of ``look``."""
        self._attention.keep(batch.images)

    @torch.no_grad()
    def measure(
        self, timer: StepTimer, *, steps: int, images_per_second: float, grad_norm: float | None
    ) -> tuple[Measured, bool]:
        """Measure an interval of so many steps. Collective; waits for the device.

        Args:
            timer: of the interval.
            steps: in it.
            images_per_second: over all ranks.
            grad_norm: of the whole gradient before clipping, where it is known.

        Returns:
            what was measured, and whether pictures are asked for, on all ranks alike.
        """
        ranks, rank, parts = dist.get_world_size(), dist.get_rank(), self.norms.parts
        gradients, weights = self.norms.squares(self._device)
        split = timer.split()
        mine = torch.zeros(ranks, len(PHASES) + 1)
        mine[rank] = torch.tensor([*(split[phase] / steps for phase in PHASES), self._memory() / GIB])
        asked = self._first and self._request.exists()
        told = torch.tensor([float(asked)])
        shared = torch.cat([gradients.cpu(), weights.cpu(), told, mine.flatten()]).to(self._device)
        dist.all_reduce(shared)
        values = shared.tolist()
        norms = norms_of(parts, values[: len(parts)], grad_norm)
        of_weights = norms_of(parts, values[len(parts) : 2 * len(parts)], None)
        by_rank = torch.tensor(values[2 * len(parts) + 1 :]).view(ranks, -1)
        mean, most = by_rank.mean(0).tolist(), by_rank.max(0).values.tolist()
        seconds = dict(zip(PHASES, mean, strict=False))
        measured = Measured(
            norms=_rounded(
                {f"gradient/{part}": norm for part, norm in norms.items()}
                | {f"weight/{part}": norm for part, norm in of_weights.items()}
            ),
            seconds=_rounded({"total": sum(mean[:-1]), **seconds, "slowest_data": most[PHASES.index("data")]}),
            data_wait=seconds["data"] / max(sum(mean[:-1]), 1e-9),
            mfu=None if self._peak is None else images_per_second * self._flops / (ranks * self._peak),
            memory_gib=most[-1],
        )
        return measured, bool(values[2 * len(parts)])

    def requested(self) -> None:
        """Take note, on rank 0, that pictures were asked for: the next training batch is kept."""
        self._request.unlink(missing_ok=True)
        self._wants_batch = True

    def look(self, metrics: MetricsWriter | None, samples_seen: int, where: dict[str, float] | None) -> None:
        """Show the attention of a few pictures of the validation split, fixed for this start. Collective at stage 3.

        Args:
            metrics: on rank 0.
            samples_seen: the x axis.
            where: step and epoch, to write the numbers of every block with; None: they are not written.
        """
        if self._attention.images is None or not (self._first or self._engine.zero_optimization_stage() == 3):
            return
        numbers, maps = self._attention.look(self._engine.module, self._dtype)
        if metrics is not None:
            if where is not None:
                metrics.write("attention", samples_seen, where | _rounded(numbers))
            pictures = to_pixels(self._attention.images, self._data.mean, self._data.std)
            metrics.picture("pictures/attention", samples_seen, draw_attention(pictures, maps))

    def show_batch(self, metrics: MetricsWriter, samples_seen: int) -> None:
        """Show the training pictures that were kept, if any; on rank 0."""
        if self._batch is not None:
            (images, labels), self._batch = self._batch, None
            captions = [self._names[label] for label in labels.tolist()]
            grid = draw_grid(to_pixels(images, self._data.mean, self._data.std), captions)
            metrics.picture("pictures/training", samples_seen, grid)

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        rss: int = psutil.Process().memory_info().rss
        return rss


def describe(metrics: MetricsWriter, samples_seen: int, run: Path) -> None:
    """Give the sinks recipe, environment and state of the source, as the run's folder has them."""
    environment = json.loads((run / "environment.json").read_text())
    facts = {key: value for key, value in environment.items() if key not in ("git", "dataset")}
    metrics.text("run/recipe", samples_seen, _code((run / "recipe.yaml").read_text()))
    metrics.text("run/environment", samples_seen, _code(json.dumps(facts, indent=2)))
    metrics.text("run/git", samples_seen, _code(json.dumps(environment.get("git"), indent=2)))


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in values.items()}


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
