"""The gradient norm that is measured is that of the whole gradient before clipping, at every ZeRO stage."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_pipeline.mixing import mix
from pretrain.engine.engine import build_model
from pretrain.engine.schedule import drop_path_uniforms
from pretrain.recipe import Recipe
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_equality import BATCH, CLASSES, global_batch, micro_batches, recipe, training, zero
from tests.rounding import allowed_error


def plain_norm(recipe: Recipe) -> float:
    """Of the first global batch, by torch alone in float64 in one process; not clipped."""
    model, rows = build_model(recipe, CLASSES).double(), np.arange(BATCH, dtype=np.int64)
    images, targets = mix(*global_batch(0), rows, config=recipe.mixing, num_classes=CLASSES, seed=3, step=0)
    uniforms = drop_path_uniforms(3, 0, rows, branches=model.num_drop_paths)
    logits, diagonality = model(images.double(), drop_path_uniforms=uniforms, with_diagonality=True)
    (F.cross_entropy(logits, targets) + 0.01 * diagonality).backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def equals_plain_torch(control: dist.ProcessGroup) -> None:
    bf16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    cases: list[dict[str, Any]] = [
        *({"zero_optimization": zero(stage)} for stage in range(4)),
        {"zero_optimization": zero(2, offload_optimizer={"device": "cpu"})},
        {"zero_optimization": zero(1), **bf16},
        {"zero_optimization": zero(0), "gradient_clipping": 0.0},
    ]
    expected = plain_norm(recipe())
    for config in cases:
        # Ten operations in a row in each of five blocks, forward and backward. The longest sums are over 8 x 64 tokens,
        # which bfloat16's kernels keep in float32.
        dtype, tokens = (torch.bfloat16, 1) if "bf16" in config else (torch.float32, 8 * 64)
        run = training(recipe(ema={"decay": 0.9}), accumulation=2, **config)
        run.train_step(micro_batches(run.batch.micro_batch))
        (row,) = run.monitor.take(run.state)
        if "gradient_clipping" in config:
            assert row["grad_norm"] is None, "nobody computes it"
        else:
            allowed = allowed_error(operations=100, terms=tokens, dtype=dtype)
            assert row["grad_norm"] == pytest.approx(expected, rel=allowed), config


@pytest.mark.slow
def test_the_gradient_norm_is_that_of_plain_torch_at_every_stage_before_clipping() -> None:
    run_ranks(2, equals_plain_torch)
