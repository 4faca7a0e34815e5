"""main.py before the first step, and when a GPU's memory is full."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from pretrain.outcome import ExitCode, UserError, explain_full_memory
from pretrain.state import TrainState
from tests.pretrain.ranks import start_ranks
from tests.system.launching import RECIPE, ROOT, changes


def run_main(folder: Path, *fields: str) -> None:
    from pretrain.fault_tolerance.signals import StopFlag
    from pretrain.main import main

    main(StopFlag(), ["--recipe", str(RECIPE), "--runs", str(folder), *fields])


def until_the_preflight(folder: Path, digits: Path) -> None:
    from pretrain import main

    def measure(*_: object) -> None:
        (folder / "seen").write_text(f"{os.environ.get('CUBLAS_WORKSPACE_CONFIG')}")
        assert torch.are_deterministic_algorithms_enabled()
        raise UserError("far enough")

    main.measure = measure
    run_main(folder, *changes(deterministic="true", data__path=digits))


def test_torch_is_deterministic_before_its_first_product(tmp_path: Path, digits: Path) -> None:
    with pytest.raises(ProcessExitedException) as ended:
        start_ranks(1, until_the_preflight, tmp_path, digits)
    assert ended.value.exit_code == ExitCode.WILL_FAIL_AGAIN
    assert (tmp_path / "seen").read_text() == ":4096:8"


def until_the_first_step(folder: Path, digits: Path) -> None:
    from pretrain import main

    class Times(main.StartUp):
        def table(self) -> str:
            (folder / "seen.json").write_text(json.dumps([super().table(), self.seconds, [*sys.modules]]))
            os._exit(3)

    main.StartUp = Times
    run_main(folder, *changes(data__path=digits))


def test_a_start_is_timed_and_imports_only_what_the_first_step_needs(tmp_path: Path, digits: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ProcessExitedException):
        start_ranks(1, until_the_first_step, tmp_path, digits)
    table, seconds, modules = json.loads((tmp_path / "seen.json").read_text())
    assert [*seconds] == ["imports", "rendezvous", "data", "engine", "checkpoint", "first step"]
    assert 0 < sum(seconds.values()) < time.monotonic() - began
    names, values = table.splitlines()
    assert names.split("  ")[1:] == [*seconds, "total"]
    assert [*map(float, values.split())] == pytest.approx([*seconds.values(), sum(seconds.values())], abs=0.0051)
    assert not {"torch._inductor.compile_fx", "scipy.special", "tensorboard", "matplotlib"}.intersection(modules)


@pytest.mark.parametrize(
    ("arguments", "code", "printed", "error"),
    [
        (["--help"], ExitCode.FINISHED, "usage: ", ""),
        (["--device", "gpu"], ExitCode.WILL_FAIL_AGAIN, "", "(choose from 'auto', 'cuda', 'cpu')\n"),
    ],
)
def test_help_and_wrong_usage_wait_for_no_slow_import(
    arguments: list[str], code: ExitCode, printed: str, error: str
) -> None:
    command = [sys.executable, "-X", "importtime", "pretrain/main.py", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    imported: list[str] = []
    errors = re.sub(r"import time: .*\|\s*(.+)\n", lambda line: imported.append(line[1]) or "", ended.stderr)
    assert (ended.returncode, ended.stdout[:7]) == (code, printed)
    assert errors.endswith(error) if error else not errors
    assert not {"torch", "deepspeed"} & {*imported}


def test_a_gpu_that_torch_does_not_find_ends_the_run_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "pretrain/main.py", "--recipe", str(RECIPE), "--runs", str(tmp_path)]
    hidden = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    hidden |= {"SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, check=False)
    assert ended.returncode == ExitCode.WILL_FAIL_AGAIN
    assert ended.stderr.startswith("error: torch finds no GPU in spite of ")
    assert (ended.stdout, ended.stderr.count("\n")) == ("", 1)


def meets_an_error(command: str, who: str, folder: Path, digits: Path) -> None:
    from pretrain import evaluate
    from pretrain.fault_tolerance import signals

    signals.REPORT_WAIT_S = 20.0 if who == "all" else 1.0
    sys.stderr = (folder / f"errors-{os.environ['RANK']}").open("w")
    first = os.environ["RANK"] == "0"
    if first:
        time.sleep(3)  # it is slow to start
    if who == "all" or not first:
        if command == "evaluate":
            evaluate.main(["there/is/none", "--data", str(digits)])
        run_main(folder, *changes(seed="no number", data__path=digits))
    time.sleep(60)


@pytest.mark.parametrize(("command", "reason"), [("main", "--set seed=no number: seed: "), ("evaluate", "there/is/")])
@pytest.mark.parametrize(("who", "rank"), [("all", 0), ("the other one", 1)])
def test_an_error_while_starting_is_printed_once_whoever_meets_it_first(
    who: str, rank: int, command: str, reason: str, *, tmp_path: Path, digits: Path
) -> None:
    with pytest.raises(ProcessExitedException) as ended:
        start_ranks(2, meets_an_error, command, who, tmp_path, digits)
    assert (ended.value.exit_code, ended.value.error_index) == (ExitCode.WILL_FAIL_AGAIN, rank)
    ((file, line),) = [(path.name, path.read_text()) for path in tmp_path.glob("errors-*") if path.read_text()]
    assert file == f"errors-{rank}"
    assert line.startswith(f"error: {reason}")
    assert line.count("\n") == 1


COMPUTING = (
    "computing, or waiting for the other ranks (CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.19 GiB)"
)
DRIVER = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
EVALUATING = f"evaluating ({' '.join(DRIVER.split())})"


def full_once(where: str, folder: Path, *fields: str) -> None:
    """The last rank has no memory left at a place, as torch or as the driver says it; who waits to end is written."""
    from pretrain import losses, main, trainer

    rank = int(os.environ["RANK"])
    original, last = losses.TrainingLoss.__call__, rank == int(os.environ["WORLD_SIZE"]) - 1

    def compute(loss, batch, state):
        if where == f"step {state.step + 1}" and last:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 79.19 GiB")
        return original(loss, batch, state)

    def sleep(seconds: float) -> None:
        (folder / f"waits-{rank}").touch()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever has seen the other's end need not wait for this one's
        time.sleep(seconds)

    losses.TrainingLoss.__call__, main.time = compute, types.SimpleNamespace(sleep=sleep)
    trainer.evaluate = mock.Mock(side_effect=torch.AcceleratorError(DRIVER))
    run_main(folder, *fields)


@pytest.mark.parametrize(
    ("where", "ranks", "code", "reason"),
    [
        ("step 1", 2, ExitCode.WILL_FAIL_AGAIN, f"{COMPUTING}: lower train_micro_batch_size_per_gpu"),
        ("step 3", 1, ExitCode.RETRY, f"{COMPUTING}: lower train_micro_batch_size_per_gpu"),
        ("evaluation", 1, ExitCode.WILL_FAIL_AGAIN, f"{EVALUATING}: lower evaluation.batch_size"),
    ],
    ids=["step 1", "step 3", "evaluation"],
)
def test_a_full_gpu_is_one_line_and_will_fail_again_at_what_was_never_done_before(
    where: str, ranks: int, code: ExitCode, reason: str, *, tmp_path: Path, digits: Path
) -> None:
    with pytest.raises(ProcessExitedException) as ended:
        start_ranks(ranks, full_once, where, tmp_path, *changes(data__path=digits, evaluation__every_epochs=0.2))
    assert (ended.value.exit_code, ended.value.error_index) == (code, ranks - 1)
    recorded = json.loads((tmp_path / "demo/run.json").read_text())["reason"]
    assert recorded.startswith(f"rank {ranks - 1}: the GPU's memory is full, {reason}")
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
