"""Checkpoints keyed by name: any ZeRO stage and world size to any other, whole or absent, never trusted blindly."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pretrain.checkpoints.checkpoint import (
    CheckpointDamagedError,
    list_checkpoints,
    load_newest,
    read_manifest,
    read_weights,
    seal,
    verify,
)
from pretrain.checkpoints.optimizer_shards import OptimizerShards
from pretrain.checkpoints.writer import CheckpointWriter, Retention
from pretrain.outcome import UserError
from pretrain.state import TrainState
from tests.pretrain.damage import cut, flip_byte
from tests.pretrain.ranks import run_ranks

STAGES = (0, 1, 2, 3)
BATCH = 8


def build_engine(
    stage: int, *, width: int = 7, bf16: bool = False, grad_accum: str | None = None, sgd: bool = False
) -> Any:
    """A small network with sizes that two ranks do not divide evenly, and two parameter groups."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, 3))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    config = {
        "train_batch_size": BATCH, "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "gradient_clipping": 1.0, "steps_per_print": 2**31, "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage},
        "data_types": {"grad_accum_dtype": grad_accum},
    }  # fmt: skip
    optimizer: Any = torch.optim.AdamW(groups, lr=0.02)
    if sgd:
        optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9, fused=True)
        config["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def save_checkpoint(
    folder: Path, shards: OptimizerShards, progress: TrainState, *, keep: int, facts: dict[str, Any],
    group: dist.ProcessGroup,
) -> str:  # fmt: skip
    """Write one and wait for it; gives what went wrong."""
    writer = CheckpointWriter(folder, shards, retention=Retention(keep), facts=facts, group=group)
    writer.start(progress)
    return writer.finish()


def steps(engine: Any, first: int, count: int) -> list[float]:
    """Global losses of ``count`` steps from step ``first`` on data that depends on the step alone."""
    losses = []
    rows = torch.arange(BATCH).chunk(dist.get_world_size())[dist.get_rank()]
    dtype = next(engine.module.parameters()).dtype
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, 5, generator=generator), torch.randint(3, (BATCH,), generator=generator)
        loss = F.cross_entropy(engine(x[rows].to(dtype)).float(), y[rows])
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def write_all_stages(control: dist.ProcessGroup, folder: Path) -> None:
    for stage in STAGES:
        engine = build_engine(stage)
        steps(engine, 0, 3)
        shards, progress = OptimizerShards(engine), TrainState(samples_seen=3 * BATCH, step=3)
        problem = save_checkpoint(folder / f"stage{stage}", shards, progress, keep=2, facts={}, group=control)
        assert problem == ""
        losses = steps(engine, 3, 3)
        if dist.get_rank() == 0:
            (folder / f"stage{stage}.json").write_text(json.dumps(losses))


def read_all_stages(control: dist.ProcessGroup, folder: Path) -> None:
    for source in STAGES:
        expected = json.loads((folder / f"stage{source}.json").read_text())
        for target in STAGES:
            engine = build_engine(target)
            loaded = load_newest(folder / f"stage{source}", OptimizerShards(engine), group=control)
            assert loaded == (TrainState(samples_seen=3 * BATCH, step=3), [])
            losses = steps(engine, 3, 3)
            # Other layouts sum in another order; 1e-6 is a few units in the last place of a loss of about 1.
            assert losses == pytest.approx(expected, abs=1e-6), f"stage {source} to stage {target}"


