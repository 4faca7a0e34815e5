"""What hangs is ended: a rank by its watchdog, which says what it waited for, and a collective by its time limit."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain.engine.distributed import limit_collectives, new_cpu_group
from pretrain.outcome import ExitCode
from tests.pretrain.ranks import run_ranks

HANGING = """
import sys, threading
from pathlib import Path
from pretrain.survival.watchdog import Watchdog
watchdog = Watchdog(Path(sys.argv[1]), 3, start_s=600.0, step_s=0.5)
watchdog.on_hang = lambda reason: print("told:", reason, flush=True)
def read_from_storage_that_is_gone():
    threading.Event().wait()
watchdog.beat("waiting for data")
read_from_storage_that_is_gone()
"""


def test_a_data_stall_is_told_as_one_with_the_stack_and_ends_with_the_code_for_trying_again(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HANGING, str(tmp_path)]
    ended = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True, timeout=120)
    assert ended.returncode == ExitCode.RETRY
    assert "error: rank 3 hangs: waiting for data for" in ended.stderr
    assert "told: rank 3 hangs: waiting for data" in ended.stdout
    (stacks,) = tmp_path.glob("*-rank-00003.txt")
    assert "read_from_storage_that_is_gone" in stacks.read_text()


READING = """
import sys, threading
from pathlib import Path
from data_pipeline.store import patiently
from pretrain.survival.watchdog import Watchdog
watchdog = Watchdog(Path(sys.argv[1]), 3, start_s=0.5, step_s=5.0)
patiently(threading.Event().wait, "/data/digits-train-000001.tar")
"""


def test_a_rank_that_hangs_names_the_file_that_it_reads(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", READING, str(tmp_path)]
    ended = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True, timeout=120)
    assert ended.returncode == ExitCode.RETRY
    assert ended.stderr.startswith("error: rank 3 hangs: starting for ")
    assert "(reading /data/digits-train-000001.tar takes " in ended.stderr


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
