"""``pretrain.plan``: what is counted, what is measured, and what is refused.

``tests/system/test_planned_memory.py`` compares the memory with measured peaks.
"""

import functools
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch.overrides import TorchFunctionMode

from models import LaViT, create_model, model_config
from models.cost import count_macs, count_parameters
from pretrain.check import check_recipe_here, checkpoint_bytes
from pretrain.checkpoints.checkpoint import list_checkpoints
from pretrain.checkpoints.writer import CheckpointWriter, Retention
from pretrain.engine.deepspeed_config import resolve_for
from pretrain.factory import architecture
from pretrain.memory_estimate import Engine, GpuAutocast, MemoryEstimate, activations
from pretrain.outcome import UserError
from pretrain.plan import main, make_plan, parse_arguments, show
from pretrain.recipe import load_recipe
from pretrain.run_folder import RunFolder
from pretrain.state import TrainState
from pretrain.time_estimate import communicated_bytes
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_equality import recipe as small_recipe
from tests.pretrain.test_equality import training, zero
from tests.system.launching import RECIPE, changes

HERE = ["--recipe", str(RECIPE), "--gpus", "8", "--images", "1437", "--classes", "10"]
ASSUMED = ("--mfu", "0.3", "--mtbf-hours-per-gpu", "8000", "--save-seconds", "2")


@functools.cache
def made(*more: str) -> dict[str, Any]:
    return make_plan(parse_arguments([*HERE, *more]))


def printed(plan: dict[str, Any], width: int = 100) -> str:
    out = io.StringIO()
    show(plan, Console(file=out, width=width, highlight=False))
    return out.getvalue()


def test_it_counts_steps_batch_parameters_and_macs() -> None:
    plan, config = made(), architecture(load_recipe(RECIPE), 10)
    assert (plan["parameters"], plan["macs"]) == (count_parameters(config), count_macs(config))
    assert plan["steps"] == 15 * 1437 // 64
    batch = plan["batch"]
    assert (batch["micro_batch"], batch["accumulation"], batch["world_size"]) == (8, 1, 8)


def test_what_is_not_measured_is_no_result() -> None:
    assert made()["hours"] is None
    assert "not measured; at 100 % of the peak no less than" in printed(made())
    plan = made(*ASSUMED)
    assert "ASSUMED" in printed(plan)
    assert plan["hours"] == pytest.approx(plan["steps"] * (plan["compute"] + plan["communication"]) / 3600)
    assert plan["best_interval"] == pytest.approx(math.sqrt(2 * 2 * 3600 * 8000 / 8))
    assert plan["best_steps"] == round(plan["best_interval"] / plan["step"])


def benchmark(folder: Path, device: str, **conditions: Any) -> Path:
    file = folder / "bench.json"
    rows = [{"model": "lavit_micro", "mode": "eager", "training_s": [0.5, 0.25, 1.0]}]
    section = {"machine": {"name": device}, "conditions": conditions, "rows": rows}
    file.write_text(json.dumps({"sections": {"model": section}}))
    return file


def test_a_measurement_counts_for_its_device_network_and_precision_only(tmp_path: Path) -> None:
    conditions = {"batch": 128, "size": 32, "precision": "bf16"}
    file = benchmark(tmp_path, "NVIDIA H100 80GB HBM3", **conditions)
    plan = make_plan(parse_arguments([*HERE, "--benchmark", str(file)]))
    assert plan["images_per_s_per_gpu"] == 128 / 0.5
    assert "batch 128, size 32, precision bf16" in printed(plan, 1000)
    for change, says in (
        (changes(deepspeed__zero_optimization__stage=0), "was measured in bf16, and the plan trains in fp32"),
        (changes(model__overrides="{depths: [1, 1, 3, 1]}"), "with another depths"),
        (changes(model__compile="true"), "lacks training of lavit_micro compiled, at 32 x 32 pixels"),
        (["--gpu", "a100"], "was measured on NVIDIA H100 80GB HBM3, and the plan is for A100"),
    ):
        with pytest.raises(UserError, match=says):
            make_plan(parse_arguments([*HERE, "--benchmark", str(file), *change]))


