import numpy as np
import pytest
import torch
from torch import nn

from pretrain.engine.schedule import drop_path_uniforms, learning_rate
from pretrain.recipe import ScheduleSection

SCHEDULE = ScheduleSection(epochs=10, warmup_epochs=2, min_lr=0.1)


def at(samples: int) -> float:
    return learning_rate(samples, peak=1.0, schedule=SCHEDULE, epoch_size=100)


def test_the_schedule_warms_up_linearly_then_follows_a_cosine_to_its_floor() -> None:
    assert at(50) == pytest.approx(0.25)
    assert at(200) == pytest.approx(1.0)
    assert at(600) == pytest.approx((1.0 + 0.1) / 2)
    assert at(1000) == pytest.approx(0.1)
    assert at(1100) == pytest.approx(0.1)


def test_the_schedule_agrees_with_torchs_cosine() -> None:
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=800, eta_min=0.1)
    for samples in range(200, 1000):
        assert at(samples) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        cosine.step()


def test_drop_path_draws_do_not_depend_on_how_the_batch_is_split() -> None:
    whole = drop_path_uniforms(7, 3, np.arange(12), branches=5)
    parts = [drop_path_uniforms(7, 3, rows, branches=5) for rows in np.split(np.arange(12), 4)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_drop_path_draws_are_the_rows_of_one_stream_for_the_global_batch() -> None:
    """Which is what runs have drawn from, so that a run that resumes sees the same masks."""
    for seed, step, size, branches in ((7, 3, 24, 5), (2**40, 2**33, 100, 36), (0, 0, 64, 1)):
        key, counter = np.array([seed, 0x64726F70], np.uint64), np.array([0, 0, 0, step], np.uint64)
        stream = np.random.Generator(np.random.Philox(key=key, counter=counter))
        whole = stream.random((size, branches), dtype=np.float32).T
        for rows in (*np.split(np.arange(size), 4), np.array([size - 1]), np.array([5, 3, 9])):
            assert np.array_equal(drop_path_uniforms(seed, step, rows, branches=branches), whole[:, rows])


def test_drop_path_draws_differ_between_steps_and_seeds_and_are_uniform() -> None:
    draws = drop_path_uniforms(7, 3, np.arange(1000), branches=20)
    for other in (drop_path_uniforms(7, 4, np.arange(1000), branches=20),
                  drop_path_uniforms(8, 3, np.arange(1000), branches=20)):  # fmt: skip
        assert not torch.equal(draws, other)
        assert abs(torch.corrcoef(torch.stack([draws.flatten(), other.flatten()]))[0, 1]) < 0.03
    assert draws.min() >= 0
    assert draws.max() < 1
    assert draws.mean() == pytest.approx(0.5, abs=0.01)
