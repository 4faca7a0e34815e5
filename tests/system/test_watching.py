"""TensorBoard's view of a run that was killed and resumed, and ``--profile`` of a real run."""

import gzip
import json
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from pretrain.metrics import read_metrics
from pretrain.monitoring.profile import StepProfiler, parse_steps
from pretrain.outcome import ExitCode, UserError
from tests.system.launching import INJECT, changes, launched, trained


@pytest.mark.slow
def test_tensorboard_shows_each_point_of_a_killed_and_resumed_run_once(tmp_path: Path, digits: Path) -> None:
    folder = tmp_path / "runs/demo"
    fields = changes(data__path=digits, schedule__epochs=0.6, schedule__warmup_epochs=0.1, log_every_steps=1,
                     checkpoint__every_steps=3, evaluation__every_epochs=0.2, ema__decay=0.9)  # fmt: skip
    code, output = trained(tmp_path / "runs", *fields, program=(INJECT, "kill=9"))
    assert code == -signal.SIGKILL, output
    (folder / "show").touch()
    code, output = trained(tmp_path / "runs", *fields)
    assert code == ExitCode.FINISHED, output
    assert not (folder / "show").exists(), "the requested images were not drawn"

    board = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs")).Reload()
    (name,) = board.Runs()
    for kind, field in (("train", "loss"), ("eval", "top1"), ("eval_average", "top1"), ("attention", "step")):
        rows = list(read_metrics(folder / "metrics.jsonl", kind))
        points = board.Scalars(name, f"{kind}/{field}")
        assert [point.step for point in points] == [row["samples_seen"] for row in rows]
        assert [point.value for point in points] == pytest.approx([row[field] for row in rows], rel=1e-5)
        assert len({row["samples_seen"] for row in rows}) == len(rows) > 1
    for image in ("training", "attention"):
        assert board.Images(name, f"images/{image}")[-1].encoded_image_string.startswith(b"\x89PNG")
    for title, content in (("recipe", "name: lavit_micro"), ("environment", "deepspeed"), ("git", "commit")):
        events = board.Tensors(name, f"run/{title}/text_summary")
        texts = [event.tensor_proto.string_val[0].decode() for event in events]
        assert len(texts) == 2, "one per attempt"
        assert all(content in text for text in texts)
    restarts = [row["restarts"] for row in read_metrics(folder / "metrics.jsonl", "train")]
    assert restarts == sorted(restarts)
    assert set(restarts) == {0, 1}


@pytest.mark.slow
def test_chosen_steps_of_all_ranks_are_profiled_and_the_summary_says_where_their_time_went(
    tmp_path: Path, digits: Path
) -> None:
    fields = changes(data__path=digits, schedule__epochs=0.2, schedule__warmup_epochs=0, log_every_steps=1)
    with launched(tmp_path, *fields, "--profile", "2:3", "--profile-ranks", "all") as run:
        assert run.end() == ExitCode.FINISHED, run.output()
        assert run.output().count("profile of steps 2 to 3: ") == 1
    folder = tmp_path / "demo/profile"
    names = [f"rank-0000{rank}-steps-2-3.{kind}" for rank in (0, 1) for kind in ("trace.json.gz", "txt")]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for rank in (0, 1):
        events = json.loads(gzip.decompress((folder / f"rank-0000{rank}-steps-2-3.trace.json.gz").read_bytes()))
        names = {event.get("name") for event in events["traceEvents"]}
        assert sum(event.get("name") == "aten::_softmax" and "dur" in event for event in events["traceEvents"]) > 0
        assert "aten::mul" in names
    assert "aten::" in (folder / "rank-00000-steps-2-3.txt").read_text()
    assert len(read_metrics(tmp_path / "demo/metrics.jsonl", "train")) == 4


def test_steps_that_the_run_does_not_have_are_refused_and_those_not_taken_reported(tmp_path: Path) -> None:
    said: list[str] = []

    def profiler(first: int, last: int) -> StepProfiler:
        return StepProfiler((first, last), range(2, 8), tmp_path / "rank", torch.device("cpu"), said.append)

    with pytest.raises(UserError, match="--profile 3:9: the run has 8 steps; choose steps that it takes"):
        profiler(3, 9)
    profiler(2, 3)
    assert said.pop() == "WARNING --profile 2:3: the run is at step 2; nothing is profiled"
    ends_early = profiler(3, 8)
    ends_early.before_step(2)
    ends_early.after_step(3)
    ends_early.close()
    assert said == ["WARNING the profile of steps 3 to 8 was not written: the run ended before"]
    assert not list(tmp_path.iterdir())


def test_steps_are_read_or_refused_with_an_example() -> None:
    assert parse_steps("10:13") == (10, 13)
    assert parse_steps("7") == (7, 7)
    for text in ("", "3:", "0:2", "5:4", "a", "1:2:3"):
        with pytest.raises(UserError, match="for example --profile 10:13"):
            parse_steps(text)
