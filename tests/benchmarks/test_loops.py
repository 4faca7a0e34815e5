"""Loops take turns, and the whole is measured with the real loader and the real trainer."""

import argparse
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from benchmarks import end_to_end
from benchmarks.data import cpu_seconds
from benchmarks.loops import CLASSES, Baton, FixedBatch, bare_loop, bare_loss, recipe_of, start_ranks
from benchmarks.tables import ALTERNATIVE, MODES
from data_pipeline.batch import Batch
from models import LaViT
from pretrain.checkpoints.checkpoint import Progress
from pretrain.engine.build import build_model
from pretrain.engine.precision import Precision
from pretrain.losses import Classification
from pretrain.recipe import Recipe
from pretrain.train import micro_batch_loss

NUMBERS = np.arange(2)
BATCH = Batch(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long), NUMBERS, NUMBERS, NUMBERS, NUMBERS >= 0)
CPU = torch.device("cpu")


class Counting(FixedBatch):
    """Knows how many batches were taken."""

    taken = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            Counting.taken += 1
            yield batch


def test_a_loop_stands_still_but_in_its_turns() -> None:
    steps: list[str] = []
    batons = {name: Baton() for name in "ab"}
    for name, baton in batons.items():

        def loop(name: str = name, baton: Baton = baton) -> None:
            steps.extend(name for _ in baton.turns(FixedBatch(BATCH)))

        baton.start(loop)
    assert not steps
    batons["a"].time(2, CPU)
    batons["b"].time(1, CPU)
    assert steps == ["a", "a", "b"]
    for baton in batons.values():
        baton.end()
    assert steps == ["a", "a", "b"]


def test_no_batch_is_asked_for_before_its_turn() -> None:
    baton = Baton()
    Counting.taken = 0
    baton.start(lambda: end_to_end.drain(baton.turns(Counting(BATCH))))
    assert Counting.taken == 0
    baton.step()
    assert Counting.taken == 1
    baton.end()


def test_what_breaks_a_loop_is_told_to_who_waits() -> None:
    baton = Baton()

    def loop() -> None:
        for _ in baton.turns(FixedBatch(BATCH)):
            raise ValueError("broken")

    baton.start(loop)
    with pytest.raises(ValueError, match="broken"):
        baton.step()
    assert threading.active_count() < 50


def test_a_fixed_batch_answers_as_a_loader_where_the_loss_spikes() -> None:
    epochs, ids = Baton().turns(FixedBatch(BATCH)).samples(3, 7)
    assert len(epochs) == len(ids) == 4


def small(**data: object) -> Recipe:
    return recipe_of(argparse.Namespace(model="lavit_micro", size=32), compiled=False, data=data)


def test_the_bare_loop_minimises_what_the_trainer_minimises() -> None:
    recipe = small()
    network = build_model(recipe, CLASSES).eval()  # without drop path, which the trainer draws by sample
    run = SimpleNamespace(
        recipe=recipe, batch=SimpleNamespace(global_batch=2), device=CPU, dtype=torch.float32, epoch_size=10,
        engine=type("Engine", (), {"module": network, "__call__": staticmethod(network)})(),
        classification=Classification(recipe.loss, recipe.mixing, (), CPU), progress=Progress(),
    )  # fmt: skip
    loss, parts = micro_batch_loss(run, BATCH)
    assert parts["diagonality"] > 0
    torch.testing.assert_close(bare_loss(network, BATCH, "fp32"), loss)


def trained_bare(precision: Precision, steps: int) -> LaViT:
    network = build_model(small(), CLASSES)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        bare_loop(network, islice(FixedBatch(BATCH), steps), precision=precision, compiled=False)
    finally:
        dist.destroy_process_group()
    return network


def test_the_bare_loop_in_bf16_steps_masters_so_that_no_small_step_is_lost() -> None:
    # Weights of norms begin at 1, a step is of 0.001, and bf16's next numbers are 0.9961 and 1.0078.
    found, exact = (dict(trained_bare(precision, 24).named_parameters()) for precision in ("bf16", "fp32"))
    names = [name for name in found if name.endswith("norm1.weight")]
    assert {found[name].dtype for name in names} == {torch.bfloat16}
    scales, wanted = (torch.cat([of[name].float() for name in names]) for of in (found, exact))
    assert (scales - wanted).abs().mean() < 0.5 * (1 - wanted).abs().mean()


def test_the_alternatives_workers_read_some_batches_ahead_and_then_sleep(digits: Path) -> None:
    recipe = small(path=str(digits), augment=end_to_end.AUGMENT, threads=2)
    batches = iter(end_to_end.PillowBatches(recipe, 16, CPU))
    workers = psutil.Process().children()
    assert len(workers) >= 2
    for batch in islice(batches, 12):
        assert batch.images.shape == (16, 3, 32, 32)
        assert batch.labels.shape == batch.rows.shape == (16,)
    assert end_to_end.come_to_rest() < end_to_end.AT_REST
    rested = cpu_seconds()
    for _ in islice(batches, 48):  # the kernel counts in steps of 10 ms, more than one batch of these takes
        pass
    assert end_to_end.come_to_rest() < end_to_end.AT_REST
    assert cpu_seconds() > rested


@pytest.mark.slow
def test_all_modes_run_past_the_first_line_of_metrics(digits: Path) -> None:
    # Three turns of 14 steps and 20 before them: training on real batches passes step 50, where metrics are due.
    options = end_to_end.parse(["--rounds", "3", "--seconds", "0.01", "--ranks", "1"], "cpu", 2)
    options.shards = digits
    options.model, options.size, options.micro_batch = "lavit_micro", 32, 8
    rates, precision, stage, busy = start_ranks(end_to_end.measure, options)
    assert (precision, stage) == ("fp32", 0)
    assert set(rates) == {*MODES, ALTERNATIVE}
    assert 0 <= busy < end_to_end.AT_REST
    assert all(len(values) == 3 and min(values) > 0 for values in rates.values())
