"""Loops take turns, and the whole is measured with the real loader and the real trainer."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import end_to_end
from benchmarks.loops import Baton, FixedBatch, start_ranks
from benchmarks.tables import MODES
from data_pipeline.batch import Batch

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


@pytest.mark.slow
def test_all_three_modes_run_past_the_first_line_of_metrics(digits: Path) -> None:
    # Three turns of 14 steps and 20 before them: training on real batches passes step 50, where metrics are due.
    options = end_to_end.parse(["--rounds", "3", "--seconds", "0.01", "--ranks", "1"], "cpu", 2)
    options.shards = digits
    options.model, options.size, options.micro_batch = "lavit_micro", 32, 8
    rates, precision, stage = start_ranks(end_to_end.measure, options)
    assert (precision, stage) == ("fp32", 0)
    assert set(rates) == set(MODES)
    assert all(len(values) == 3 and min(values) > 0 for values in rates.values())
