"""Probes of the features, without the classifier that they were trained with, on a small labeled set.

A weighted k-NN (Wu et al. 2018, as DINO has it) and a linear classifier, both on the frozen features that the
network's own classifier reads. Probing does not change the weights, the optimizer or torch's random state.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batch import to_device
from data_pipeline.dataset import Dataset
from data_pipeline.loader import EvalLoader
from data_pipeline.transforms import InputConfig
from pretrain.engine.distributed import gather_rows
from pretrain.factory import classifier_of
from pretrain.fault_tolerance.stop import StopAgreement
from pretrain.outcome import UserError
from pretrain.recipe import ProbesSection

ITERATIONS_AT_A_TIME = 10
"""Of L-BFGS, between two checks of the time limit and the stop flag."""
ROWS_AT_A_TIME = 8192
"""Of the linear classifier's logits, which bounds the memory."""


@dataclass(frozen=True)
class Probed:
    """Result of the probes."""

    knn_top1: float
    """Share of images that the k nearest neighbors classify correctly, in percent."""
    linear_top1: float
    """Share of images that the linear classifier classifies correctly, in percent."""
    samples: int
    """Images probed: the size of the set's validation split."""

    def __str__(self) -> str:
        return f"k-NN top-1 {self.knn_top1:.2f} %  linear top-1 {self.linear_top1:.2f} %  ({self.samples} images)"


class ProbesEndedError(Exception):
    """The probes ended without a result, on all ranks."""

    def __init__(self, why: Literal["stopped", "too late"]) -> None:
        super().__init__(why)
        self.why = why


class Deadline:
    """A flag that is set after some time."""

    reason = "the time limit"

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def __bool__(self) -> bool:
        return time.monotonic() > self._end


