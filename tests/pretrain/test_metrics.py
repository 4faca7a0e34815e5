import json
import time
import tracemalloc
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.metrics import MetricsWriter, read_metrics
from pretrain.monitoring.sinks import check_trackers
from pretrain.outcome import UserError
from pretrain.state import TrainState


def opened(
    folder: Path, samples_seen: int, *, evaluated: int | None = None, probed: int | None = None, **options: Any
) -> MetricsWriter:
    places = (samples_seen if place is None else place for place in (evaluated, probed))
    state = TrainState(samples_seen, **dict(zip(("evaluated_at", "probed_at"), places, strict=True)))
    return MetricsWriter(folder, state, **options)


def write(folder: Path, first: int, last: int, *, resumed_at: int) -> None:
    writer = opened(folder, resumed_at)
    for samples in range(first, last + 1):
        writer.write("train", samples, {"step": samples, "loss": 1.0 / samples})
    writer.close()


def board_points(folder: Path) -> dict[str, list[int]]:
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def seen(folder: Path, *kinds: str) -> list[int]:
    return [row["samples_seen"] for row in read_metrics(folder / "metrics.jsonl", *kinds)]


def test_damaged_lines_are_dropped_and_counted_and_the_file_that_had_them_is_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, 8, resumed_at=0)
    jsonl, said = tmp_path / "metrics.jsonl", list[str]()
    lines = jsonl.read_bytes().splitlines(keepends=True)
    rows = [json.loads(lines[4]) | {key: wrong} for key in ("kind", "samples_seen", "loss") for wrong in ([], {}, None)]
    rows += [json.loads(lines[4]) | {"samples_seen": wrong} for wrong in (True, -1, 1.5, 2**63, "x")]
    damage = [json.dumps(row).encode() for row in rows]
    damage += [lines[4].rstrip().replace(key, b"k") for key in (b"kind", b"samples_seen")]
    damage += [b'{"kind": "train", "samp', b"[" * 200_000, b"\xff", b'["kind", "samples_seen"]', b"", lines[4][:-7]]
    content = b"".join([*lines[:4], b"\n".join([*damage, b""]), *lines[5:7], b'{"kind": "eval", "samp'])
    jsonl.write_bytes(content)
    opened(tmp_path, 8, say=said.append).close()
    assert jsonl.read_bytes() == b"".join([*lines[:4], *lines[5:7]])
    (aside,) = tmp_path.glob("metrics.jsonl.damaged-*")
    assert aside.read_bytes() == content
    assert said == [f"WARNING {jsonl}: {len(damage)} damaged lines are dropped; the file that had them is {aside}"]


