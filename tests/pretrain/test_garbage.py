"""No step is hit by Python's collector of cyclic garbage, and what lies in cycles is collected all the same."""

import contextlib
import gc
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from benchmarks.trainer import trainer_run
from pretrain import train
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
    run = trainer_run(chosen, changes, folder, CPU, control)
    run.train_loader.close()
    run.train_loader = mock.MagicMock()
    run.train_loader.__iter__.return_value = micro_batches(BATCH, last=STEPS)
    within, cycles, original = [], [], train.train_step

    def watched(*arguments: Any) -> float:
        before = collections()
        lr = original(*arguments)
        cycles.append(weakref.ref(Cycle()))
        many = [Cycle() for _ in range(2000)]  # more than Python lets pass without looking for garbage
        del many
        within.append(collections() - before)
        return lr

    train.train_step, start = watched, collections()
    with contextlib.suppress(StopIteration):  # when the batches end
        train.train(run)
    assert run.progress.step == STEPS
    assert within[0] > 0, "the first step is left alone; what counts does count"
    assert within[1:] == [0] * (STEPS - 1)
    assert collections() - start - within[0] >= STEPS // EVERY
    last_line = STEPS // EVERY * EVERY
    assert [cycle() is None for cycle in cycles] == [step < last_line for step in range(STEPS)]
    assert gc.get_freeze_count() > 0
    with run._beside_training():  # as around an evaluation or a checkpoint
        assert cycles[-1]() is not None
    assert cycles[-1]() is None
    run.eval_loader = run.train_loader
    run.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_after_the_first_step_nothing_is_collected_within_a_step_and_all_of_it_with_the_next_line_of_metrics(
    tmp_path: Path, digits: Path
) -> None:
    run_ranks(1, collections_of_a_run, tmp_path / "run", digits)
