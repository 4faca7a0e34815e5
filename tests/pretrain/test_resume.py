"""Twenty steps, a stop and twenty more are forty steps, bit for bit, at every stage."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoints.checkpoint import load_newest
from pretrain.checkpoints.writer import CheckpointWriter, Retention
from pretrain.engine.distributed import new_cpu_group
from pretrain.state import TrainState
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_equality import go_on, recipe, training, whole_weights, zero

HALF = 20


def state(run: Any) -> list[torch.Tensor]:
    return [
        shard.view(kind, run.optimizer_shards.optimizer)
        for shard in run.optimizer_shards.shards
        for kind in run.optimizer_shards.kinds
    ]


def stopped_equals_straight(control: dist.ProcessGroup, folder: Path) -> None:
    group = new_cpu_group(60)
    for stage in range(4):
        options: dict[str, Any] = {"accumulation": 2, "zero_optimization": zero(stage)}
        chosen = recipe(ema={"decay": 0.9})
        straight = training(chosen, **options)
        losses = go_on(straight, 2 * HALF)
        stopped = training(chosen, **options)
        assert go_on(stopped, HALF) == losses[:HALF]
        case = folder / f"{stage}"
        writer = CheckpointWriter(case, stopped.optimizer_shards, retention=Retention(), facts={}, group=group)
        writer.start(TrainState(stopped.state.samples_seen, stopped.state.step))
        assert writer.finish() == ""
        resumed = training(chosen, **options)
        loaded = load_newest(case, resumed.optimizer_shards, group=control)
        assert loaded is not None
        resumed.state = loaded[0]
        assert go_on(resumed, HALF) == losses[HALF:], f"stage {stage}: the losses are not bit-identical"
        assert all(torch.equal(a, b) for a, b in zip(state(resumed), state(straight), strict=True)), stage
        weights, expected = whole_weights(resumed.engine), whole_weights(straight.engine)
        assert all(torch.equal(weights[name], expected[name]) for name in expected), stage


@pytest.mark.slow
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit_at_every_stage(tmp_path: Path) -> None:
    run_ranks(2, stopped_equals_straight, tmp_path)
