"""The plan's memory against what real training on real ranks takes; all of benchmarks/memory.py runs by hand."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmarks.memory import CLASSES, GOAL, Configuration, estimate, measure
from torch.overrides import TorchFunctionMode

from models import LaViT, create_model, model_config
from pretrain.check import architecture
from pretrain.planning import rehearsal
from pretrain.planning.memory import Engine, memory_model
from tests.pretrain.ranks import run_ranks

SMALL = (
    Configuration("lavit_micro", 32, 64, 1, ema=True),
    Configuration("lavit_micro", 32, 64, 2, "bf16", (True, True, False, False), accumulation=2),
)


def planned_is_measured(control: dist.ProcessGroup) -> None:
    for configuration in SMALL:
        said, seen = estimate(configuration, 2).total, measure(configuration, torch.device("cpu"), control)
        assert abs(said / seen - 1) < GOAL, f"{configuration}: planned {said / 2**20:.1f}, measured {seen / 2**20:.1f}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_planned_memory_is_what_training_takes_within_15_percent() -> None:
    run_ranks(2, planned_is_measured)


def test_any_choice_of_recomputed_stages_is_put_together_from_none_and_all() -> None:
    config = model_config("lavit_micro", drop_path=0.1)
    model = rehearsal.Rehearsal(config, "fp32", mixed=True, gpu=True)
    for policy in ([True, False, True, False], [False, True, True, True]):
        put_together = model.passes(policy, 6)
        names, direct = rehearsal._rehearse(config, policy, 6, "fp32", mixed=True, gpu=True)
        assert names == model.names
        assert put_together.kept == pytest.approx(direct.kept.sum(), rel=1e-3)
        assert put_together.forward_peak == pytest.approx(direct.forward.max(), rel=1e-3)
        assert put_together.peak == pytest.approx(max(direct.forward.max(), direct.live.max()), rel=1e-3)
        # Where one stage's backward pass ends and the next one's begins, a temporary may be counted with either.
        assert np.abs(put_together.live - direct.live).max() < 0.05 * put_together.peak


def called_under_autocast(model: torch.nn.Module) -> set[str]:
    class Calls(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.add(func.__name__)
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    with torch.autocast("cpu", torch.bfloat16), Calls():
        model(torch.randn(2, 3, 32, 32), with_diagonality=True)
    return names


def test_what_autocast_casts_on_a_gpu_is_known_of_every_function_that_the_network_calls() -> None:
    """torch's CPU build knows what is registered for GPUs, but not with which type."""
    called = called_under_autocast(create_model("lavit_micro", image_size=32, drop_path=0.1))
    cast = {
        name.removeprefix("aten::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA")
    } & called
    wide = {func.__name__ for func in rehearsal.GpuAutocast.FP32 | rehearsal.GpuAutocast.FP32_RESULT}
    assert wide <= cast
    assert cast - wide <= {"linear", "conv2d", "matmul", "bmm", "baddbmm", "scaled_dot_product_attention"}


def test_autocast_keeps_more_on_a_gpu_than_on_a_cpu_and_other_precisions_the_same() -> None:
    config = model_config("lavit_micro", image_size=32)
    for precision in ("fp32", "bf16", "bf16 autocast"):
        for policy in ("none", "all"):
            cpu, gpu = (
                rehearsal.Rehearsal(config, precision, mixed=True, gpu=gpu).passes(policy, 8) for gpu in (False, True)
            )
            if precision == "bf16 autocast":
                assert 1.1 * cpu.kept < gpu.kept < 1.6 * cpu.kept
                assert cpu.peak < gpu.peak
            else:
                assert (cpu.kept, cpu.peak) == (gpu.kept, gpu.peak)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["none", "all"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 autocast"])
def test_on_a_gpu_a_forward_pass_keeps_what_the_plan_says(precision, policy):
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
    planned = rehearsal.Rehearsal(config, precision, mixed=False, gpu=True).passes(policy, 16)
    assert planned.kept == pytest.approx(kept, rel=0.1)


def test_memory_falls_with_the_stage_and_the_ranks_and_grows_with_what_is_kept() -> None:
    first = Configuration("lavit_micro", 32, 8, 1)
    model = memory_model(architecture(first.recipe, CLASSES), "fp32", mixed=True, gpu=True)

    def total(stage: int, ranks: int, policy: str = "none", *, ema: bool = False) -> int:
        one = Configuration("lavit_micro", 32, 8, stage, ema=ema)
        return model.memory(Engine.of(one.recipe, one.resolved(ranks, gpu=False)), policy, 8).standing

    standing = [total(stage, 8) for stage in range(4)]
    assert standing[0] > standing[1] == standing[2]
    assert total(1, 1) > total(1, 8) > total(1, 64)
    assert total(1, 8, ema=True) - total(1, 8) == pytest.approx(4 * model.parameters / 8, abs=4)
    assert total(0, 1) == 3 * 4 * model.parameters
    assert total(0, 8) == 4 * 4 * model.parameters, "gradients stay in the buckets in which they are averaged"


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    one = Configuration("lavit_micro", 32, 8, 1)
    model = memory_model(architecture(one.recipe, CLASSES), "fp32", mixed=True, gpu=True)
    engine = Engine.of(one.recipe, one.resolved(2, gpu=False))
    capacity = 100 * 2**20
    largest = model.largest(engine, "none", capacity, limit=10**4, step=2)
    assert 0 < largest < 10**4
    assert model.memory(engine, "none", largest).total <= capacity < model.memory(engine, "none", largest + 2).total
    assert model.largest(engine, "none", 1.0, limit=10**4) == 0
    assert model.largest(engine, "none", 1e15, limit=64) == 64