def test_ranks_send_what_rings_need() -> None:
    sent = {}
    for stage in range(4):
        changed = {"train_batch_size": 64, "gradient_clipping": 1.0, "zero_optimization": {"stage": stage}}
        resolved = resolve_for(load_recipe(RECIPE), changed, world_size=4, has_gpu=True)
        sent[stage] = communicated_bytes(Engine(load_recipe(RECIPE), resolved), 100)
    # In fp32: gradients reduced and broadcast, 2 x 4 bytes; weights gathered after the step, 4 more.
    assert sent == {0: 0.75 * 800, 1: 0.75 * 1200, 2: 0.75 * 1200, 3: 0.75 * 800}


def test_it_fits_the_terminal() -> None:
    for width in (60, 100):
        text = printed(made(*ASSUMED), width)
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width
        assert all(word in text for word in ("Plan of demo", "<- recipe", "Young/Daly", "Assumptions"))


def test_json_has_the_plan_and_the_reasons_that_training_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*HERE, "--mfu", "0.3", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["steps"] == 336
    assert {row["zero_stage"] for row in content["memory"]} == {0, 1, 2, 3}
    assert sum(row["chosen"] for row in content["memory"]) == 1
    assert any(note.startswith("precision: bf16") for note in content["notes"])


def test_a_dataset_that_is_there_is_counted(digits: Path) -> None:
    words = ["--recipe", str(RECIPE), "--gpus", "2", "--set", f"data.path={digits}"]
    data = make_plan(parse_arguments(words))["data"]
    assert (data["images"], data["classes"]) == (1437, 10)
    shards = sum(file.stat().st_size for file in digits.glob("*-train-*.tar"))
    assert data["bytes_per_image"] == round(shards / 1437)


def test_it_is_counted_what_a_run_will_have(digits: Path) -> None:
    fields, here = [f"data.path={digits}"], RunFolder(Path("runs/there-is-none"))
    size = check_recipe_here(load_recipe(RECIPE, fields), here)
    assert (size.train_samples, size.val_samples, size.classes, size.parameters) == (1437, 360, 10, 910_552)
    assert size.checkpoint_bytes == 3 * 4 * size.parameters
    averaged = check_recipe_here(load_recipe(RECIPE, [*fields, "ema.decay=0.9"]), here)
    assert averaged.checkpoint_bytes == 4 * 4 * size.parameters
    no_tree = "loss={classification: semantic_softmax, class_tree: /no/tree}"
    with pytest.raises(UserError, match=r"^loss\.class_tree: /no/tree cannot be read"):
        check_recipe_here(load_recipe(RECIPE, [*fields, no_tree]), here)


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["--gpus", "7"], "cannot be divided by 7 ranks"),
        (["--recipe", "recipes/none.yaml"], "no such recipe"),
        (["--set", "model.overrides={depths: [1]}"], "model: .*depths"),
        (["--set", "model.name=lavit_micr"], "model: .*lavit_micr"),
        (["--benchmark", "/no/file"], "--benchmark /no/file: .*No such file"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*HERE, *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(printed, error)
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--gpu=h10", "--gpus=0", "--classes=0", "--mfu=30", "--headroom=1", "--images=no"])
def test_an_option_out_of_its_range_is_named(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*HERE, option])
    assert f"error: argument {option.partition('=')[0]}: " in capsys.readouterr().err


def test_a_missing_dataset_is_one_line_with_the_way_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", str(RECIPE), "--gpus", "2", "--set", "data.path=/no/such"]) == 2
    error = capsys.readouterr().err
    assert "/no/such" in error
    assert "--images N --classes N" in error


def estimate(stage: int, ranks: int, section: dict[str, Any] | None = None, **fields: Any) -> MemoryEstimate:
    chosen, zero_section = small_recipe(**fields), {"stage": stage, **(section or {})}
    config = {"train_batch_size": 64 * ranks, "gradient_clipping": 1.0, "zero_optimization": zero_section}
    network = architecture(chosen, 10)
    resolved = resolve_for(chosen, config, world_size=ranks)
    return MemoryEstimate(chosen, resolved, network, gpu=True)