@pytest.fixture(scope="module")
def all_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    run_ranks(2, write_all_stages, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_any_stage_continues_at_any_stage_and_world_size(all_stages: Path, world_size: int) -> None:
    run_ranks(world_size, read_all_stages, all_stages)


def average_is_right_and_survives(control: dist.ProcessGroup, folder: Path) -> None:
    averages = []
    for stage in STAGES:
        engine = build_engine(stage)
        shards = OptimizerShards(engine, average=True)
        save_checkpoint(folder / f"{stage}-0", shards, TrainState(), keep=1, facts={}, group=control)
        expected = read_weights(folder / f"{stage}-0" / "step-00000000")
        for step in range(4):
            steps(engine, step, 1)
            shards.update_average(0.7)
            save_checkpoint(folder / f"{stage}", shards, TrainState(step=step), keep=1, facts={}, group=control)
            weights = read_weights(folder / f"{stage}" / f"step-{step:08d}")
            expected = {name: 0.7 * expected[name] + 0.3 * weights[name] for name in weights}
        newest = folder / f"{stage}" / "step-00000003"
        averages.append(read_weights(newest, average=True))
        for name, value in averages[-1].items():
            assert torch.allclose(value, expected[name], atol=1e-6), (stage, name)
            assert not torch.allclose(value, weights[name], atol=1e-4), (stage, name)
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
        raw = engine(x)
        model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3))
        model.load_state_dict(averages[-1])
        with shards.averaged_weights():
            assert torch.allclose(engine(x), model(x), atol=1e-6), stage
        assert torch.equal(engine(x), raw), "the weights did not come back"
        other = OptimizerShards(build_engine((stage + 1) % 4), average=True)
        load_newest(folder / f"{stage}", other, group=control)
        save_checkpoint(folder / f"{stage}-again", other, TrainState(step=3), keep=1, facts={}, group=control)
        again = read_weights(folder / f"{stage}-again" / "step-00000003", average=True)
        assert all(torch.equal(again[name], averages[-1][name]) for name in again), stage
    for other in averages[1:]:
        assert all(torch.allclose(other[name], averages[0][name], atol=1e-6) for name in other)


@pytest.mark.slow
def test_the_average_equals_one_kept_by_name_at_every_stage(tmp_path: Path) -> None:
    run_ranks(2, average_is_right_and_survives, tmp_path)


def bf16_state_survives(control: dist.ProcessGroup, folder: Path) -> None:
    kinds = set()
    for stage, grad_accum in ((1, None), (1, "fp32"), (2, None), (3, None)):
        engine = build_engine(stage, bf16=True, grad_accum=grad_accum)
        steps(engine, 0, 3)
        kinds.add(type(engine.optimizer).__name__)
        before = OptimizerShards(engine)
        case = folder / f"{stage}-{grad_accum}"
        save_checkpoint(case, before, TrainState(step=3), keep=1, facts={}, group=control)
        other = build_engine(stage, bf16=True, grad_accum=grad_accum)
        after = OptimizerShards(other)
        load_newest(case, after, group=control)
        for a, b in zip(before.shards, after.shards, strict=True):
            assert (a.name, a.offset, a.length) == (b.name, b.offset, b.length)
            assert before.step_of(a) == after.step_of(b) == 3
            for kind in before.kinds:
                assert torch.equal(a.view(kind, before.optimizer), b.view(kind, after.optimizer)), (stage, a.name, kind)
        x = torch.ones(4, 5, dtype=torch.bfloat16)
        assert torch.equal(engine(x), other(x)), "the bf16 weights were not refreshed from the masters"
    assert kinds == {"DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3"}


@pytest.mark.slow
def test_bf16_state_is_bit_equal_after_loading(tmp_path: Path) -> None:
    run_ranks(2, bf16_state_survives, tmp_path)


def write_two(control: dist.ProcessGroup, folder: Path) -> None:
    engine = build_engine(1)
    shards = OptimizerShards(engine)
    for step in (1, 2, 3):
        steps(engine, step - 1, 1)
        save_checkpoint(folder, shards, TrainState(step * BATCH, step), keep=2, facts={"run": "x"}, group=control)
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(weights, folder / "weights.pt")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(2, write_two, folder)
    return folder


def test_only_the_newest_are_kept_and_nothing_unfinished_stays(two_checkpoints: Path) -> None:
    assert [path.name for path in list_checkpoints(two_checkpoints)] == ["step-00000003", "step-00000002"]
    assert not list(two_checkpoints.glob(".*"))


