"""No step is hit by Python's collector of cyclic garbage, and what lies in cycles is collected all the same."""

import contextlib
import gc
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from benchmarks.trainer import build
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_equality import BATCH, CPU, micro_batches, recipe

EVERY, STEPS = 4, 11


class Cycle:
    """Garbage that only the collector can find."""

    def __init__(self) -> None:
        self.itself = self


def collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def collections_of_a_run(control: dist.ProcessGroup, folder: Path, digits: Path) -> None:
    chosen = recipe()
    data = chosen.data.model_copy(update={"path": digits})
    chosen = chosen.model_copy(update={"log_every_steps": EVERY, "data": data})
    changes = {"train_batch_size": BATCH, "zero_optimization": {"stage": 0}}
    trainer = build(chosen, changes, folder, CPU, control)
    trainer.train_loader.close()
    trainer.train_loader = mock.MagicMock()
    trainer.train_loader.__iter__.return_value = micro_batches(BATCH, last=STEPS)
    within, cycles, original = [], [], trainer.train_step

    def watched(*arguments: Any, **options: Any) -> float:
        before = collections()
        lr = original(*arguments, **options)
        cycles.append(weakref.ref(Cycle()))
        many = [Cycle() for _ in range(2000)]  # more than Python lets pass without looking for garbage
        del many
        within.append(collections() - before)
        return lr

    trainer.train_step, start = watched, collections()
    with contextlib.suppress(StopIteration):  # when the batches end
        trainer.train()
    assert trainer.state.step == STEPS
    assert within[0] > 0, "the first step is left alone; what counts does count"
    assert within[1:] == [0] * (STEPS - 1)
    assert collections() - start - within[0] >= STEPS // EVERY
    last_line = STEPS // EVERY * EVERY
    assert [cycle() is None for cycle in cycles] == [step < last_line for step in range(STEPS)]
    assert gc.get_freeze_count() > 0
    with trainer._outside_training():  # as around an evaluation or a checkpoint
        assert cycles[-1]() is not None
    assert cycles[-1]() is None
    trainer.eval_loader = trainer.train_loader
    trainer.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_after_the_first_step_nothing_is_collected_within_a_step_and_all_of_it_with_the_next_line_of_metrics(
    tmp_path: Path, digits: Path
) -> None:
    run_ranks(1, collections_of_a_run, tmp_path / "run", digits)
