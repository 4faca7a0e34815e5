"""Memory of a plan in detail. ``tests/system/test_planned_memory.py`` compares it with measured peaks."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import LaViT, model_config
from pretrain.check import architecture, resolve_for
from pretrain.engine.deepspeed_config import resolve_deepspeed_config
from pretrain.memory_estimate import Engine, MemoryEstimate, NetworkTrace, trace
from tests.pretrain.test_equality import recipe as small_recipe
from tests.system.test_planned_memory import CLASSES, Configuration


def test_any_choice_of_recomputed_stages_is_put_together_from_none_and_all() -> None:
    config = model_config("lavit_micro", drop_path=0.1)
    for precision, bound in (("fp32", 1e-3), ("bf16 autocast", 0.05)):  # casts of patch embeddings go to no stage
        network = NetworkTrace(config, precision, mixed=True, gpu=True)
        for policy in ((True, False, True, False), (False, True, True, True)):
            put_together = network.activations(policy, 6)
            names, _, direct = trace(config, precision, policy, 6, mixed=True, gpu=precision != "fp32")
            forward, held, live = np.split(direct, [5, 10])
            assert names == network.names
            assert put_together.kept == pytest.approx(held.sum(), rel=bound)
            assert put_together.forward == pytest.approx(forward.max(), rel=bound)
            peak = max(put_together.forward, put_together.live.max())
            assert peak == pytest.approx(max(forward.max(), live.max()), rel=bound)
            # Where one stage's backward pass ends and the next one's begins, a temporary may be counted with either.
            assert np.abs(put_together.live - live).max() < 0.05 * peak


def test_autocast_keeps_more_on_a_gpu_than_on_a_cpu_and_other_precisions_the_same() -> None:
    config = model_config("lavit_micro", image_size=32)
    for precision in ("fp32", "bf16", "bf16 autocast"):
        for policy in ("none", "all"):
            cpu, gpu = (
                NetworkTrace(config, precision, mixed=True, gpu=gpu).activations(policy, 8) for gpu in (False, True)
            )
            peaks = [max(one.forward, one.live.max()) for one in (cpu, gpu)]
            if precision == "bf16 autocast":
                assert 1.1 * cpu.kept < gpu.kept < 1.6 * cpu.kept
                assert peaks[0] < peaks[1]
            else:
                assert (cpu.kept, peaks[0]) == (gpu.kept, peaks[1])


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
    planned = NetworkTrace(config, precision, mixed=False, gpu=True).activations(policy, 16)
    assert planned.kept == pytest.approx(kept, rel=0.1)


def estimate(stage: int, ranks: int, *, ema: bool = False, **zero: Any) -> MemoryEstimate:
    configuration = Configuration("lavit_micro", 32, 8, stage, ema=ema)
    recipe, deepspeed = configuration.recipe(), configuration.deepspeed()
    deepspeed |= {"train_batch_size": 64 * ranks, "train_micro_batch_size_per_gpu": 8}
    deepspeed["zero_optimization"] |= zero
    device = {"world_size": ranks, "has_gpu": True, "has_bf16_gpu": True}
    config = architecture(recipe, CLASSES)
    return MemoryEstimate(recipe, resolve_for(recipe, deepspeed, parameters=1, **device), config, gpu=True)


def test_what_is_offloaded_is_in_the_memory_of_the_host() -> None:
    here, away = (estimate(2, 8, **more).memory() for more in ({}, {"offload_optimizer": {"device": "cpu"}}))
    assert (here.host, away.optimizer) == (0, 0)
    assert away.host > here.optimizer > 0
    assert away.total == here.total - here.optimizer


def test_bf16_with_sums_in_fp32_at_stage_1_does_not_overlap() -> None:
    """DeepSpeed's BF16_Optimizer does not read overlap_comm."""
    wide, at_1 = {"data_types": {"grad_accum_dtype": "fp32"}}, {"stage": 1, "overlap_comm": True}

    def overlaps(section: dict[str, Any], **more: Any) -> bool:
        config = {"train_batch_size": 8, "gradient_clipping": 1.0, "zero_optimization": at_1 | section, **more}
        return Engine(
            small_recipe(), resolve_deepspeed_config(config, world_size=2, state_bytes=0, has_bf16_gpu=True)
        ).overlap

    assert overlaps({})
    assert not overlaps({}, **wide)
    assert overlaps({"offload_optimizer": {"device": "cpu"}}, **wide)  # another of its engines
    assert overlaps({"stage": 2}, **wide)
    assert overlaps({"stage": 3, "overlap_comm": None})  # DeepSpeed's default there
