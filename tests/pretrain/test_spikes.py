"""Losses far above their level are told with the images of their batch."""

import json
import math
import random
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pretrain.fault_tolerance.spikes import NEEDED, LossLevel, write_spikes
from pretrain.monitoring.monitor import Monitor
from tests.pretrain.ranks import run_ranks

BATCH = 8


def noisy(steps: int, seed: int = 0) -> list[float]:
    chance = random.Random(seed)
    return [3.0 + 0.1 * chance.gauss(0, 1) for _ in range(steps)]


def test_a_spike_is_found_with_its_step_and_the_positions_of_its_batch() -> None:
    losses = noisy(60)
    losses[50] = 6.0
    level = LossLevel()
    assert level.spikes(losses[:40], step=140, samples_seen=140 * BATCH, global_batch=BATCH) == []
    (spike,) = level.spikes(losses[40:], step=160, samples_seen=160 * BATCH, global_batch=BATCH)
    assert (spike.step, spike.loss) == (151, 6.0)
    assert (spike.first_position, spike.last_position) == (150 * BATCH, 151 * BATCH - 1)
    assert spike.level == pytest.approx(3.0, abs=0.1)
    assert spike.level < spike.limit < 6


def test_noise_a_falling_curve_and_a_new_level_are_no_spikes() -> None:
    level = LossLevel()
    losses = noisy(300) + [3 * math.exp(-step / 50) + noise - 3.0 for step, noise in enumerate(noisy(200, 1))]
    assert level.spikes(losses, step=500, samples_seen=500 * BATCH, global_batch=BATCH) == []
    jumped = level.spikes(noisy(200, 2), step=700, samples_seen=700 * BATCH, global_batch=BATCH)
    assert 0 < len(jumped) < 150, "a level that stays never became the level"


def test_nothing_is_told_before_the_level_is_known_or_of_losses_that_are_not_finite() -> None:
    level = LossLevel()
    assert level.spikes([1.0, 50.0] + [1.0] * (NEEDED - 3), step=NEEDED - 1, samples_seen=0, global_batch=BATCH) == []
    assert level.spikes([math.nan, math.inf], step=NEEDED + 1, samples_seen=0, global_batch=BATCH) == []
    assert len(level.spikes([1.0, 9.0], step=NEEDED + 3, samples_seen=0, global_batch=BATCH)) == 1


def test_the_images_of_its_batch_are_listed_and_a_full_disk_does_not_stop_training(tmp_path: Path) -> None:
    level, said = LossLevel(), []
    level.spikes(noisy(40), step=40, samples_seen=40 * BATCH, global_batch=BATCH)
    spikes = level.spikes([30.0], step=41, samples_seen=41 * BATCH, global_batch=BATCH)

    def samples(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(start, stop)
        return positions // 324, 1000 + positions

    file = tmp_path / "loss_spikes.jsonl"
    write_spikes(file, spikes, samples, said.append)
    line = json.loads(file.read_text())
    assert (line["step"], line["loss"], line["epochs"]) == (41, 30.0, [0, 1])
    assert line["sample_ids"] == [1320, 1321, 1322, 1323, 1324, 1325, 1326, 1327]
    assert "step 41: loss 30 is far above the level of 2.9" in said[0]
    write_spikes(tmp_path / "no" / "folder", spikes, samples, said.append)
    assert "could not be listed" in said[1]


def losses_are_global(control: dist.ProcessGroup) -> None:
    monitor, rank = Monitor.__new__(Monitor), dist.get_rank()
    monitor._device, monitor.timer, monitor.steps = torch.device("cpu"), mock.Mock(), mock.Mock()
    monitor.reset()
    for step in range(3):
        for part in range(2):
            monitor.add({"loss": torch.tensor(float(10 * step + 4 * part + rank))})
        monitor.step_done()
    means, step_losses = monitor.means()
    assert step_losses == [2.5, 12.5, 22.5]  # over two micro-batches and two ranks
    assert means == {"loss": 12.5}
    monitor.reset()
    monitor.add({"loss": torch.tensor(math.nan if rank else 1.0)})
    monitor.step_done()
    means, step_losses = monitor.means()
    assert means == {"loss": 1.0}
    assert math.isnan(step_losses[0])


def test_the_monitor_keeps_every_steps_loss_over_the_global_batch() -> None:
    run_ranks(2, losses_are_global)
