"""A step with gradients that are not finite changes nothing at any stage; no host waits: test_on_stand_in.py."""

import collections
import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pretrain.deepspeed_compat import clip_tensors_by_global_norm, mask_nan_or_inf_with_val_inplace
from pretrain.fault_tolerance.nonfinite import RUN_AHEAD, NonFiniteSteps
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_equality import micro_batches, recipe, training, zero
from tests.pretrain.test_resume import state


def test_what_stands_in_for_deepspeeds_functions_computes_the_same() -> None:
    from deepspeed.runtime import utils

    for value in (0.3, 1.0, 7.0):
        norm, gradients = torch.tensor(value), [torch.randn(5), torch.randn(2, 3)]
        clipped = [[gradient.clone() for gradient in gradients] for _ in range(2)]
        for clip, own in zip((utils.clip_tensors_by_global_norm, clip_tensors_by_global_norm), clipped, strict=True):
            clip(own, max_norm=1.0, global_norm=norm, mpu=None)
        assert all(torch.equal(a, b) for a, b in zip(*clipped, strict=True))
    for value in (2.0, math.inf, -math.inf, math.nan):
        norms = [torch.tensor(value) for _ in range(2)]
        utils.mask_nan_or_inf_with_val_inplace(norms[0], device="cpu")
        mask_nan_or_inf_with_val_inplace(norms[1], device="cpu")
        assert torch.equal(*norms)


def test_the_host_asks_a_gpu_only_how_a_step_went_that_it_is_two_ahead_of(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[mock.Mock] = []

    def event(*, blocking: bool) -> mock.Mock:
        assert blocking, "a host that spins takes a core from the decoders"
        events.append(mock.Mock())
        return events[-1]

    class OnGpu(torch.Tensor):
        is_cuda = True

        def to(self, device: str, *, non_blocking: bool) -> torch.Tensor:
            assert (device, non_blocking) == ("cpu", True)
            return self.as_subclass(torch.Tensor)

    monkeypatch.setattr(torch.cuda, "Event", event)
    steps = NonFiniteSteps.__new__(NonFiniteSteps)
    steps.waits, steps._flags = False, collections.deque()
    answers = []
    for step in range(1, 7):
        steps._nonfinite = torch.tensor(float(step == 3)).as_subclass(OnGpu)
        steps.note_step()
        answers.append(steps.skipped(skip_last=RUN_AHEAD))
        assert [one.synchronize.called for one in events] == [made <= step - RUN_AHEAD for made in range(1, step + 1)]
    assert answers == [[], [], [False], [False], [True], [False]]
    assert steps.skipped() == [False, False]


def test_fp16s_loss_scale_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 itself needs a GPU; its scaler does not."""
    from deepspeed.runtime.fp16 import loss_scaler

    def begin(scale: int) -> tuple[Any, NonFiniteSteps]:
        scaler = loss_scaler.DynamicLossScaler(
            scale, scale_window=4, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
        )
        zero = SimpleNamespace(loss_scaler=scaler, optimizer=SimpleNamespace(defaults={}))
        return scaler, NonFiniteSteps(mock.Mock(optimizer=zero, zero_optimization_stage=lambda: 1))

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)
    (scaler, first), (other, second) = begin(2**8), begin(2**16)
    for overflow in (True, False, True, False, False):
        scaler.update_scale(overflow)
    second.set_loss_scale(json.loads(json.dumps(first.loss_scale())))
    for overflow in (False, False, False, True):
        scaler.update_scale(overflow)
        other.update_scale(overflow)
        assert second.loss_scale() == first.loss_scale()
    for _ in range(40):
        other.update_scale(True)  # to the end of its scale: what is too much, bad_numbers says
    assert second.loss_scale()["cur_scale"] == 1


def state_of(run: Any) -> list[torch.Tensor]:
    """All that the optimizer keeps on this rank: weights, moments, step counts."""
    views = [view.clone() for view in state(run)]
    return [*views, *(torch.tensor(run.optimizer_shards.step_of(shard)) for shard in run.optimizer_shards.shards)]


def bad_step_changes_nothing(control: dist.ProcessGroup) -> None:
    bf16 = {"bf16": {"enabled": True}}
    cases: list[tuple[Any, dict[str, Any]]] = [
        *((recipe(), {"zero_optimization": zero(stage)}) for stage in range(4)),
        *((recipe(), {"zero_optimization": zero(stage), **bf16}) for stage in (1, 2, 3)),
        (recipe(), {"zero_optimization": zero(1), **bf16, "data_types": {"grad_accum_dtype": "fp32"}}),
        (recipe(), {"zero_optimization": zero(0), "torch_autocast": {"enabled": True}}),
        (recipe(), {"zero_optimization": zero(0), "gradient_clipping": 0.0}),
        (recipe(), {"zero_optimization": zero(1), "gradient_clipping": 0.0}),
        (recipe(), {"zero_optimization": zero(2, offload_optimizer={"device": "cpu"})}),
        (recipe(kind="sgd"), {"zero_optimization": zero(0)}),
        (recipe(kind="sgd"), {"zero_optimization": zero(3)}),
        (recipe(kind="lamb"), {"zero_optimization": zero(0)}),
    ]
    last = dist.get_rank() == dist.get_world_size() - 1
    for chosen, config in cases:
        run = training(chosen, **config)
        batches = micro_batches(run.batch.micro_batch)
        run.train_step(batches)
        before = state_of(run)
        good = next(batches)
        bad = dataclasses.replace(good, images=good.images * (math.nan if last else 1.0))
        run.train_step(iter([bad]))
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(run), strict=True)), (chosen.optimizer, config)
        assert run.nonfinite.skipped() == [False, True], config
        run.train_step(batches)
        after = state_of(run)
        assert run.nonfinite.skipped() == [False], config
        assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), config
        assert all(tensor.isfinite().all() for tensor in after), config


@pytest.mark.slow
def test_a_bad_step_on_one_rank_leaves_weights_moments_and_counts_as_they_are_on_all() -> None:
    run_ranks(2, bad_step_changes_nothing)
