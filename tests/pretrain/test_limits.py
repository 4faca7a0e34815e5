"""A collective that hangs fails by its time limit; ``tests/system/test_hang.py`` has the watchdog."""

import time

import pytest
import torch
import torch.distributed as dist

from pretrain.engine.distributed import limit_collectives, new_cpu_group
from tests.pretrain.ranks import run_ranks


def late_rank(control: dist.ProcessGroup) -> None:
    patient = new_cpu_group(600.0)
    limit_collectives(1.0, but=(control, patient))
    if dist.get_rank() == 0:
        with pytest.raises((RuntimeError, dist.DistBackendError), match=r"(?i)timed? ?out"):
            dist.all_reduce(torch.zeros(1))
    else:
        time.sleep(4)  # longer than the limit: rank 0 has given up by then
    dist.all_reduce(torch.zeros(1), group=patient)  # rank 0 waits for seconds here, and may


def test_after_the_first_step_a_collective_that_hangs_fails_soon_but_not_where_waiting_is_right() -> None:
    run_ranks(2, late_rank)
