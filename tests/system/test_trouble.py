"""Gradients that are not finite, a full disk, a rank that hangs or fails: survived, or told and ended."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoints.checkpoint import list_checkpoints
from pretrain.files import json_lines
from pretrain.metrics import read_metrics
from pretrain.outcome import ExitCode
from tests.system.launching import INJECT, changes, launched, trained

pytestmark = pytest.mark.slow


def state(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "demo/run.json").read_text())
    return content


def events(folder: Path) -> list[dict[str, Any]]:
    return [row for row in json_lines(folder / "demo/events.jsonl") if row]


def run_with_faults(folder: Path, digits: Path, fault: str, **fields: object) -> tuple[int, str]:
    """Exit status and output of a run of two ranks with a fault of ``inject.py``."""
    return trained(folder, *changes(data__path=digits, log_every_steps=1, **fields), ranks=2, program=(INJECT, fault))


BAD_NUMBERS = {
    "schedule__epochs": 0.9, "schedule__warmup_epochs": 0.9, "checkpoint__every_steps": 4, "ema__decay": 0.9,
    "bad_numbers__skipped_steps": 3, "bad_numbers__rollbacks": 1,
}  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bad_steps_are_skipped_on_all_ranks_and_a_streak_goes_back_once(
    stage: int, tmp_path: Path, digits: Path
) -> None:
    # Step 6 alone is skipped; 9 to 11 are a streak of three, which goes back to the checkpoint of step 8.
    code, output = run_with_faults(
        tmp_path, digits, "nan=6,9-11", deepspeed__zero_optimization__stage=stage, **BAD_NUMBERS
    )
    assert code == ExitCode.FINISHED, output
    rows = read_metrics(tmp_path / "demo/metrics.jsonl", "train")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["skipped_steps"] for row in rows] == [0] * 5 + [1] * 3 + [2, 3] + [4] * 10
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert "WARNING step 6 was skipped: a gradient was not finite; images 320 to 383 of the order" in output
    assert "back to the weights of step 8" in output
    assert [row["event"] for row in events(tmp_path)] == ["start", "went back"]
    assert "back to the weights of step 8" in events(tmp_path)[1]["text"]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_when_going_back_does_not_help_it_stops_and_says_why(tmp_path: Path, digits: Path) -> None:
    code, output = run_with_faults(tmp_path, digits, "nan=9-99", deepspeed__zero_optimization__stage=1, **BAD_NUMBERS)
    assert code == ExitCode.WILL_FAIL_AGAIN, output
    assert "3 steps in a row had gradients that were not finite" in output
    assert "after going back 1 times" in output
    assert state(tmp_path)["state"] == "failed"
    assert "lower optimizer.lr" in state(tmp_path)["reason"]


def test_a_stuck_rank_ends_the_run_with_the_stacks_of_those_that_wait_for_it(tmp_path: Path, digits: Path) -> None:
    words = changes(data__path=digits, log_every_steps=1, watchdog__step_minutes=0.1)
    with launched(tmp_path, *words, program=(INJECT, "stop=4")) as run:
        assert run.end() == ExitCode.RETRY, run.output()
        run.assert_no_rank_stays()
        output = run.output()
    assert len(read_metrics(tmp_path / "demo/metrics.jsonl", "train")) == 3
    assert "rank 0 hangs" in output
    (stacks,) = (tmp_path / "demo/hangs").glob("*-rank-00000.txt")
    assert "train_step" in stacks.read_text()
    assert state(tmp_path)["state"] == "failed"
    assert "rank 0 hangs: computing, or waiting for the other ranks" in state(tmp_path)["reason"]


def test_when_torchrun_dies_its_ranks_save_and_a_single_process_resumes(tmp_path: Path, digits: Path) -> None:
    words = changes(data__path=digits, log_every_steps=1, schedule__epochs=0.9, schedule__warmup_epochs=0.3)
    with launched(tmp_path, *words, launcher="torchrun", program=(INJECT, "hold=5")) as run:
        run.wait_for_steps(tmp_path / "demo", 3)
        run.process.kill()
        run.assert_no_rank_stays()
    told = state(tmp_path)
    assert (told["state"], told["world_size"]) == ("preempted", 2)
    assert told["reason"] in ("the launcher died", "SIGTERM")  # the latter is the kernel's word for it
    code, output = trained(tmp_path, *words)
    assert code == ExitCode.FINISHED, output
    assert f"at step {told['step']} of 20" in output
    rows = read_metrics(tmp_path / "demo/metrics.jsonl", "train")
    assert [row["step"] for row in rows] == list(range(1, 21))


def test_the_reason_of_the_rank_that_failed_first_is_the_runs(tmp_path: Path, digits: Path) -> None:
    code, output = run_with_faults(tmp_path, digits, "raise=4")
    assert code == ExitCode.RETRY, output
    told = state(tmp_path)
    assert (told["state"], told["reason"]) == ("failed", "rank 1: RuntimeError: an injected fault")


def test_two_checkpoints_that_cannot_be_written_end_the_run_and_it_starts_again_with_space(
    tmp_path: Path, digits: Path
) -> None:
    fields = changes(data__path=digits, schedule__epochs=0.9, schedule__warmup_epochs=0.9, checkpoint__every_steps=6)
    # A rank's file has several megabytes.
    code, output = trained(tmp_path, *fields, ranks=2, file_size_limit=500_000)
    assert code == ExitCode.WILL_FAIL_AGAIN, output
    assert "WARNING checkpoint at step 6 could not be written" in output
    assert "two checkpoints in a row could not be written" in output
    told = state(tmp_path)
    assert (told["state"], told["step"]) == ("failed", 12)
    assert "make space" in told["reason"]
    assert [row["event"] for row in events(tmp_path)] == ["start", "checkpoint failed", "checkpoint failed"]
    assert not list((tmp_path / "demo/checkpoints").iterdir()), "something half-written was left"
    code, output = trained(tmp_path, *fields, ranks=2)
    assert code == ExitCode.FINISHED, output
    assert list_checkpoints(tmp_path / "demo/checkpoints")[0].name == "step-00000020"
