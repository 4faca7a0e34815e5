"""What main.py does before the first step, and what it makes of a GPU that is full."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from pretrain.outcome import ExitCode, UserError
from tests.pretrain.ranks import start_ranks
from tests.system.launching import RECIPE, changes


def through_the_door(folder: Path, *fields: str) -> None:
    from pretrain.main import main
    from pretrain.survival.signals import StopFlag

    main(StopFlag(), ["--recipe", str(RECIPE), "--runs", str(folder), *fields])


def preflight_is_witnessed(folder: Path, digits: Path) -> None:
    from pretrain import main

    def measure(*_: object) -> None:
        (folder / "seen").write_text(f"{os.environ.get('CUBLAS_WORKSPACE_CONFIG')}")
        assert torch.are_deterministic_algorithms_enabled()
        raise UserError("far enough")

    main.measure = measure
    through_the_door(folder, *changes(deterministic="true", data__path=digits))


def test_torch_is_deterministic_before_its_first_product(tmp_path: Path, digits: Path) -> None:
    with pytest.raises(ProcessExitedException) as ended:
        start_ranks(1, preflight_is_witnessed, tmp_path, digits)
    assert ended.value.exit_code == ExitCode.WILL_FAIL_AGAIN
    assert (tmp_path / "seen").read_text() == ":4096:8"


def full_in_step(step: int, folder: Path, *fields: str) -> None:
    from pretrain import train

    original = train.micro_batch_loss

    def micro_batch_loss(run, batch):
        if run.progress.step + 1 == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 79.19 GiB")
        return original(run, batch)

    train.micro_batch_loss = micro_batch_loss
    through_the_door(folder, *fields)


@pytest.mark.parametrize(("step", "code"), [(1, ExitCode.WILL_FAIL_AGAIN), (3, ExitCode.RETRY)])
def test_a_full_gpu_is_told_in_one_line_and_is_hopeless_in_the_first_step(
    step: int, code: ExitCode, tmp_path: Path, digits: Path
) -> None:
    with pytest.raises(ProcessExitedException) as ended:
        start_ranks(1, full_in_step, step, tmp_path, *changes(data__path=digits))
    assert ended.value.exit_code == code
    reason = json.loads((tmp_path / "demo/run.json").read_text())["reason"]
    assert reason.startswith("rank 0: the GPU's memory is full (CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0")
    assert "lower train_micro_batch_size_per_gpu" in reason
