import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.metrics import MetricsWriter, read_metrics


def write(folder: Path, first: int, last: int, *, resumed_at: int) -> None:
    writer = MetricsWriter(folder / "metrics.jsonl", folder / "tensorboard", samples_seen=resumed_at)
    for samples in range(first, last + 1):
        writer.write("train", samples, {"step": samples, "loss": 1.0 / samples})
    writer.close()


def test_lines_and_tensorboard_say_the_same(tmp_path: Path) -> None:
    write(tmp_path, 1, 5, resumed_at=0)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = {event.step: event.value for event in board.Scalars("train/loss")}
    rows = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert points == pytest.approx({row["samples_seen"]: row["loss"] for row in rows})
    assert len(points) == 5


def test_a_resumed_run_leaves_no_double_points(tmp_path: Path) -> None:
    write(tmp_path, 1, 8, resumed_at=0)  # crashed after 8, the newest checkpoint is of 5
    write(tmp_path, 6, 9, resumed_at=5)
    assert [row["samples_seen"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 10))


def test_an_evaluation_that_will_be_done_again_does_not_stand_twice(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", samples_seen=0)
    for kind, samples in (
        ("probe", 2),
        ("eval", 4),
        ("probe", 4),
        ("train", 8),
        ("eval", 8),
    ):  # stopped in the last of each
        writer.write(kind, samples, {"loss": 1.0})
    writer.close()
    MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", samples_seen=8,
                  done={"eval": 4, "probe": 2}).close()  # fmt: skip
    rows = [(row["kind"], row["samples_seen"]) for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rows == [("probe", 2), ("eval", 4), ("train", 8)]


def test_a_line_that_a_crash_cut_is_left_out_and_does_not_stay(tmp_path: Path) -> None:
    write(tmp_path, 1, 3, resumed_at=0)
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"kind": "train", "samples_se')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    write(tmp_path, 4, 4, resumed_at=3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["samples_seen"] for line in lines] == [1, 2, 3, 4]
