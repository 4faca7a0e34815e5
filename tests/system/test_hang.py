"""A rank that stands still or fails is noticed, told, and ended."""

import json
from pathlib import Path

import pytest

from pretrain.outcome import ExitCode
from tests.system.launching import changes, launched


@pytest.mark.slow
def test_a_stuck_rank_ends_the_run_with_the_stacks_of_those_that_wait_for_it(tmp_path: Path, digits: Path) -> None:
    fields = changes(data__path=digits, log_every_steps=1, watchdog__step_minutes=0.1)
    with launched(tmp_path, *fields, program=("tests/system/inject.py", "stop=4")) as run:
        run.wait_for_steps(tmp_path / "demo", 3)
        assert run.end() == ExitCode.RETRY
        run.assert_no_rank_stays()
        assert "rank 0 hangs" in run.output()
    (stacks,) = (tmp_path / "demo/hangs").glob("*-rank-00000.txt")
    assert "train_step" in stacks.read_text()
    state = json.loads((tmp_path / "demo/run.json").read_text())
    assert state["state"] == "failed"
    assert "rank 0 hangs: computing, or waiting for the other ranks" in state["reason"]


@pytest.mark.slow
def test_the_reason_of_the_rank_that_failed_first_is_the_runs(tmp_path: Path, digits: Path) -> None:
    fields = changes(data__path=digits, log_every_steps=1)
    with launched(tmp_path, *fields, program=("tests/system/inject.py", "raise=4")) as run:
        assert run.end() == ExitCode.RETRY
        run.assert_no_rank_stays()
    state = json.loads((tmp_path / "demo/run.json").read_text())
    assert (state["state"], state["reason"]) == ("failed", "rank 1: RuntimeError: an injected fault")