class Probes:
    """The probes of a run on this rank.

    Args:
        section: the recipe's.
        sets: what ``open_probe_sets`` gives for it.
        data: the run's own input, whose size and normalization are applied to the set.
        batch_size: images per rank and forward pass.
        control: CPU group for agreements.
        place: ranks, device and handling of bad samples, keyword arguments of ``EvalLoader``.
    """

    def __init__(
        self,
        section: ProbesSection,
        sets: tuple[Dataset, Dataset],
        data: InputConfig,
        *,
        batch_size: int,
        control: dist.ProcessGroup,
        place: dict[str, Any],
    ) -> None:
        self.section = section
        self._train, self._val = sets
        self._input = data.model_copy(update={"path": section.path, "cache": section.cache})
        self._batch_size, self._control, self._place = batch_size, control, place

    def run(self, engine: Any, dtype: torch.dtype, *, stop: Callable[[], bool]) -> Probed:
        """Probe the weights as they are. Collective; every rank makes the same number of forward passes.

        Args:
            engine: ``deepspeed.DeepSpeedEngine``; is left in training mode.
            dtype: what it computes in.
            stop: polled at every batch; must return the same on all ranks.

        Raises:
            ProbesEndedError: stopped, or over the time limit.
            UserError: no image of the set can be read.
        """
        late = StopAgreement(Deadline(self.section.time_limit_minutes), self._control)

        def poll() -> None:
            if stop():
                raise ProbesEndedError("stopped")
            if late.at_step_boundary():
                raise ProbesEndedError("too late")

        engine.eval()
        try:
            known = [torch.cat(parts) for parts in zip(*self._features(engine, dtype, self._train, poll), strict=True)]
            seen = list(self._features(engine, dtype, self._val, poll))
        finally:
            engine.train()
        features, labels, valid = (gather_rows(part) for part in known)
        features, labels = features[valid.bool()], labels[valid.bool()]
        if not len(features):
            raise UserError(f"probes.path: no image of {self._train.path} {self._train.split} can be read")
        section, classes = self.section, self._train.num_classes
        linear = fit_linear(features, labels, classes=classes, iterations=section.linear_iterations, poll=poll)
        counts = torch.zeros(3, dtype=torch.float64, device=features.device)
        for batch, targets, valid_rows in seen:
            poll()
            near = nearest(
                features, labels, batch, classes=classes, k=section.knn_k, temperature=section.knn_temperature
            )
            right = [near == targets, linear(batch).argmax(1) == targets, torch.ones_like(targets, dtype=torch.bool)]
            counts += torch.stack([(answer & valid_rows.bool()).sum() for answer in right])
        dist.all_reduce(counts)
        by_knn, by_linear, samples = counts.tolist()
        if not samples:
            raise UserError(f"probes.path: no image of {self._val.path} {self._val.split} can be read")
        return Probed(100 * by_knn / samples, 100 * by_linear / samples, int(samples))

    def _features(
        self, engine: Any, dtype: torch.dtype, dataset: Dataset, poll: Callable[[], None]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's share in batches: features (m, C) fp32, labels (m,), and whether a row counts (m,) uint8."""
        loader = EvalLoader(dataset, self._input, batch_size=self._batch_size, **self._place)
        try:
            for batch in loader:
                poll()
                with torch.no_grad(), _what_the_head_reads(engine.module) as read:
                    engine(batch.images.to(dtype))
                yield read.pop().float(), batch.labels, to_device(batch.valid, batch.labels.device).byte()
        finally:
            loader.close()


def open_probe_sets(section: ProbesSection, *, check_files: bool = True) -> tuple[Dataset, Dataset]:
    """What the probes learn from and what they are measured on; ``check_files`` as for ``Dataset.open``.

    Raises:
        DataError: there is no such dataset or split.
    """
    splits = (section.train_split, section.val_split)
    train, val = (Dataset.open(section.path, split, section.cache, check_files=check_files) for split in splits)
    return train, val


def nearest(features: Tensor, labels: Tensor, queries: Tensor, *, classes: int, k: int, temperature: float) -> Tensor:
    """Labels that the k nearest by cosine similarity s vote for, each with ``exp(s / temperature)`` (Wu et al. 2018).

    Args:
        features: (n, C) of the labeled set; all vote when there are fewer than k.
        labels: (n,) int64.
        queries: (m, C).
        classes: number of classes.
        k: neighbors that vote.
        temperature: of the votes.

    Returns:
        (m,) int64.
    """
    similarity, neighbors = (F.normalize(queries) @ F.normalize(features).T).topk(min(k, len(features)))
    votes = torch.zeros(len(queries), classes, device=queries.device)
    return votes.scatter_add_(1, labels[neighbors], (similarity / temperature).exp()).argmax(1)


def fit_linear(
    features: Tensor, labels: Tensor, *, classes: int, iterations: int, poll: Callable[[], None]
) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression on standardized features, by L-BFGS from zero (as CLIP's linear probe).

    It minimizes the sum of the cross-entropy over all n samples plus half the squared weights: scikit-learn's ``C=1``.
    Rank 0 does it, since sums in another order would give another classifier for another number of ranks. Collective.

    Args:
        features: (n, C) fp32.
        labels: (n,) int64.
        classes: number of classes.
        iterations: of L-BFGS.
        poll: called every few iterations on all ranks; ends it by raising.

    Returns:
        features (m, C) -> logits (m, classes).
    """
    mean, deviation = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    steps = min(iterations, ITERATIONS_AT_A_TIME)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def logits(rows: Tensor) -> Tensor:
        return F.linear((rows - mean) / deviation, weight, bias)

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = 0.5 * weight.square().sum() / len(features)
        total.backward()
        for rows, targets in zip(features.split(ROWS_AT_A_TIME), labels.split(ROWS_AT_A_TIME), strict=True):
            part = F.cross_entropy(logits(rows), targets, reduction="sum") / len(features)
            part.backward()
            total = total.detach() + part.detach()
        return total

    for _ in range(0, iterations, ITERATIONS_AT_A_TIME):
        poll()
        if dist.get_rank() == 0:
            optimizer.step(loss)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    dist.broadcast(weight, src=0)
    dist.broadcast(bias, src=0)
    return logits


@contextmanager
def _what_the_head_reads(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collect the pooled features of every forward pass within the block."""
    read: list[Tensor] = []
    compiled = vars(model).pop("forward", None)  # a compiled graph would not call the hook
    hook = classifier_of(model).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(1)))
    try:
        yield read
    finally:
        hook.remove()
        if compiled is not None:
            model.forward = compiled
