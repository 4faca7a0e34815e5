"""A checkpoint that cannot be written is told, tolerated once, and leaves nothing half-written."""

import json
from pathlib import Path

import pytest

from pretrain.checkpoints.checkpoint import list_checkpoints
from pretrain.files import json_lines
from pretrain.outcome import ExitCode
from tests.system.launching import changes, launched


@pytest.mark.slow
def test_two_checkpoints_that_cannot_be_written_end_the_run_and_it_starts_again_with_space(
    tmp_path: Path, digits: Path
) -> None:
    fields = changes(data__path=digits, schedule__epochs=0.9, checkpoint__every_steps=6)
    with launched(tmp_path, *fields, file_size_limit=500_000) as run:  # a rank's file has several megabytes
        assert run.end() == ExitCode.WILL_FAIL_AGAIN, run.output()
        run.assert_no_rank_stays()
        assert "WARNING checkpoint at step 6 could not be written" in run.output()
        assert "two checkpoints in a row could not be written" in run.output()
    state = json.loads((tmp_path / "demo/run.json").read_text())
    assert (state["state"], state["step"]) == ("failed", 12)
    assert "make space" in state["reason"]
    events = [row for row in json_lines(tmp_path / "demo/events.jsonl") if row]
    assert [row["event"] for row in events] == ["start", "checkpoint failed", "checkpoint failed"]
    assert not list((tmp_path / "demo/checkpoints").iterdir()), "something half-written was left"
    with launched(tmp_path, *fields) as run:
        assert run.end() == ExitCode.FINISHED, run.output()
    assert list_checkpoints(tmp_path / "demo/checkpoints")[0].name == "step-00000020"
