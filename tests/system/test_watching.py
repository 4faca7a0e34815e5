"""TensorBoard's view of a run that was killed and resumed."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from pretrain.metrics import read_metrics
from pretrain.outcome import ExitCode
from tests.system.launching import changes, launched


@pytest.mark.slow
def test_tensorboard_shows_each_point_of_a_killed_and_resumed_run_once(tmp_path: Path, digits: Path) -> None:
    folder = tmp_path / "runs/demo"
    fields = changes(data__path=digits, schedule__epochs=0.6, schedule__warmup_epochs=0.1, log_every_steps=1,
                     checkpoint__every_steps=3, evaluation__every_epochs=0.2, ema__decay=0.9)  # fmt: skip
    with launched(tmp_path / "runs", *fields, ranks=0) as run:
        run.wait_for_steps(folder, 8)
        run.process.kill()
        run.end()
    (folder / "show").touch()
    with launched(tmp_path / "runs", *fields, ranks=0) as run:
        assert run.end() == ExitCode.FINISHED, run.output()
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
        assert board.Images(name, f"pictures/{image}")[-1].encoded_image_string.startswith(b"\x89PNG")
    for title, content in (("recipe", "name: lavit_micro"), ("environment", "deepspeed"), ("git", "commit")):
        events = board.Tensors(name, f"run/{title}/text_summary")
        texts = [event.tensor_proto.string_val[0].decode() for event in events]
        assert len(texts) == 2, "one per attempt"
        assert all(content in text for text in texts)
    restarts = [row["restarts"] for row in read_metrics(folder / "metrics.jsonl", "train")]
    assert restarts == sorted(restarts)
    assert set(restarts) == {0, 1}
