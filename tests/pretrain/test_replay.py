"""The ledger is exact and consistent, and a replay compares, explains and refuses as it should."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from data_pipeline.batch import content_digest
from data_pipeline.dataset import Dataset
from data_pipeline.loader import TrainLoader
from data_pipeline.transforms import InputConfig
from pretrain.files import cut_lines
from pretrain.ledger import Row, is_row, read_rows, write_rows
from pretrain.outcome import UserError
from pretrain.recipe import load_recipe
from pretrain.replay import BOUND, DOUBLING, Plan, Replay, main, make_plan
from pretrain.run_folder import RunFolder
from tests.system.launching import RECIPE

SETUP: Row = {"world_size": 2, "micro_batch": 32, "stage": 1, "precision": "fp32", "on": "cpu x 1, torch 2"}


def row(step: int, **changes: Any) -> Row:
    loss = 1 / (3 + step)
    fields = {"loss": loss, "grad_norm": math.pi * loss, "skipped": False, "batch": f"{step:016x}"}
    return {"step": step, "samples_seen": 64 * step, **fields, **changes}


def test_a_digest_is_of_all_rows_in_any_order_and_shows_every_bit() -> None:
    chance = np.random.default_rng(0)
    ids, labels = chance.integers(0, 2**31, 64), chance.integers(0, 1000, 64)
    crc = chance.integers(0, 2**32, 64, dtype=np.uint32)
    whole, order = content_digest(ids, labels, crc), chance.permutation(64)
    assert content_digest(ids[order], labels[order], crc[order]) == whole
    halves = [content_digest(ids[part], labels[part], crc[part]) for part in (slice(0, 20), slice(20, 64))]
    assert sum(halves) % 2**64 == whole
    seen = {whole}
    for array, bits in ((ids, 31), (labels, 10), (crc, 32)):
        for bit in range(bits):
            array[7] ^= array.dtype.type(1 << bit)
            seen.add(content_digest(ids, labels, crc))
            array[7] ^= array.dtype.type(1 << bit)
    assert len(seen) == 1 + 31 + 10 + 32
    labels[[3, 4]] = labels[[4, 3]]
    assert content_digest(ids, labels, crc) not in seen


def test_a_batch_has_the_same_digest_on_any_ranks_and_another_where_a_bit_of_a_file_is_flipped(digits: Path) -> None:
    dataset, config = Dataset.open(digits, "train"), InputConfig(path=digits, image_size=32, threads=1)

    def digest(ranks: int, micro: int, damaged: int | None = None) -> int:
        total = 0
        for rank in range(ranks):
            loader = TrainLoader(dataset, config, seed=0, global_batch=16, micro_batch=micro, rank=rank,
                                 world_size=ranks, device=torch.device("cpu"))  # fmt: skip
            read = loader._reader._bytes

            def corrupt(sample: int, read: Any = read) -> bytes:
                data = read(sample)
                return data[:50] + bytes([data[50] ^ 4]) + data[51:] if sample == damaged else data

            loader._reader._bytes = corrupt  # type: ignore[method-assign]
            batches = iter(loader)
            total += sum(next(batches).digest for _ in range(16 // ranks // micro))
            loader.close()
        return total % 2**64

    first = int(TrainLoader.samples(mock.Mock(_ordered=(dataset.shard_sizes, 0, 16, 1, 16)), 0, 1)[1][0])
    assert digest(1, 16) == digest(2, 4) != digest(1, 16, damaged=first)


def test_rows_keep_every_bit_and_a_resume_drops_what_is_taken_again_or_damaged(tmp_path: Path) -> None:
    file, draw = tmp_path / "ledger.jsonl", random.Random(0)
    rows = [row(step, loss=draw.random(), grad_norm=draw.choice([None, draw.random()])) for step in range(1, 9)]
    rows[2]["loss"] = math.inf
    write_rows(file, rows, SETUP)
    assert read_rows(file, 2, 4) == {step: rows[step - 1] | SETUP for step in (2, 3, 4)}
    text = file.read_text().splitlines()
    file.write_text("\n".join([*text[:4], "{", text[4].replace('"step":5', '"step":"5"'), text[5], text[6][:40]]))
    said: list[str] = []

    def cut(file: Path, step: int) -> None:
        cut_lines(file, is_row, lambda row: row["step"] <= step, said.append)

    cut(file, 7)
    assert [line.partition("; ")[0] for line in said] == [f"WARNING {file}: 2 damaged lines are dropped"]
    assert [*read_rows(file, 1, 99)] == [1, 2, 3, 4, 6]
    file.write_text(file.read_text().rstrip("\n"))
    cut(file, 4)
    write_rows(file, rows[4:], SETUP)
    assert [*read_rows(file, 1, 99).values()] == [one | SETUP for one in rows]
    cut(tmp_path / "none", 1)
    assert len(said) == 1
    assert not (tmp_path / "none").exists()


class Steps:
    """As much of a trainer as a replay needs, with steps that are known."""

    def __init__(self, rows: list[Row], setup: Row = SETUP, start: int = 0) -> None:
        self.state = SimpleNamespace(step=start, samples_seen=64 * start)
        self.batch, self.train_loader = SimpleNamespace(global_batch=64), []
        self.log, self.monitor = mock.Mock(setup=setup), mock.Mock()
        self.engine = SimpleNamespace(device=torch.device("cpu"))
        self.monitor.take = lambda state: [rows[state.step - start - 1]]

    def train_step(self, batches: Any) -> None:
        pass


def replayed(recorded: list[Row], now: list[Row], setup: Row = SETUP) -> tuple[str, str]:
    plan = Plan(None, {}, {one["step"]: SETUP | one for one in recorded}, [], {})  # type: ignore[arg-type]
    replay = Replay(Steps(now, setup), plan)  # type: ignore[arg-type]
    replay.run(len(now))
    return replay.difference, "\n".join(replay.report())


def test_the_first_difference_is_named_with_its_cause() -> None:
    good = [row(step) for step in range(1, 6)]
    good[1] = row(2, loss=math.nan, grad_norm=None, skipped=True)
    assert replayed(good, good) == ("", "5 steps reproduced after step 0: bit for bit")
    once = [*good[:3], row(4, loss=math.nextafter(good[3]["loss"], 1)), row(5, loss=9.0)]
    difference, report = replayed(good, once)
    assert difference.startswith(f"step 4 (numerics, on the same batch): loss {good[3]['loss']} recorded, ")
    assert "3 steps reproduced" in report
    assert "DIFFERENT: step 4" in report
    for fields in ({"grad_norm": 1.0}, {"skipped": True}):
        assert replayed(good, [*good[:4], row(5, **fields)])[0].startswith("step 5 (numerics")
    assert replayed(good, [row(1, batch="x" * 16), *good[1:]])[0].startswith("step 1 (data: other images, labels or")


def test_on_another_setup_bounds_take_the_place_of_bits_but_not_for_the_batch() -> None:
    good = [row(step) for step in range(1, 5)]
    near = [
        row(step, loss=one["loss"] * (1 + 0.9 * BOUND * 2 ** (step / DOUBLING))) for step, one in enumerate(good, 1)
    ]
    far = [*near[:3], row(4, loss=good[3]["loss"] * (1 + 2 * BOUND))]
    other = SETUP | {"world_size": 4}
    assert replayed(good, near)[0].startswith("step 1 (numerics")
    difference, report = replayed(good, near, other)
    assert not difference
    assert "0 bit for bit, the others within bounds" in report
    assert "bits need not agree: world_size was 2, is 4" in report
    assert replayed(good, far, other)[0].startswith("step 4 (numerics")
    assert replayed(good, [row(1, batch="x" * 16)], other)[0].startswith("step 1 (data")
    assert not replayed(good, far, SETUP | {"precision": "bf16"})[0], "16 bits need wider bounds"
    long = [row(step) for step in range(1, 201)]
    amplified = [row(step, loss=one["loss"] * (1 + 1e-7 * 2 ** min(step / 9, 23))) for step, one in enumerate(long, 1)]
    difference, report = replayed(long, amplified, other)
    assert not difference
    assert "WARNING 117 more steps are too far from an equal state: only their batches were compared" in report
    assert replayed(long, [*amplified[:-1], row(200, batch="x" * 16)], other)[0].startswith("step 200 (data")
    missing = [*good[:1], *good[2:]]
    assert "WARNING 1 more steps are not in the ledger" in replayed(missing, good)[1]


@pytest.fixture
def run(tmp_path: Path, digits: Path) -> Path:
    """Folder of a run of 40 steps, with checkpoints at 20 and 40."""
    recipe = load_recipe(RECIPE, [f"data.path={digits}"])
    data = Dataset.open(digits, "train", check_files=False)
    folder = RunFolder(tmp_path / "demo")
    config = {"train_batch_size": 64, "zero_optimization": {"stage": 2}, "bf16": {"enabled": False}}
    facts = {"dataset": {"fingerprint": data.fingerprint, "class_names": list(data.class_names)}}
    folder.write_description(recipe, config | {"gradient_accumulation_steps": 7}, facts)
    for step in (20, 40):
        (folder.checkpoints / f"step-{step:08d}").mkdir()
    write_rows(folder.ledger, [row(step) for step in range(1, 41)], SETUP)
    return folder.path


def test_a_plan_has_the_stage_and_micro_batch_of_the_first_step(run: Path) -> None:
    plan = make_plan(run, (25, 30), [])
    assert plan.deepspeed["zero_optimization"] == {"stage": 1}
    assert plan.deepspeed["train_micro_batch_size_per_gpu"] == 32
    assert plan.deepspeed["gradient_accumulation_steps"] == "auto"
    assert max(plan.ledger) == 30
    assert make_plan(run, (0, 10), []).ledger


def went_back(run: Path, step: int) -> None:
    event = {"event": "went back", "step": step, "samples_seen": 64 * step}
    (run / "events.jsonl").write_text(f"{{\n{json.dumps(event)}\n" + '{"event": "went back"}\n')


def learning_rate(run: Path) -> str:
    return "optimizer.lr=1.0"


@pytest.mark.parametrize(
    ("steps", "change", "words"),
    [
        ((20, 40), learning_rate, "--set changes what {run} computes (optimizer.lr: 0.002 -> 1.0)"),
        ((5, 15), None, "no checkpoint at or before step 5 (there: 20, 40): --steps 0:15 starts from the first"),
        ((25, 41), None, "ledger.jsonl ends before step 41, at step 40"),
        (
            (20, 40),
            lambda run: (run / "ledger.jsonl").unlink(),
            "(No such file or directory); runs of older versions",
        ),
        ((20, 40), lambda run: went_back(run, 30), "went back after step 30 (events.jsonl)"),
        ((20, 40), lambda run: (run / "recipe.yaml").unlink(), "is no run folder: it has no recipe.yaml"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(run: Path, steps: tuple[int, int], change: Any, words: str) -> None:
    assignment = change and change(run)
    with pytest.raises(UserError) as error:
        make_plan(run, steps, [assignment] if assignment else [])
    assert words.format(run=run) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_rollback_outside_of_the_steps_does_not_matter(run: Path) -> None:
    for step in (10, 20, 35):
        went_back(run, step)
        make_plan(run, (20, 35), [])


@pytest.mark.parametrize("steps", ["4:4", "5:4", "x", "3"])
def test_wrong_usage_ends_with_2(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["runs/demo", "--steps", steps])
    assert error.value.code == 2
    assert "write A:B with A below B" in capsys.readouterr().err
