"""Norms by part are those of the whole gradient and the whole weights, at every ZeRO stage, and cost no host a wait."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_pipeline.mixing import mix
from models import LaViT
from pretrain.engine.engine import build_model
from pretrain.engine.schedule import drop_path_uniforms
from pretrain.monitoring.norms import norms_of, part_of
from pretrain.recipe import Recipe
from tests.pretrain.ranks import run_ranks
from tests.pretrain.stand_in import HostWaits
from tests.pretrain.test_equality import (
    BATCH,
    CLASSES,
    global_batch,
    micro_batches,
    recipe,
    training,
    whole_weights,
    zero,
)
from tests.rounding import allowed_error


def plain_gradients(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Of the first global batch, by torch alone in float64 in one process; not clipped."""
    model, rows = build_model(recipe, CLASSES).double(), np.arange(BATCH, dtype=np.int64)
    images, targets = mix(*global_batch(0), rows, config=recipe.mixing, num_classes=CLASSES, seed=3, step=0)
    uniforms = drop_path_uniforms(3, 0, rows, branches=model.num_drop_paths)
    logits, diagonality = model(images.double(), drop_path_uniforms=uniforms, with_diagonality=True)
    (F.cross_entropy(logits, targets) + 0.01 * diagonality).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def by_part(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, tensor in tensors.items():
        squares[part_of(name)] = squares.get(part_of(name), 0.0) + float(tensor.double().square().sum())
    return {part: square**0.5 for part, square in squares.items()}


def measured(run: Any) -> Any:
    return run.monitor.measure(global_batch=BATCH, images_requested=False)[0]["norms"]


def equal_the_whole(control: dist.ProcessGroup) -> None:
    bf16 = {"bf16": {"enabled": True}}
    cases: list[dict[str, Any]] = [
        *({"zero_optimization": zero(stage)} for stage in range(4)),
        {"zero_optimization": zero(0), "gradient_clipping": 0.0},
        {"zero_optimization": zero(2, offload_optimizer={"device": "cpu"})},
        {"zero_optimization": zero(1), **bf16, "data_types": {"grad_accum_dtype": "fp32"}},
    ]
    gradients = plain_gradients(recipe())
    for config in cases:
        # Ten operations in a row in each of five blocks, forward and backward. The longest sums are over 8 x 64 tokens,
        # which bfloat16's kernels keep in float32, and for a norm over all weights.
        short = "bf16" in config
        dtype, tokens = (torch.bfloat16, 1) if short else (torch.float32, 8 * 64)
        run = training(recipe(ema={"decay": 0.9}), accumulation=2, **config)
        weights = whole_weights(run.engine)
        batches = micro_batches(run.batch.micro_batch)
        run.train_step(batches, measure_norms=True)
        found = measured(run)
        expected = {f"gradient/{part}": norm for part, norm in by_part(gradients).items()}
        assert {name: value for name, value in found.items() if name in expected} == pytest.approx(
            expected, rel=allowed_error(operations=100, terms=tokens, dtype=dtype)
        ), config
        changed = by_part(whole_weights(run.engine))
        assert changed != by_part(weights)
        count = sum(gradient.numel() for gradient in gradients.values())
        for part, norm in changed.items():
            allowed = allowed_error(operations=1, terms=1 if short else count, dtype=dtype)
            assert found[f"weight/{part}"] == pytest.approx(norm, rel=allowed), config
        reads = []
        for due in (False, True):
            with HostWaits() as waits:
                run.train_step(batches, measure_norms=due)
            reads.append(len(waits.found))
        assert reads[1] == reads[0], f"a host waits for the norms: {config}"
        waits = (
            "offload_optimizer" in config["zero_optimization"]
        )  # where the host must decide, which counts: so it does
        assert bool(reads[0]) is run.nonfinite.waits is waits, f"a host waits for its device in a good step: {config}"
        second = measured(run)
        assert second.keys() == found.keys()
        assert second != found


@pytest.mark.slow
def test_norms_by_part_are_those_of_plain_torch_at_every_stage_before_clipping() -> None:
    run_ranks(2, equal_the_whole)


def test_parts_are_named_in_the_order_of_the_network() -> None:
    from models import create_model

    model: LaViT = create_model("lavit_micro", num_classes=10, image_size=32)
    parts = list(dict.fromkeys(part_of(name) for name, _ in model.named_parameters()))
    assert sorted(parts) == ["embed", "head", "stage1", "stage2", "stage3", "stage4"]
    assert part_of("stages.0.position.table") == "embed"
    assert part_of("stages.1.embed.conv.weight") == "stage2"
    assert part_of("norm.weight") == "head"


def test_norms_are_scaled_to_the_norm_before_clipping_and_left_out_where_they_are_not_finite() -> None:
    weights = {"weight/a": 1.0, "weight/b": 2.0}

    def norms(gradients: list[float], total: float | None) -> dict[str, float]:
        return norms_of(["a", "b"], torch.tensor([gradients, [1.0, 4.0]]), total)

    assert norms([9.0, 16.0], 10.0) == {"gradient/a": 6.0, "gradient/b": 8.0, **weights}
    assert norms([9.0, 16.0], None) == {"gradient/a": 3.0, "gradient/b": 4.0, **weights}
    assert norms([0.0, 0.0], 0.0) == {"gradient/a": 0.0, "gradient/b": 0.0, **weights}
    assert norms([9.0, math.nan], 10.0) == weights
    assert norms([9.0, math.inf], math.inf) == weights
