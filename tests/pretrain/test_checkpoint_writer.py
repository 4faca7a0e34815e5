"""Checkpoints are written while training goes on, tried again, kept as asked, and never with a hole."""

import dataclasses
import errno
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoints import writer as writing
from pretrain.checkpoints.checkpoint import list_checkpoints, load_newest, read_weights, verify
from pretrain.checkpoints.optimizer_shards import OptimizerShards
from pretrain.checkpoints.writer import CheckpointWriter, Retention
from pretrain.engine.distributed import new_cpu_group
from pretrain.state import TrainState
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_checkpoint import BATCH, build_engine, steps


def writer_of(folder: Path, engine: Any, said: list[str] | None = None, **retention: Any) -> CheckpointWriter:
    return CheckpointWriter(
        folder, OptimizerShards(engine), retention=Retention(**retention), facts={}, group=new_cpu_group(60),
        say=(said if said is not None else []).append,
    )  # fmt: skip


def training_goes_on(control: dist.ProcessGroup, folder: Path) -> None:
    for stage in range(4):
        engine = build_engine(stage)
        writer = writer_of(folder / f"{stage}", engine)
        steps(engine, 0, 2)
        writer.start(TrainState(2 * BATCH, 2))
        losses = steps(engine, 2, 3)  # collectives of training and of the writer's thread at the same time
        assert writer.busy
        assert writer.finish() == ""
        assert not writer.busy
        other = build_engine(stage)
        load_newest(folder / f"{stage}", OptimizerShards(other), group=control)
        assert steps(other, 2, 3) == losses, "the checkpoint holds another state than that of its step"


@pytest.mark.slow
def test_what_is_written_is_the_state_of_its_step_whatever_training_does_meanwhile(tmp_path: Path) -> None:
    run_ranks(2, training_goes_on, tmp_path)


def second_try_succeeds(control: dist.ProcessGroup, folder: Path) -> None:
    writing.PAUSES_S = (0.5, 60.0)
    engine, said = build_engine(1), []
    steps(engine, 0, 1)
    writer = writer_of(folder, engine, said)
    obstacle = folder / ".step-00000001.unfinished" / "rank-00001.safetensors"
    if dist.get_rank() == 1:
        obstacle.mkdir(parents=True)  # only this rank's file cannot be written; cleared away after the first try
    dist.barrier(control)
    writer.start(TrainState(BATCH, 1))
    deadline = time.monotonic() + 60
    while not list_checkpoints(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert writer.finish() == ""
    if dist.get_rank() == 0:
        assert len(said) == 1
        assert "WARNING checkpoint at step 1 could not be written: rank 1:" in said[0]
        assert "trying again" in said[0]
    dist.barrier(control)
    if dist.get_rank() == 0:
        shutil.rmtree(folder)  # as storage does that is mounted anew
    dist.barrier(control)
    writer.start(TrainState(2 * BATCH, 2))
    assert writer.finish() == ""
    verify(folder / "step-00000002")


def test_a_checkpoint_that_failed_is_tried_again_and_a_folder_that_vanished_is_made_anew(tmp_path: Path) -> None:
    run_ranks(2, second_try_succeeds, tmp_path / "checkpoints")


def keeps_as_asked(control: dist.ProcessGroup, folder: Path) -> None:
    engine = build_engine(1)
    writer = writer_of(folder, engine, newest=2, every_steps=10, best=True)
    top1 = {4: 50.0, 8: 90.0, 16: 70.0}
    evaluated, evaluation = 0, {}
    for step in range(4, 33, 4):
        if step in top1:
            evaluated, evaluation = step * BATCH, {"top1": top1[step]}
        writer.start(TrainState(step * BATCH, step, evaluated_at=evaluated, evaluation=evaluation))
        assert writer.finish() == ""
    kept = sorted(int(path.name[5:]) for path in list_checkpoints(folder))
    # 12, 20 and 32 are the first at or behind 10, 20 and 30; 8 is the best; 28 and 32 are the newest.
    assert kept == [8, 12, 20, 28, 32]
    assert not list(folder.glob(".*"))


def test_the_newest_the_first_of_every_interval_and_the_best_are_kept(tmp_path: Path) -> None:
    run_ranks(1, keeps_as_asked, tmp_path)


def pruning_fails(control: dist.ProcessGroup, folder: Path) -> None:
    said: list[str] = []
    writer = writer_of(folder, build_engine(1), said, newest=1)
    for name in ("step-00000099 (copy)", "step-latest"):  # a user's own
        (folder / name).mkdir(parents=True)
    writing._hide = mock.Mock(side_effect=OSError(errno.EACCES, "Permission denied"))
    for step in (1, 2):
        writer.start(TrainState(step * BATCH, step))
        assert writer.finish() == ""
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000001"]
    (line,) = said
    assert line.startswith("WARNING old checkpoints could not be removed: [Errno 13]")
    assert len({path.stat().st_mode for path in (folder / "step-00000002").iterdir()}) == 1, (
        "some cannot be read by all"
    )


def test_a_checkpoint_counts_as_written_though_an_old_one_cannot_be_removed(tmp_path: Path) -> None:
    run_ranks(1, pruning_fails, tmp_path)


def hole_is_refused(control: dist.ProcessGroup, folder: Path) -> None:
    engine = build_engine(1)
    steps(engine, 0, 1)
    writer = writer_of(folder, engine)
    if dist.get_rank() == 1:
        shards = writer._shards.shards
        shards[-1] = dataclasses.replace(shards[-1], length=shards[-1].length - 1)
    writer.start(TrainState(BATCH, 1))
    problem = writer.finish()
    assert "rank 0: " in problem
    assert "ends at element" in problem or "gap" in problem
    assert not list(folder.iterdir())


def test_pieces_that_do_not_make_up_every_parameter_are_never_published(tmp_path: Path) -> None:
    run_ranks(2, hole_is_refused, tmp_path)


def sgd_goes_on(control: dist.ProcessGroup, folder: Path) -> None:
    for stage in (0, 2):
        engine = build_engine(stage, sgd=True)
        steps(engine, 0, 3)
        writer = writer_of(folder / f"{stage}", engine)
        writer.start(TrainState(3 * BATCH, 3))
        assert writer.finish() == ""
        losses = steps(engine, 3, 3)
        other = build_engine(stage, sgd=True)
        load_newest(folder / f"{stage}", OptimizerShards(other), group=control)
        assert steps(other, 3, 3) == losses, "the momentum was lost"
    first, second = (read_weights(folder / f"{stage}" / "step-00000003") for stage in (0, 2))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_the_momentum_of_sgd_survives(tmp_path: Path) -> None:
    run_ranks(2, sgd_goes_on, tmp_path)
