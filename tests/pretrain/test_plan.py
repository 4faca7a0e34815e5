"""The door to planning, as a person uses it."""

import functools
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console

from models.cost import count_macs, count_parameters
from pretrain.check import architecture, checkpoint_bytes
from pretrain.checkpoints.checkpoint import Progress, list_checkpoints
from pretrain.checkpoints.writer import CheckpointWriter, Retention
from pretrain.outcome import UserError
from pretrain.plan import main, parse_arguments, plan
from pretrain.planning.report import show
from pretrain.recipe import load_recipe
from tests.benchmarks.sections import model_rows, written
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_equality import recipe as small_recipe
from tests.pretrain.test_equality import training, zero
from tests.system.launching import RECIPE

HERE = ["--recipe", str(RECIPE), "--gpus", "8", "--images", "1437", "--classes", "10"]


@functools.cache
def made(*more: str) -> Any:
    return plan(parse_arguments([*HERE, *more]))


def printed(width: int, *more: str) -> str:
    out = io.StringIO()
    show(*made(*more), Console(file=out, width=width, highlight=False))
    return out.getvalue()


def test_it_counts_steps_batch_parameters_and_macs() -> None:
    estimate, _ = made()
    config = architecture(load_recipe(RECIPE), 10)
    assert (estimate.parameters, estimate.macs) == (count_parameters(config), count_macs(config))
    assert estimate.steps == 15 * 1437 // 64
    assert (estimate.batch.micro_batch, estimate.batch.accumulation, estimate.batch.world_size) == (8, 1, 8)


def test_nothing_that_was_not_measured_is_given_as_a_result() -> None:
    estimate, _ = made()
    assert estimate.speed.believed is None
    text = printed(100)
    assert "not measured; at 100 % of the peak no less than" in text
    assert "efficiency" not in text
    assumed = printed(100, "--mfu", "0.3")
    assert "ASSUMED: an MFU of 30%" in assumed
    assert "efficiency" in assumed


def test_a_measurement_is_told_with_what_the_plan_has_otherwise(tmp_path: Path) -> None:
    conditions = {"batch": 128, "size": 32, "precision": "bf16"}
    file = written(tmp_path, "model", conditions, model_rows(lavit_micro=0.5))

    def told(device: str, *more: str) -> str:
        content = json.loads(file.read_text())
        content["sections"]["model"]["machine"]["name"] = device
        file.write_text(json.dumps(content))
        options = parse_arguments([*HERE, "--benchmark", str(file), *more])
        out = io.StringIO()
        show(*plan(options), Console(file=out, width=1000, highlight=False))
        return out.getvalue()

    text = told("NVIDIA H100 80GB HBM3")
    assert f"256 a GPU (measured, but not as planned: {file})" in text
    otherwise = (
        "num_classes 10 (measured: 1000), drop_path 0.05 (measured: 0.0), "
        "activation_checkpointing in stages 1, 2, 3, 4 (measured: none; up to a third more time), "
        "micro-batch 8 (measured: 128)"
    )
    assert f"the plan differs: {otherwise}" in text
    assert f"Speed: not measured as planned. The plan differs from what was measured: {otherwise}." in text
    with pytest.raises(UserError, match="was measured in bf16, and the plan trains in fp32: plan in that precision"):
        told("NVIDIA H100 80GB HBM3", "--set", "deepspeed.zero_optimization.stage=0")
    elsewhere = told("AMD EPYC")
    assert f"--benchmark {file}: was measured on another device, and is not used." in elsewhere
    assert "not measured; at 100 % of the peak" in elsewhere


@pytest.mark.parametrize("width", [60, 80, 100])
def test_it_fits_the_terminal_and_says_what_limits(width: int) -> None:
    text = printed(width, "--mfu", "0.3", "--simulate-failures")
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for word in ("Plan of demo", "<- recipe", "Young-Daly", "Limited by", "What this rests on"):
        assert word in text
    assert "…" not in text


def test_memory_that_does_not_fit_is_what_limits_and_the_way_out_is_named() -> None:
    changes = {"model.activation_checkpointing": "none", "deepspeed.train_batch_size": 4096}
    many = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    options = parse_arguments([*HERE, "--gpu", "a100-40", "--headroom", "0.999", *many])
    estimate, outlooks = plan(options)
    out = io.StringIO()
    show(estimate, outlooks, Console(file=out, width=100))
    assert "Limited by: memory" in out.getvalue()
    assert f"train_micro_batch_size_per_gpu: 512 -> {estimate.chosen.largest}" in out.getvalue()
    assert 0 < estimate.chosen.largest < 512


