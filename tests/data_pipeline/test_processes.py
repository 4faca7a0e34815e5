"""The promise of the README, with real processes: killed in mid-epoch, continued by another number of ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def start(data: Path, out: Path, world: int, *settings: int) -> subprocess.Popen:
    """Start ranks; settings are the first step, the number of steps, the micro-batch and the threads."""
    arguments = [str(data), str(out), str(world), *map(str, settings)]
    command = [sys.executable, "-m", "tests.data_pipeline.ranks", *arguments]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    process.communicate()
    assert process.returncode == 0


def seen(out: Path) -> dict[tuple[int, int], str]:
    lines = [line for path in out.parent.glob(out.name + ".*") for line in path.read_text().splitlines()]
    found = {}
    for line in lines:
        step, row, rest = line.split(" ", 2)
        assert (int(step), int(row)) not in found
        found[int(step), int(row)] = rest
    return found


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_goes_on_with_another_number_of_ranks_down_to_the_pixel(digits, tmp_path):
    steps = 30  # 1920 samples: more than the 1437 of an epoch
    finish(start(digits, tmp_path / "whole", 1, 0, steps, 64, 1))
    whole = seen(tmp_path / "whole")
    assert len(whole) == steps * 64

    # Four ranks, killed without warning; two go on from a step that all had finished; then one.
    four = start(digits, tmp_path / "four", 4, 0, 10_000, 16, 1)
    pids = [int(pid) for pid in four.stdout.readline().split()]
    files = [Path(f"{tmp_path}/four.{rank}") for rank in range(4)]

    def finished() -> int:
        return min(len(path.read_text().splitlines()) // 16 if path.exists() else 0 for path in files)

    while finished() < 5:
        time.sleep(0.02)
        assert four.poll() is None
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    four.communicate()
    assert four.returncode == 1
    step = min(finished(), 20)
    begun = {key: value for key, value in seen(tmp_path / "four").items() if key[0] < step}
    middle = step + 5
    finish(start(digits, tmp_path / "two", 2, step, middle - step, 8, 2))
    finish(start(digits, tmp_path / "one", 1, middle, steps - middle, 32, 3))
    assert begun | seen(tmp_path / "two") | seen(tmp_path / "one") == whole
    epoch = [value.split()[1] for value in whole.values() if value.startswith("0 ")]
    assert sorted(map(int, epoch)) == list(range(1437))
