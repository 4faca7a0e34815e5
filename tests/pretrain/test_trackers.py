"""wandb itself, without a network: what it has of a run that was killed and resumed."""

import os
import pty
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.trackers
START = """
import os, sys, time
from pathlib import Path
import numpy as np
from pretrain.metrics import MetricsWriter
from pretrain.monitoring.sinks import open_trackers
from pretrain.state import TrainState

run, start, end, dies = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "dies"
trackers = open_trackers(sys.argv[5:], run, {"name": "demo", "data": {"mean": [0.5, 0.5, 0.5]}}, print)
writer = MetricsWriter(run, TrainState(start), trackers=trackers, say=print)
for samples in range(start + 1, end + 1):
    writer.write("train", samples, {"loss": 1 / samples, "grad_norm": float("nan")})
    writer.write("time", samples, {"total": 2.0})
writer.image("images/training", end, np.full((20, 30, 3), 100, np.uint8))
writer.flush()
if dies:
    time.sleep(4)  # to send what is told takes a second or two
    os._exit(1)
writer.close()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, on a machine without an account."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "demo").mkdir()
    return tmp_path / "demo"


def start(run: Path, first: int, last: int, how: str, *trackers: str) -> str:
    command = [sys.executable, "-c", START, str(run), str(first), str(last), how, *trackers]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == (1 if how == "dies" else 0), done.stdout + done.stderr
    return done.stdout


def rows_of_wandb(run: Path) -> Iterator[dict[str, Any]]:
    """What its files hold: records of protobuf in LevelDB's log format, by block of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        content, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, length, kind = struct.unpack("<IHB", content[at : at + 7])
            whole, at = whole + content[at + 7 : at + 7 + length], at + 7 + length
            if kind in (1, 4):  # whole, or the last part
                record, whole = Record.FromString(whole), b""
                if record.WhichOneof("record_type") == "history":
                    yield {one.key or ".".join(one.nested_key): one.value_json for one in record.history.item}


def test_wandb_has_each_point_and_picture_once_though_the_run_was_killed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    start(run, 0, 8, "dies", "wandb")
    start(run, 5, 12, "ends", "wandb")
    rows = list(rows_of_wandb(run))
    for name in ("train/loss", "time/total"):
        assert [int(row["samples_seen"]) for row in rows if name in row] == [*range(1, 13)]
    assert [float(row["train/loss"]) for row in rows if "train/loss" in row] == [1 / n for n in range(1, 13)]
    assert [int(row["samples_seen"]) for row in rows if "images/training.path" in row] == [8, 12]
    assert len({name.name.split("-")[-1] for name in (run / "wandb").glob("offline-run-*")}) == 1, "two runs"


def test_on_a_terminal_wandb_asks_nobody_and_the_run_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said = []

    def read(terminal: int) -> bytes:
        said.append(os.read(terminal, 4096))
        return said[-1]

    status = pty.spawn([sys.executable, "-c", START, str(run), "0", "2", "ends", "wandb"], read)
    printed = b"".join(said).decode()
    assert os.waitstatus_to_exitcode(status) == 0, printed
    assert re.search(r"WARNING wandb takes no measurements until the next start .*API key", printed)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