def test_stage_0_is_recommended_where_the_same_run_fits_without_sharding_and_only_there() -> None:
    autocast = ["--set", "deepspeed.bf16.enabled=false", "--set", "deepspeed.torch_autocast.enabled=true"]

    def advised(*more: str) -> bool:
        return "zero_optimization.stage: 1 -> 0 fits too" in printed(100, *more)

    at_1 = [*autocast, "--set", "deepspeed.zero_optimization.stage=1"]
    assert advised(*at_1)
    assert not advised()  # bf16: stage 0 cannot be had
    assert not advised(*autocast)  # "auto" has taken it
    assert made(*autocast)[0].stage == 0
    estimate, _ = made(*at_1)
    sharded = estimate.chosen
    whole = next(row for row in estimate.rows if row.stage == 0 and row.policy == sharded.policy)
    between = (sharded.memory.total + whole.memory.total) / 2
    tight = ["--headroom", str(1 - between / estimate.request.device.memory)]
    assert made(*at_1, *tight)[0].chosen.fits
    assert not advised(*at_1, *tight)


def test_a_stage_that_was_chosen_has_the_reason_that_training_prints_and_a_given_one_has_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reason = "ZeRO stage: 1 (needed by weights in bf16)"
    (line,) = [line for line in printed(100).splitlines() if "ZeRO stage" in line]
    assert line.strip() == reason
    assert main([*HERE, "--json"]) == 0
    assert reason in json.loads(capsys.readouterr().out)["notes"]
    assert "ZeRO stage" not in printed(100, "--set", "deepspeed.zero_optimization.stage=2")


def test_on_fewer_gpus_there_are_more_micro_batches_not_larger_ones() -> None:
    at_2 = ["--mfu", "0.3", "--set", "deepspeed.zero_optimization.stage=2"]
    of_32, _ = made(*at_2, "--gpus", "32")
    of_8, _ = made(*at_2, "--set", "deepspeed.train_micro_batch_size_per_gpu=2")
    assert (of_32.batch.micro_batch, of_8.batch.accumulation) == (2, 4)
    on_8, as_planned = (next(step for step in one.scaling if step.gpus == 8) for one in (of_32, of_8))
    assert on_8 == as_planned


def test_overlapping_is_advised_where_it_is_not_on_yet() -> None:
    def advised(*more: str) -> bool:
        text = printed(200, "--mfu", "1", "--node-gbit", "1", "--gpus", "16", *more)
        assert "Limited by: network, on paper" in text
        return "zero_optimization.overlap_comm: true" in text

    at_1 = ["--set", "deepspeed.zero_optimization.stage=1"]
    assert advised(*at_1)
    assert not advised(*at_1, "--set", "deepspeed.zero_optimization.overlap_comm=true")


def test_json_holds_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*HERE, "--mfu", "0.3", "--simulate-failures", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["steps"] == 336
    assert {row["zero_stage"] for row in content["memory"]} == {0, 1, 2, 3}
    assert sum(row["chosen"] for row in content["memory"]) == 1
    assert len(content["failures"]) == 5
    assert content["limited_by"]


def test_a_dataset_that_is_there_is_counted(digits: Path) -> None:
    options = ["--recipe", str(RECIPE), "--gpus", "2", "--set", f"data.path={digits}", "--measure-storage"]
    estimate, _ = plan(parse_arguments(options))
    assert (estimate.data.images, estimate.data.classes) == (1437, 10)
    shards = sum(file.stat().st_size for file in digits.glob("*-train-*.tar"))
    assert estimate.data.bytes_per_image == pytest.approx(shards / 1437)
    assert estimate.storage > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "h10"], "--gpu h10: .*did you mean h100"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpus", "7"], "cannot be divided by 7 ranks"),
        (["--gpus", "many"], "--gpus"),
        (["--recipe", "recipes/none.yaml"], "no such recipe"),
        (["--set", "data.path=/no/such", "--classes", "0"], "--classes 0"),
        (["--mfu", "30"], "--mfu 30: it is a share"),
        (["--headroom", "1"], "--headroom 1"),
        (["--simulate-failures"], "--simulate-failures needs a speed"),
        (["--simulate-failures", "--mfu", "0.3", "--mtbf-hours-per-gpu", "1e-5"], "never ends"),
        (["--benchmark", "/no/file"], "--benchmark /no/file: cannot be read"),
        (["--storage", "1", "--measure-storage"], "give one of them"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*HERE, *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(told, error)
    assert error.count("\n") == 1


def test_a_missing_dataset_is_told_with_the_way_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", str(RECIPE), "--gpus", "2", "--set", "data.path=/no/such"]) == 2
    error = capsys.readouterr().err
    assert "/no/such" in error
    assert "--images N --classes N" in error


def checkpoint_is_as_large_as_planned(control: dist.ProcessGroup, folder: Path) -> None:
    recipe = small_recipe(ema={"decay": 0.9}).model_copy(update={"model": load_recipe(RECIPE).model})
    run = training(recipe, zero_optimization=zero(1))
    writer = CheckpointWriter(folder, run.pieces, retention=Retention(), facts={}, group=control)
    writer.start(Progress(step=1))
    assert writer.settle() == ""
    (written,) = list_checkpoints(folder)
    size = sum(file.stat().st_size for file in written.iterdir())
    parameters = sum(parameter.numel() for parameter in run.engine.module.parameters())
    assert size == pytest.approx(checkpoint_bytes(recipe, parameters), rel=0.01)


def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path) -> None:
    run_ranks(2, checkpoint_is_as_large_as_planned, tmp_path)