def test_tensorboard_shows_all_points_whatever_the_clocks_of_the_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for first, clock in ((1, now), (5, now + 7200), (9, now), (13, now - 7200)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        write(tmp_path, first, first + 5, resumed_at=first - 1)  # two points are measured again
    assert board_points(tmp_path)["train/loss"] == [*range(1, 19)]


def test_a_resume_holds_no_more_than_a_line(tmp_path: Path) -> None:
    jsonl = tmp_path / "metrics.jsonl"
    jsonl.write_text("".join(f'{{"kind": "train", "samples_seen": {n}, "loss": {n / 7}}}\n' for n in range(200_000)))
    tracemalloc.start()
    opened(tmp_path, 150_000, evaluated=0).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # bytes; the file has 12e6
    assert seen(tmp_path)[-1] == 150_000


def test_a_killed_writer_leaves_no_double_points_though_both_of_its_files_end_within_a_record(tmp_path: Path) -> None:
    jsonl = tmp_path / "metrics.jsonl"
    for start in (0, 5, 3):  # the third start goes back further than the second, past a checkpoint that was damaged
        write(tmp_path, start + 1, start + 6, resumed_at=start)
        newest = max((tmp_path / "tensorboard").iterdir(), key=lambda path: path.name)
        for file in (newest, jsonl):
            file.write_bytes(file.read_bytes()[:-7])
        assert seen(tmp_path) == [*range(1, start + 6)]
        time.sleep(1.1)  # event files are ordered by the second in which they were begun
    write(tmp_path, 5, 8, resumed_at=4)
    assert board_points(tmp_path) == {"train/step": [*range(1, 9)], "train/loss": [*range(1, 9)]}
    assert [json.loads(line)["samples_seen"] for line in jsonl.read_text().splitlines()] == [*range(1, 9)]


def test_what_is_measured_again_at_the_very_place_of_the_checkpoint_stands_once(tmp_path: Path) -> None:
    first = opened(tmp_path, 0)
    for kind, samples in (("probe", 2), ("train", 4), ("eval", 4), ("probe", 4), ("train", 8), ("eval", 8)):
        first.write(kind, samples, {"loss": 1.0})
    first.close()  # evaluated at 8 and probed at 4 by a start that died before a checkpoint knew of it
    # The second start dies likewise; where the third one begins, nothing is measured again.
    for done in ({"eval": 4, "probe": 2}, {"eval": 8, "probe": 8}):
        time.sleep(1.1)  # as above
        writer = opened(tmp_path, 8, evaluated=done["eval"], probed=done["probe"])
        again = [kind for kind, last in done.items() if last < 8]
        assert seen(tmp_path, "train") == [4, 8]
        assert [seen(tmp_path, kind) for kind in done] == ([[4], [2]] if again else [[4, 8], [2, 8]])
        for kind in again:
            writer.write(kind, 8, {"loss": 2.0})
        writer.close()
        assert board_points(tmp_path) == {"train/loss": [4, 8], "eval/loss": [4, 8], "probe/loss": [2, 8]}


def test_a_resume_rewrites_the_file_only_where_a_line_has_to_go(tmp_path: Path) -> None:
    write(tmp_path, 1, 8, resumed_at=0)
    jsonl = tmp_path / "metrics.jsonl"
    content, inode = jsonl.read_bytes(), jsonl.stat().st_ino
    write(tmp_path, 9, 8, resumed_at=8)
    assert (jsonl.read_bytes(), jsonl.stat().st_ino) == (content, inode)
    jsonl.write_bytes(content[:-1])  # cut between the line and its end
    write(tmp_path, 9, 9, resumed_at=8)
    assert seen(tmp_path) == [*range(1, 10)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_sink_that_cannot_forget_is_told_each_point_once_over_all_crashes(tmp_path: Path) -> None:
    book = mock.Mock()
    for start, end in ((0, 8), (5, 6), (4, 9)):  # killed after 8, after 6, then finished
        writer = opened(tmp_path, start, trackers={"book": book})
        for samples in range(start + 1, end + 1):
            writer.write("train", samples, {"loss": 1.0})
        writer.image("grid", end, np.zeros((2, 3, 3), np.uint8))
        writer.close()
    assert [call.args[:2] for call in book.scalars.call_args_list] == [("train", samples) for samples in range(1, 10)]
    assert [call.args[:2] for call in book.image.call_args_list] == [("grid", 8), ("grid", 9)]


def test_where_it_cannot_be_recorded_what_trackers_were_sent_they_are_sent_nothing(tmp_path: Path) -> None:
    (tmp_path / "trackers.json").mkdir()
    said, book = list[str](), mock.Mock()
    writer = opened(tmp_path, 0, trackers={"book": book}, say=said.append)
    writer.write("train", 1, {"loss": 1.0})
    writer.close()
    assert seen(tmp_path) == [1]
    assert not book.mock_calls
    assert said[0].startswith("WARNING book takes no measurements until the next start (")


def test_a_sink_that_fails_is_given_up_loudly_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    said: list[str] = []
    broken, whole = mock.Mock(flush=mock.Mock(side_effect=RuntimeError("no connection"))), mock.Mock()
    writer = opened(tmp_path, 0, trackers={"broken": broken, "whole": whole}, say=said.append)
    for samples in (1, 2):
        writer.write("train", samples, {"loss": 1.0})
        writer.flush()
    writer.close()
    assert [len(sink.scalars.mock_calls) for sink in (broken, whole)] == [1, 2]
    assert [line.split()[1] for line in said] == ["TensorBoard", "broken"]
    assert "takes no more measurements until the next start, metrics.jsonl does (RuntimeError: no connection" in said[1]
    assert seen(tmp_path) == [1, 2]


def test_a_tracker_that_is_not_installed_is_refused_with_the_way_to_get_it() -> None:
    if find_spec("wandb") is None:
        with pytest.raises(UserError, match="pip install wandb"):
            check_trackers(["wandb"])
    else:
        check_trackers(["wandb"])
    check_trackers([])
