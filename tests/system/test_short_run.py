"""Twenty steps of the demo on two ranks: equal to plain torch, stopped and resumed exactly, told in plain words."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F

from data_pipeline.dataset import Dataset
from data_pipeline.loader import TrainLoader
from data_pipeline.mixing import mix
from pretrain.checkpoints.checkpoint import list_checkpoints
from pretrain.engine.engine import build_model
from pretrain.engine.schedule import drop_path_uniforms
from pretrain.files import json_lines
from pretrain.metrics import read_metrics
from pretrain.outcome import ExitCode
from pretrain.recipe import load_recipe
from tests.system.conftest import STEPS
from tests.system.launching import INJECT, RECIPE, changes, launched

pytestmark = pytest.mark.slow


def train_rows(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl", "train")


def state(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "run.json").read_text())
    return content


def test_two_ranks_of_zero_1_equal_a_plain_torch_loop(straight: Path, digits: Path) -> None:
    recipe = load_recipe(straight / "recipe.yaml")
    torch.set_num_threads(1)
    train_set = Dataset.open(digits, "train")
    model = build_model(recipe, train_set.num_classes)
    spared = model.no_weight_decay()
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in spared], "weight_decay": 0.05},
        {"params": [p for n, p in model.named_parameters() if n in spared], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    loader = TrainLoader(train_set, recipe.data, seed=0, global_batch=64, micro_batch=64, rank=0, world_size=1,
                         device=torch.device("cpu"))  # fmt: skip
    rows = train_rows(straight)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for step, batch in zip(range(STEPS), loader, strict=False):
        uniforms = drop_path_uniforms(0, step, batch.rows, branches=model.num_drop_paths)
        images, targets = mix(batch.images, batch.labels, batch.rows, config=recipe.mixing, num_classes=10, seed=0,
                              step=step)  # fmt: skip
        logits, diagonality = model(images, drop_path_uniforms=uniforms, with_diagonality=True)
        loss = F.cross_entropy(logits, targets) + 0.01 * diagonality
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rows[step]["lr"]
        optimizer.step()
        assert rows[step]["loss"] == pytest.approx(loss.item(), abs=1e-5), f"step {step + 1}"
    loader.close()


def test_learning_rate_warms_up_and_falls_by_samples_seen(straight: Path) -> None:
    rates = [row["lr"] for row in train_rows(straight)]
    peak = rates.index(max(rates))
    assert rates[0] == pytest.approx(2e-3 * 64 / (0.3 * 1437))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 1 < peak < STEPS - 1


def test_a_finished_run_is_whole_and_a_second_start_does_nothing(straight: Path, short: list[str]) -> None:
    assert state(straight)["state"] == "finished"
    files = {path.name for path in straight.iterdir()}
    assert files >= {"recipe.yaml", "ds_config.json", "environment.json", "run.json", "metrics.jsonl", "tensorboard",
                     "checkpoints", "handoff", "summary.json"}  # fmt: skip
    before = (straight / "metrics.jsonl").read_bytes()
    with launched(straight.parent, *short, ranks=0) as again:
        assert again.end() == ExitCode.FINISHED
        assert "is finished" in again.output()
    assert (straight / "metrics.jsonl").read_bytes() == before


Start = tuple[int, int, list[str]]
"""Ranks, the stage that they must have, and what is said of it."""
AT_1: list[str] = []  # as `short` has it
AT_0 = changes(deepspeed__zero_optimization__stage=0)
OFFLOADED = changes(deepspeed__zero_optimization__offload_optimizer__device="cpu")


@pytest.mark.parametrize(
    ("how", "before", "after"),
    [
        ("SIGTERM to the launcher", (2, 1, AT_1), (2, 1, AT_1)),
        ("SIGKILL of a rank", (2, 1, AT_1), (2, 1, AT_1)),
        ("Ctrl-C on the terminal", (2, 1, AT_1), (4, 0, AT_0)),
        ("SIGKILL of the launcher's half that starts the ranks", (2, 0, AT_0), (1, 1, OFFLOADED)),
    ],
    ids=["SIGTERM", "SIGKILL of a rank", "Ctrl-C, stage 1 to 0", "SIGKILL of the launcher, stage 0 to 1"],
)
def test_ended_in_the_middle_it_resumes_where_it_was_and_the_curve_goes_on(
    how: str, before: Start, after: Start, *, straight: Path, short: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    crashed = how == "SIGKILL of a rank"
    (begins_with, stage, begun_by), (ranks, next_stage, resumed_by) = before, after
    with launched(tmp_path, *short, *begun_by, ranks=begins_with, program=(INJECT, "hold=14")) as run:
        run.wait_for_steps(folder, 8)
        run.wait_for(lambda: bool(list_checkpoints(folder / "checkpoints")), "the checkpoint of step 6")
        if how == "SIGTERM to the launcher":
            run.process.terminate()
        elif how == "Ctrl-C on the terminal":
            os.killpg(run.process.pid, signal.SIGINT)
        elif crashed:
            run.ranks()[-1].kill()
        else:
            for process in psutil.Process(run.process.pid).children():
                process.kill()
        run.end()
        run.assert_no_rank_stays()
        if not crashed:
            assert "stopped at step" in run.output()
            assert state(folder)["state"] == "preempted"
            assert state(folder)["step"] >= 8
            assert not list((folder / "checkpoints").glob(".*"))
    assert f"ZeRO stage {stage}, fp32" in run.output()
    with launched(tmp_path, *short, *resumed_by, ranks=ranks) as resumed:
        assert resumed.end() == ExitCode.FINISHED, resumed.output()
        text = resumed.output()
        resumed.assert_no_rank_stays()
    assert f"ZeRO stage {next_stage}, fp32" in text
    assert json.loads((folder / "ds_config.json").read_text())["zero_optimization"]["stage"] == next_stage
    first = int(text.split("at step ")[1].split()[0])
    assert first >= (6 if crashed else 8), text
    assert f"resuming {folder} at step {first} of {STEPS}" in text
    assert state(folder)["restarts"] == 1
    begun, went_on = json_lines(folder / "events.jsonl")
    assert begun is not None
    assert went_on is not None
    assert (begun["event"], begun["samples_seen"], begun["after"]) == ("start", 0, None)
    assert (went_on["event"], went_on["step"], went_on["samples_seen"]) == ("start", first, 64 * first)
    assert went_on["after"]["state"] in (("running", "failed") if crashed else ("preempted",))
    expected, rows = train_rows(straight), train_rows(folder)
    assert [row["step"] for row in rows] == [row["step"] for row in expected], "a step is missing or stands twice"
    losses, straight_losses = [row["loss"] for row in rows], [row["loss"] for row in expected]
    if ranks == 2:
        assert losses == straight_losses, "the losses are not bit-identical"
        weights, straight_weights = (run / "handoff/model.safetensors" for run in (folder, straight))
        assert weights.read_bytes() == straight_weights.read_bytes(), "the averaged weights are not bit-identical"
    else:  # another number of ranks adds the same gradients in another order
        assert losses == pytest.approx(straight_losses, abs=1e-5)
    assert not list((folder / "checkpoints").glob(".*"))


def test_from_two_ranks_to_one_to_four_and_from_stage_1_to_3_to_0_it_follows_the_same_curve_on_the_same_batches(
    straight: Path, short: list[str], tmp_path: Path
) -> None:
    digests = {"elastic": tmp_path / "digests", "straight": straight.parent / "digests"}
    digests["elastic"].mkdir()
    legs = [(2, 1, 5), (1, 3, 11), (4, 0, None)]
    for ranks, stage, stop_at in legs:
        fields = [*short, "--set", f"deepspeed.zero_optimization.stage={stage}"]
        program = (INJECT, f"digests={digests['elastic']}", *([] if stop_at is None else [f"hold={stop_at + 4}"]))
        with launched(tmp_path / "elastic", *fields, ranks=ranks, program=program) as run:
            if stop_at is not None:
                run.wait_for_steps(tmp_path / "elastic/demo", stop_at)
                run.process.terminate()
            run.end()
            run.assert_no_rank_stays()
            assert (state(tmp_path / "elastic/demo")["state"] == "finished") is (stop_at is None), run.output()
    losses, expected = ([row["loss"] for row in train_rows(run)] for run in (tmp_path / "elastic/demo", straight))
    assert losses == pytest.approx(expected, abs=1e-5)
    read = {
        name: sorted(line for file in folder.iterdir() for line in file.read_text().splitlines())
        for name, folder in digests.items()
    }
    assert len(read["straight"]) == STEPS * 64
    assert read["elastic"] == read["straight"], "another picture, label, pixel or row"


def test_told_to_stop_it_says_so_in_its_exit_status(short: list[str], tmp_path: Path) -> None:
    with launched(tmp_path, *short, ranks=0) as run:
        run.wait_for_steps(tmp_path / "demo", 2)
        run.process.terminate()
        assert run.end() == ExitCode.STOPPED
        assert "(SIGTERM), saved" in run.output()


def test_a_run_that_died_before_its_handoff_writes_it_on_the_next_start(
    straight: Path, short: list[str], tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path / "demo")
    shutil.rmtree(tmp_path / "demo/handoff")
    (tmp_path / "demo/summary.json").unlink()
    (tmp_path / "demo/run.json").write_text(json.dumps(state(straight) | {"state": "running"}))
    with launched(tmp_path, *short, ranks=0) as run:
        assert run.end() == ExitCode.FINISHED, run.output()
    assert state(tmp_path / "demo")["state"] == "finished"
    weights, expected = (folder / "handoff/model.safetensors" for folder in (tmp_path / "demo", straight))
    assert weights.read_bytes() == expected.read_bytes()
    assert (tmp_path / "demo/summary.json").exists()


def test_a_changed_recipe_is_not_taken_for_the_same_run(straight: Path, short: list[str]) -> None:
    with launched(straight.parent, *short, *changes(optimizer__lr=0.1), ranks=0) as other:
        assert other.end() == ExitCode.WILL_FAIL_AGAIN
        assert "optimizer.lr: 0.002 -> 0.1" in other.output()


def test_the_recipe_is_the_demos() -> None:
    assert load_recipe(RECIPE).name == "demo"