def test_weights_are_put_together_without_an_engine(two_checkpoints: Path) -> None:
    expected = torch.load(two_checkpoints / "weights.pt")
    weights = read_weights(two_checkpoints / "step-00000003")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def read_back(control: dist.ProcessGroup, folder: Path) -> None:
    for case in sorted(folder.iterdir()):
        loaded = load_newest(case, OptimizerShards(build_engine(1)), group=control)
        assert loaded is not None
        progress, warnings = loaded
        assert progress.step == 2, case.name
        assert len(warnings) == 1
        assert "step-00000003 is damaged" in warnings[0]
        assert [path.name for path in list_checkpoints(case)] == ["step-00000002"], "it may be found again"


def test_every_file_flipped_cut_or_deleted_makes_it_fall_back(two_checkpoints: Path, tmp_path: Path) -> None:
    files = sorted(path.name for path in (two_checkpoints / "step-00000003").iterdir())
    assert files == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    for file in files:
        for damage in (flip_byte, cut, Path.unlink):
            case = tmp_path / f"{damage.__name__}-{file}"
            shutil.copytree(two_checkpoints, case)
            damage(case / "step-00000003" / file)
            with pytest.raises(CheckpointDamagedError, match=file):
                verify(case / "step-00000003")
    run_ranks(1, read_back, tmp_path)


def refuse_all_damaged(control: dist.ProcessGroup, folder: Path) -> None:
    with pytest.raises(UserError, match=r"no usable checkpoint .* move the folder away"):
        load_newest(folder, OptimizerShards(build_engine(1)), group=control)


def test_with_no_whole_checkpoint_it_stops_rather_than_starts_over(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    shutil.copytree(two_checkpoints, folder)
    for path in list_checkpoints(folder):
        flip_byte(path / "rank-00000.safetensors")
    run_ranks(1, refuse_all_damaged, folder)


def refuse_other_model(control: dist.ProcessGroup, folder: Path) -> None:
    with pytest.raises(UserError, match="another model"):
        load_newest(folder, OptimizerShards(build_engine(1, width=9)), group=control)


def test_a_checkpoint_of_another_model_is_refused(two_checkpoints: Path) -> None:
    run_ranks(1, refuse_other_model, two_checkpoints)


def test_a_manifest_changed_by_hand_is_not_trusted(two_checkpoints: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step-00000003"
    shutil.copytree(two_checkpoints / copy.name, copy)
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"samples_seen": 24', '"samples_seen": 16'))
    with pytest.raises(CheckpointDamagedError, match="other content"):
        read_manifest(copy)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "..", "a/b", ""])
def test_a_manifest_names_only_files_of_its_own_folder(tmp_path: Path, name: str) -> None:
    manifest = {"format": 1, "progress": {}, "files": {name: {"size": 1, "blake2": "x"}}}
    (tmp_path / "manifest.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(CheckpointDamagedError, match="no plain name of a file"):
        read_manifest(tmp_path)


def full_disk(control: dist.ProcessGroup, folder: Path) -> None:
    engine = build_engine(1)
    shards = OptimizerShards(engine)
    steps(engine, 0, 1)
    blocked = folder / "blocked"
    if dist.get_rank() == 1:
        # Only the second rank's storage fails: its file cannot be made where a folder stands.
        (blocked / ".step-00000001.unfinished" / "rank-00001.safetensors").mkdir(parents=True)
    dist.barrier(control)
    problem = save_checkpoint(blocked, shards, TrainState(BATCH, 1), keep=2, facts={}, group=control)
    assert problem.startswith("rank 1:"), problem
    assert not list(blocked.iterdir()), "something half-written was left"
    dist.barrier(control)
    assert save_checkpoint(blocked, shards, TrainState(BATCH, 1), keep=2, facts={}, group=control) == ""


def test_a_rank_that_cannot_write_fails_the_checkpoint_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    run_ranks(2, full_disk, tmp_path)
