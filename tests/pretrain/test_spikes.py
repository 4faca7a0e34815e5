"""Losses far above their level are told with the images of their batch."""

import json
import math
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pretrain.fault_tolerance.spikes import NEEDED, LossLevel, write_spikes
from pretrain.monitoring.monitor import Monitor
from pretrain.state import TrainState
from tests.pretrain.ranks import run_ranks

BATCH = 8


def noisy(steps: int, seed: int = 0) -> list[float]:
    chance = random.Random(seed)
    return [3.0 + 0.1 * chance.gauss(0, 1) for _ in range(steps)]


def rows(losses: list[float], *, last: int) -> list[dict[str, Any]]:
    """Of the ledger, for steps of which the last has this number."""
    steps = range(last - len(losses) + 1, last + 1)
    return [{"step": s, "samples_seen": s * BATCH, "loss": x} for s, x in zip(steps, losses, strict=True)]


def test_a_spike_is_found_with_its_step_and_the_positions_of_its_batch() -> None:
    losses = noisy(60)
    losses[50] = 6.0
    level = LossLevel()
    assert level.spikes(rows(losses[:40], last=140), BATCH) == []
    (spike,) = level.spikes(rows(losses[40:], last=160), BATCH)
    assert (spike.step, spike.loss) == (151, 6.0)
    assert (spike.first_position, spike.last_position) == (150 * BATCH, 151 * BATCH - 1)
    assert spike.level == pytest.approx(3.0, abs=0.1)
    assert spike.level < spike.limit < 6


def test_noise_a_falling_curve_and_a_new_level_are_no_spikes() -> None:
    level = LossLevel()
    losses = noisy(300) + [3 * math.exp(-step / 50) + noise - 3.0 for step, noise in enumerate(noisy(200, 1))]
    assert level.spikes(rows(losses, last=500), BATCH) == []
    jumped = level.spikes(rows(noisy(200, 2), last=700), BATCH)
    assert 0 < len(jumped) < 150, "a level that stays never became the level"


def test_what_happens_every_few_steps_is_no_spike() -> None:
    """Small batches of a converged network: most at the floor of label smoothing, one in ten with a wrong image."""
    chance = random.Random(0)
    losses = [0.29 + 0.002 * chance.random() + (0.09 if chance.random() < 0.1 else 0.0) for _ in range(1000)]
    assert sum(loss > 0.37 for loss in losses) > 80
    level = LossLevel()
    assert len(level.spikes(rows(losses, last=1000), BATCH)) < 8, "of some hundred"
    (spike,) = level.spikes(rows([2.0], last=1001), BATCH)
    assert spike.limit < 0.5


def test_nothing_is_told_before_the_level_is_known_or_of_losses_that_are_not_finite() -> None:
    level = LossLevel()
    assert level.spikes(rows([1.0, 50.0] + [1.0] * (NEEDED - 3), last=NEEDED - 1), BATCH) == []
    assert level.spikes(rows([math.nan, math.inf], last=NEEDED + 1), BATCH) == []
    assert len(level.spikes(rows([1.0, 9.0], last=NEEDED + 3), BATCH)) == 1


def test_the_images_of_its_batch_are_listed_and_a_full_disk_does_not_stop_training(tmp_path: Path) -> None:
    level, said = LossLevel(), []
    level.spikes(rows(noisy(40), last=40), BATCH)
    spikes = level.spikes(rows([30.0], last=41), BATCH)

    def samples(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(start, stop)
        return positions // 324, 1000 + positions

    file = tmp_path / "loss_spikes.jsonl"
    write_spikes(file, spikes, samples, said.append)
    line = json.loads(file.read_text())
    assert (line["step"], line["loss"], line["epochs"]) == (41, 30.0, [0, 1])
    assert line["replay"] == f"python -m pretrain.replay {tmp_path} --steps 40:41 --images {tmp_path.name}-step-41"
    assert line["sample_ids"] == [1320, 1321, 1322, 1323, 1324, 1325, 1326, 1327]
    assert "step 41: loss 30 is far above the level of 2.9" in said[0]
    write_spikes(tmp_path / "no" / "folder", spikes, samples, said.append)
    assert "could not be listed" in said[1]


def losses_are_global(control: dist.ProcessGroup) -> None:
    rank, engine = dist.get_rank(), mock.Mock()
    engine.train_batch_size.return_value, engine.get_global_grad_norm.side_effect = BATCH, [2.5, 0.1, None, 7.0]
    monitor = Monitor(
        engine, mock.MagicMock(), device=torch.device("cpu"), precision="fp32", attention_images=0, data=mock.Mock(),
        class_names=(), macs=1,
    )  # fmt: skip
    for step in range(3):
        for part in range(2):
            monitor.see_batch(mock.Mock(digest=2**63 + step))
            monitor.add({"loss": torch.tensor(float(10 * step + 4 * part + rank)), "part": torch.tensor(1.0)})
        monitor.end_step(torch.tensor(float(step == 1)))
    found = monitor.take(TrainState(step=12, samples_seen=12 * BATCH))
    assert [row["loss"] for row in found] == [2.5, 12.5, 22.5]  # over two micro-batches and two ranks
    assert [(row["step"], row["samples_seen"]) for row in found] == [(10, 80), (11, 88), (12, 96)]
    assert [(row["grad_norm"], row["skipped"]) for row in found] == [(2.5, False), (None, True), (None, False)]
    assert [row["batch"] for row in found] == [f"{4 * step:016x}" for step in range(3)]  # modulo 2**64
    assert monitor.take(TrainState()) == []
    monitor.add({"loss": torch.tensor(math.nan if rank else 1.0), "part": torch.tensor(1.0)})
    monitor.end_step(skipped=True)
    (row,) = monitor.take(TrainState())
    assert math.isnan(row["loss"])
    assert monitor.means() == {"loss": 12.5, "part": 1.0}, "of the steps whose losses are finite"
    monitor.reset()
    assert monitor.means() == {}


def test_every_steps_loss_norm_and_digest_are_those_of_the_global_batch() -> None:
    run_ranks(2, losses_are_global)