def test_memory_falls_with_the_stage_and_the_ranks() -> None:
    parameters = count_parameters(architecture(small_recipe(), 10))
    at = {stage: estimate(stage, 8).memory() for stage in range(4)}
    assert at[0].optimizer > at[1].optimizer == at[2].optimizer
    assert estimate(1, 1).memory().optimizer > at[1].optimizer > estimate(1, 64).memory().optimizer
    assert estimate(1, 8, ema={"decay": 0.9}).memory().ema == pytest.approx(4 * parameters / 8, abs=4)
    assert estimate(0, 1).memory().optimizer == 2 * 4 * parameters, "weights are their own masters"


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["none", "all"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 autocast"])
def test_on_a_gpu_a_forward_pass_keeps_what_the_plan_says(precision: str, policy: str) -> None:
    config = model_config("lavit_small", drop_path=0.1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = LaViT(config).to("cuda", dtype)
    model.set_activation_checkpointing(policy)
    images = torch.randn(16, 3, *config.image_size, device="cuda")
    for _ in range(2):  # the first brings the workspaces of cuBLAS along
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16 autocast"):
            logits, diagonality = model(images.to(dtype), with_diagonality=True)
        loss = F.cross_entropy(logits.float(), torch.rand(16, config.num_classes, device="cuda")) + diagonality.float()
        kept = torch.cuda.memory_allocated() - before + images.nbytes
        loss.backward()
        del logits, diagonality, loss
    planned = activations(config, precision, policy, 16, mixed=False, gpu=True)
    assert planned.kept == pytest.approx(kept, rel=0.1)


def test_bf16_with_sums_in_fp32_at_stage_1_does_not_overlap() -> None:
    """DeepSpeed's BF16_Optimizer does not read overlap_comm."""
    wide, at_1 = {"data_types": {"grad_accum_dtype": "fp32"}}, {"stage": 1, "overlap_comm": True}

    def overlaps(section: dict[str, Any], **more: Any) -> bool:
        config = {"train_batch_size": 8, "gradient_clipping": 1.0, "zero_optimization": at_1 | section, **more}
        return Engine(
            small_recipe(), resolve_for(small_recipe(), config, world_size=2, has_gpu=True, has_bf16_gpu=True)
        ).overlap

    assert overlaps({})
    assert not overlaps({}, **wide)
    assert overlaps({"stage": 2}, **wide)
    assert overlaps({"stage": 3, "overlap_comm": None})  # DeepSpeed's default there


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    one, capacity = estimate(1, 2), 5 * 2**20
    largest = one.largest_micro_batch("none", capacity)
    assert 0 < largest < 64
    assert one.memory("none", largest).total <= capacity < one.memory("none", largest + 2).total
    assert one.largest_micro_batch("none", 1.0) == 0
    assert one.largest_micro_batch("none", 1e15) == 64


class Calls(TorchFunctionMode):
    """Notes the names of the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def test_what_autocast_casts_on_a_gpu_is_known_of_every_function_that_the_network_calls() -> None:
    """torch's CPU build knows what is registered for GPUs, but not with which type."""
    model = create_model("lavit_micro", image_size=32, drop_path=0.1)
    with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
        model(torch.randn(2, 3, 32, 32), with_diagonality=True)
    cast = {
        name.removeprefix("aten::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA")
    } & calls.names
    wide = {func.__name__ for func in GpuAutocast.FP32 | GpuAutocast.FP32_RESULT}
    assert wide <= cast
    assert cast - wide <= {"linear", "conv2d", "matmul", "bmm", "baddbmm", "scaled_dot_product_attention"}


def checkpoint_is_as_large_as_planned(control: dist.ProcessGroup, folder: Path) -> None:
    recipe = small_recipe(ema={"decay": 0.9}).model_copy(update={"model": load_recipe(RECIPE).model})
    run = training(recipe, zero_optimization=zero(1))
    writer = CheckpointWriter(folder, run.optimizer_shards, retention=Retention(), facts={}, group=control)
    writer.start(TrainState(step=1))
    assert writer.finish() == ""
    (written,) = list_checkpoints(folder)
    size = sum(file.stat().st_size for file in written.iterdir())
    parameters = sum(parameter.numel() for parameter in run.engine.module.parameters())
    assert size == pytest.approx(checkpoint_bytes(recipe, parameters), rel=0.01)


def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path) -> None:
    run_ranks(2, checkpoint_is_as_large_as_planned, tmp_path)
