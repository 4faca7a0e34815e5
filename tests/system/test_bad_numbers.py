"""Gradients that are not finite: skipped, then gone back from, then the run stops with the reason."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pretrain.files import json_lines
from pretrain.metrics import read_metrics
from pretrain.outcome import ExitCode
from tests.system.launching import changes, launched

pytestmark = pytest.mark.slow
FIELDS = {
    "schedule__epochs": 0.9, "log_every_steps": 1, "checkpoint__every_steps": 4, "ema__decay": 0.9,
    "bad_numbers__skipped_steps": 3, "bad_numbers__rollbacks": 1,
}  # fmt: skip


def run_with_faults(folder: Path, digits: Path, steps: str, stage: int) -> tuple[int, str, list[dict[str, Any]]]:
    fields = changes(data__path=digits, **FIELDS)
    stage_field = ["--set", f"deepspeed.zero_optimization.stage={stage}"]
    with launched(folder, *fields, *stage_field, program=("tests/system/inject.py", f"nan={steps}")) as run:
        code = run.end()
        run.assert_no_rank_stays()
        return code, run.output(), read_metrics(folder / "demo/metrics.jsonl", "train")


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bad_steps_are_skipped_on_all_ranks_and_a_streak_goes_back_once(
    stage: int, tmp_path: Path, digits: Path
) -> None:
    # Step 6 alone is skipped; 9 to 11 are a streak of three, which goes back to the checkpoint of step 8.
    code, output, rows = run_with_faults(tmp_path, digits, "6,9-11", stage)
    assert code == ExitCode.FINISHED, output
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["skipped_steps"] for row in rows] == [0] * 5 + [1] * 3 + [2, 3] + [4] * 10
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert "WARNING step 6 was skipped: a gradient was not finite; images 320 to 383 of the order" in output
    assert "back to the weights of step 8" in output
    events = [row for row in json_lines(tmp_path / "demo/events.jsonl") if row]
    assert [row["event"] for row in events] == ["start", "went back"]
    assert "back to the weights of step 8" in events[1]["text"]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_when_going_back_does_not_help_it_stops_and_says_why(tmp_path: Path, digits: Path) -> None:
    code, output, _ = run_with_faults(tmp_path, digits, "9-99", 1)
    assert code == ExitCode.WILL_FAIL_AGAIN, output
    assert "3 steps in a row had gradients that were not finite" in output
    assert "after going back 1 times" in output
    state = json.loads((tmp_path / "demo/run.json").read_text())
    assert state["state"] == "failed"
    assert "lower optimizer.lr" in state["reason"]
