"""What main.py does before the first step, and what it makes of a GPU that is full."""

import json
import os
import signal
import sys
import time
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from pretrain.fault_tolerance.full_memory import explain_full_memory
from pretrain.outcome import ExitCode, UserError
from pretrain.state import TrainState
from tests.pretrain.ranks import start_ranks
from tests.system.launching import RECIPE, changes


def through_the_door(folder: Path, *fields: str) -> None:
    from pretrain.fault_tolerance.signals import StopFlag
    from pretrain.main import main

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


def meets_an_error(door: str, who: str, folder: Path, digits: Path) -> None:
    from pretrain import evaluate
    from pretrain.fault_tolerance import signals

    signals.FIRST_SPEAKS_S = 20.0 if who == "all" else 1.0
    sys.stderr = (folder / f"told-{os.environ['RANK']}").open("w")
    first = os.environ["RANK"] == "0"
    if first:
        time.sleep(3)  # it is slow to start
    if who == "all" or not first:
        if door == "evaluate":
            evaluate.main(["there/is/none", "--data", str(digits)])
        through_the_door(folder, *changes(seed="no number", data__path=digits))
    time.sleep(60)


@pytest.mark.parametrize(("door", "told"), [("main", "--set seed=no number: seed: "), ("evaluate", "there/is/none")])
@pytest.mark.parametrize(("who", "rank"), [("all", 0), ("the other one", 1)])
def test_an_error_while_starting_is_told_once_whoever_meets_it_first(
    who: str, rank: int, door: str, told: str, *, tmp_path: Path, digits: Path
) -> None:
    with pytest.raises(ProcessExitedException) as ended:
        start_ranks(2, meets_an_error, door, who, tmp_path, digits)
    assert (ended.value.exit_code, ended.value.error_index) == (ExitCode.WILL_FAIL_AGAIN, rank)
    ((teller, line),) = [(path.name, path.read_text()) for path in tmp_path.glob("told-*") if path.read_text()]
    assert teller == f"told-{rank}"
    assert line.startswith(f"error: {told}")
    assert line.count("\n") == 1


COMPUTING = (
    "computing, or waiting for the other ranks (CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.19 GiB)"
)
DRIVER = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
EVALUATING = f"evaluating ({' '.join(DRIVER.split())})"


def full_once(where: str, folder: Path, *fields: str) -> None:
    """The last rank has no memory left at a place, as torch or as the driver says it; who waits to end is written."""
    from pretrain import main, run, train

    rank = int(os.environ["RANK"])
    original, last = train.micro_batch_loss, rank == int(os.environ["WORLD_SIZE"]) - 1

    def micro_batch_loss(run, batch):
        if where == f"step {run.progress.step + 1}" and last:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 79.19 GiB")
        return original(run, batch)

    def sleep(seconds: float) -> None:
        (folder / f"waits-{rank}").touch()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever has seen the other's end need not wait for this one's
        time.sleep(seconds)

    train.micro_batch_loss, main.time = micro_batch_loss, types.SimpleNamespace(sleep=sleep)
    run.evaluate = mock.Mock(side_effect=torch.AcceleratorError(DRIVER))
    through_the_door(folder, *fields)


@pytest.mark.parametrize(
    ("where", "ranks", "code", "told"),
    [
        ("step 1", 2, ExitCode.WILL_FAIL_AGAIN, f"{COMPUTING}: lower train_micro_batch_size_per_gpu"),
        ("step 3", 1, ExitCode.RETRY, f"{COMPUTING}: lower train_micro_batch_size_per_gpu"),
        ("evaluation", 1, ExitCode.WILL_FAIL_AGAIN, f"{EVALUATING}: lower evaluation.batch_size"),
    ],
    ids=["step 1", "step 3", "evaluation"],
)
def test_a_full_gpu_is_told_in_one_line_and_is_hopeless_at_what_was_never_done_before(
    where: str, ranks: int, code: ExitCode, told: str, *, tmp_path: Path, digits: Path
) -> None:
    with pytest.raises(ProcessExitedException) as ended:
        start_ranks(ranks, full_once, where, tmp_path, *changes(data__path=digits, evaluation__every_epochs=0.2))
    assert (ended.value.exit_code, ended.value.error_index) == (code, ranks - 1)
    reason = json.loads((tmp_path / "demo/run.json").read_text())["reason"]
    assert reason.startswith(f"rank {ranks - 1}: the GPU's memory is full, {told}")
    assert [path.name for path in tmp_path.glob("waits-*")] == [f"waits-{rank}" for rank in range(ranks - 1)]


def test_what_fitted_before_is_tried_again() -> None:
    for phase, evaluated_at, code in (
        ("evaluating", 64, ExitCode.RETRY),
        ("probing", 64, ExitCode.WILL_FAIL_AGAIN),
        ("copying a checkpoint", 0, ExitCode.RETRY),
        ("waiting for data", 0, ExitCode.RETRY),
    ):
        progress = TrainState(samples_seen=128, step=2, evaluated_at=evaluated_at)
        assert explain_full_memory(RuntimeError(DRIVER), phase, progress)[1] is code, phase
