"""The plan's memory against what real training on real ranks takes; all of benchmarks/memory.py runs by hand."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.memory import CLASSES, GOAL, Configuration, estimate, measure
from models import model_config
from pretrain.check import architecture
from pretrain.planning import rehearsal
from pretrain.planning.memory import Engine, memory_model
from tests.pretrain.ranks import run_ranks

SMALL = (
    Configuration("lavit_micro", 32, 64, 1, ema=True),
    Configuration("lavit_micro", 32, 64, 2, "bf16", (True, True, False, False), accumulation=2),
)


def planned_is_measured(control: dist.ProcessGroup) -> None:
    for configuration in SMALL:
        said, seen = estimate(configuration, 2).total, measure(configuration, torch.device("cpu"), control)
        assert abs(said / seen - 1) < GOAL, f"{configuration}: planned {said / 2**20:.1f}, measured {seen / 2**20:.1f}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_planned_memory_is_what_training_takes_within_15_percent() -> None:
    run_ranks(2, planned_is_measured)


def test_any_choice_of_recomputed_stages_is_put_together_from_none_and_all() -> None:
    config = model_config("lavit_micro", drop_path=0.1)
    model = rehearsal.Rehearsal(config, "fp32", mixed=True)
    for policy in ([True, False, True, False], [False, True, True, True]):
        put_together = model.passes(policy, 6)
        names, direct = rehearsal._rehearse(config, policy, 6, "fp32", mixed=True)
        assert names == model.names
        assert put_together.kept == pytest.approx(direct.kept.sum(), rel=1e-3)
        assert put_together.forward_peak == pytest.approx(direct.forward.max(), rel=1e-3)
        assert put_together.peak == pytest.approx(max(direct.forward.max(), direct.live.max()), rel=1e-3)
        # Where one stage's backward pass ends and the next one's begins, a temporary may be counted with either.
        assert np.abs(put_together.live - direct.live).max() < 0.05 * put_together.peak


def test_memory_falls_with_the_stage_and_the_ranks_and_grows_with_what_is_kept() -> None:
    first = Configuration("lavit_micro", 32, 8, 1)
    model = memory_model(architecture(first.recipe, CLASSES), "fp32", mixed=True)

    def total(stage: int, ranks: int, policy: str = "none", *, ema: bool = False) -> int:
        one = Configuration("lavit_micro", 32, 8, stage, ema=ema)
        return model.memory(Engine.of(one.recipe, one.resolved(ranks, gpu=False)), policy, 8).standing

    standing = [total(stage, 8) for stage in range(4)]
    assert standing[0] > standing[1] == standing[2]
    assert total(1, 1) > total(1, 8) > total(1, 64)
    assert total(1, 8, ema=True) - total(1, 8) == pytest.approx(4 * model.parameters / 8, abs=4)
    assert total(0, 1) == 3 * 4 * model.parameters
    assert total(0, 8) == 4 * 4 * model.parameters, "gradients stay in the buckets in which they are averaged"


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    one = Configuration("lavit_micro", 32, 8, 1)
    model = memory_model(architecture(one.recipe, CLASSES), "fp32", mixed=True)
    engine = Engine.of(one.recipe, one.resolved(2, gpu=False))
    capacity = 100 * 2**20
    largest = model.largest(engine, "none", capacity, limit=10**4, step=2)
    assert 0 < largest < 10**4
    assert model.memory(engine, "none", largest).total <= capacity < model.memory(engine, "none", largest + 2).total
    assert model.largest(engine, "none", 1.0, limit=10**4) == 0
    assert model.largest(engine, "none", 1e15, limit=64) == 64
