"""What we do between the ranks in DeepSpeed's place gives what it gives."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pretrain.engine.data_parallel import GradientBuckets
from pretrain.engine.distributed import gather_partitions
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_equality import go_on, recipe, training, zero


class Layers(nn.Module):
    """Three layers of which the middle one, and a parameter of its own, can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, *, middle: bool) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.middle(x) if middle else x)  # type: ignore[no-any-return]


def averages_whatever_arrives(control: dist.ProcessGroup) -> None:
    for asked in ({}, {"prescale_gradients": True}):  # prescaled gradients are DeepSpeed's to average
        run = training(recipe(), zero_optimization=zero(0), **asked)
        assert ("allreduce_gradients" in vars(run.engine)) is not bool(asked)
    rank = dist.get_rank()
    model = Layers()
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    boundary = [False]
    engine: Any = SimpleNamespace(is_gradient_accumulation_boundary=lambda: boundary[0])
    buckets = GradientBuckets(engine, list(model.parameters()), bucket_size=20)
    sent: list[int] = []
    send = buckets._send
    buckets._send = lambda index: (sent.append(index), send(index))[1]  # type: ignore[method-assign, func-returns-value]
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank)
        inputs = [torch.randn(2, 4, generator=generator) for _ in range(2)]
        twin = Layers()
        twin.load_state_dict(model.state_dict())
        for x in inputs:
            twin(x, middle=rank == 0).sum().backward()
        sums = [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()]
        for gradient in sums:
            dist.all_reduce(gradient)
        sent.clear()
        for last, x in zip((False, True), inputs, strict=True):
            boundary[0] = last
            model(x, middle=rank == 0).sum().backward()  # on rank 1 the middle layer has no gradient
            if not last:
                assert not sent, "nothing is averaged before the last micro-batch"
            elif rank == 0:
                assert sent == [0, 1, 2], "the buckets of all layers are sent before the backward pass is over"
            buckets.finish()
        assert sent == [0, 1, 2, 3], "the same order on every rank, whatever arrived"
        for parameter, expected in zip(model.parameters(), sums, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected / 2)
            assert any(parameter.grad.untyped_storage().data_ptr() == f.data_ptr() for f in buckets.flats)
            parameter.grad = None


@pytest.mark.slow
def test_a_parameter_without_gradient_on_a_rank_counts_as_zero() -> None:
    run_ranks(2, averages_whatever_arrives)


def partitions_are_gathered_by_ours(control: dist.ProcessGroup) -> None:
    from deepspeed.runtime.zero import stage_1_and_2

    assert stage_1_and_2.all_gather_dp_groups is gather_partitions
    run = training(recipe(), zero_optimization=zero(1))
    with mock.patch.object(stage_1_and_2, "all_gather_dp_groups", wraps=gather_partitions) as gather:
        go_on(run, 1)
    assert gather.call_count == 1, "DeepSpeed gathers its partitions another way now"


@pytest.mark.slow
def test_weights_are_gathered_by_ours() -> None:
    """``test_equality.py`` compares them with plain torch's."""
    run_ranks(2, partitions_are_gathered_by_ours)
