"""Triton's kernels on the CPU; test_fused_attention.py runs this in a process in which TRITON_INTERPRET is set.

The interpreter cuts numbers off where it makes bf16 of them, where a GPU rounds; fp16 it rounds.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from models import attention_diagnostics, fused_attention
from models.diagonality import pool_queries
from models.product import attended
from tests.models.test_lavit import small

SHAPES = {
    "stage 1": (1, 1, 64, (56, 56), (7, 7)),
    "stage 2, odd channels": (1, 3, 24, (28, 28), (7, 7)),
    "stage 3": (2, 2, 64, (14, 14), (7, 7)),
    "stage 4, odd channels": (2, 2, 36, (7, 7), (7, 7)),
    "stage 3 at 384": (1, 1, 64, (24, 24), (12, 12)),
    "stage 4 at 384": (1, 2, 16, (12, 12), (12, 12)),
    "places of 9 queries": (1, 2, 8, (9, 6), (3, 2)),
    "one token": (2, 1, 8, (1, 1), (1, 1)),
}
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}
pytestmark = pytest.mark.skipif(not fused_attention.INTERPRETED, reason="TRITON_INTERPRET is not set")


def torchs(scores: Tensor, values: Tensor, grid, key_grid, *, pooled: bool) -> tuple[Tensor, Tensor | None]:
    """What the operator stands for."""
    attention = scores.softmax(-2)
    heads = values.unflatten(-1, (scores.shape[1], -1)).transpose(1, 2)
    output = attended(attention, heads).transpose(1, 2).flatten(2)
    return output, pool_queries(attention, grid, key_grid) if pooled else None


def drawn(shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores and, as the second half of a joint projection, values."""
    batch, heads, channels, grid, key_grid = shape
    torch.manual_seed(0)
    keys = key_grid[0] * key_grid[1]
    scores = 2 * torch.randn(batch, heads, keys, grid[0] * grid[1])
    return scores.to(dtype), torch.randn(batch, keys, 2 * heads * channels).to(dtype)


def results(attend, shape, pooled: bool, scores: Tensor, joint: Tensor) -> list[Tensor]:
    """Outputs, then gradients of a sum of all of them, with weights of either sign."""
    scores, joint = scores.clone().requires_grad_(), joint.clone().requires_grad_()
    output, square = attend(scores, joint.chunk(2, -1)[1], *shape[3:], pooled=pooled)
    torch.manual_seed(1)
    loss = (output * torch.randn(output.shape).to(output.dtype)).sum()
    if square is not None:
        loss = loss + (square * 10 * torch.randn(square.shape)).sum()
    loss.backward()
    return [output.detach(), *(() if square is None else (square.detach(),)), scores.grad, joint.grad]


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_are_torchs_at_every_stages_shapes(name, pooled):
    shape = SHAPES[name]
    thorough = name in {"stage 3", "places of 9 queries"}
    for dtype in TOLERANCES if thorough else [torch.float32]:
        given = drawn(shape, dtype)
        exact = results(torchs, shape, pooled, *(tensor.double() for tensor in given))
        ours = results(fused_attention.attend, shape, pooled, *given)
        for got, expected in zip(ours, exact, strict=True):
            tolerance = TOLERANCES[dtype] * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
        if thorough:
            again = results(fused_attention.attend, shape, pooled, *given)
            assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))


def test_scores_of_another_type_than_values_are_read_as_they_are():
    shape = SHAPES["stage 3"]
    scores, joint = drawn(shape, torch.float32)
    ours = results(fused_attention.attend, shape, True, scores, joint.half())
    exact = results(torchs, shape, True, scores.double(), joint.half().double())
    assert [tensor.dtype for tensor in ours] == [torch.float16, torch.float32, torch.float32, torch.float16]
    for got, expected in zip(ours, exact, strict=True):
        tolerance = TOLERANCES[torch.float16] * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


def test_a_pictures_numbers_do_not_depend_on_the_batch_it_is_in():
    shape = SHAPES["stage 3"]
    scores, joint = drawn(shape, torch.float32)
    both = results(fused_attention.attend, shape, False, scores, joint)
    torch.manual_seed(1)
    alone = fused_attention.attend(scores[:1], joint[:1].chunk(2, -1)[1], *shape[3:], pooled=False)[0]
    assert torch.equal(alone, both[0][:1])


def test_the_operator_keeps_torchs_rules_for_operators():
    shape = SHAPES["places of 9 queries"]
    scores, joint = (tensor.requires_grad_() for tensor in drawn(shape, torch.float32))
    for pooled in (False, True):
        given = (scores, joint.chunk(2, -1)[1], list(shape[3]), list(shape[4]), pooled)
        torch.library.opcheck(torch.ops.lavit.attend.default, given)


def step_of(model, compiled: bool = False, autocast: bool = False) -> list[Tensor]:
    """Logits, diagonality and all gradients of a training step."""
    torch.manual_seed(2)
    images = torch.randn(2, 3, 32, 32)
    run: Any = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, diagonality = run(images, with_diagonality=True)
        (torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1])) + diagonality).backward()
    found = [logits.detach(), diagonality.detach(), *(parameter.grad for parameter in model.parameters())]
    model.zero_grad()
    return found


@pytest.fixture
def pair(monkeypatch):
    """The same weights with torch's operators and with the kernels, and how often these are called."""
    calls = []
    attend = fused_attention.attend
    monkeypatch.setattr(fused_attention, "attend", lambda *a, **k: calls.append(k["pooled"]) or attend(*a, **k))
    plain, ours = small(), small(attention_kernel="triton")
    with torch.no_grad():
        for model in (plain, ours):
            torch.manual_seed(3)
            for name, parameter in model.named_parameters():
                if any(part in name for part in ("theta", "psi", "gamma")):
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return plain, ours, calls


@pytest.mark.parametrize("way", ["eager", "compiled", "checkpointed"])
def test_a_training_step_of_a_whole_network_equals_the_eager_one(way, pair):
    plain, ours, calls = pair
    ours.set_activation_checkpointing("all" if way == "checkpointed" else "none")
    expected, got = step_of(plain), step_of(ours, compiled=way == "compiled")
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    if way == "eager":  # four Vanilla Attention blocks keep their scores, or have a residual; four are Less Attention
        assert sorted(calls) == [False] * 4 + [True] * 4


def test_under_autocast_it_is_torchs_step_to_bf16s_precision(pair):
    plain, ours, _ = pair
    for one, other in zip(step_of(ours, autocast=True)[:2], step_of(plain, autocast=True)[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=2**-5, atol=2**-5)


def test_a_look_at_the_attention_and_an_export_take_torchs_operators(pair):
    plain, ours, calls = pair
    images = torch.randn(2, 3, 32, 32)
    assert attention_diagnostics(ours, images) == attention_diagnostics(plain, images)
    program = torch.export.export(ours.eval(), (images,))
    assert torch.equal(program.module()(images), plain.eval()(images))
    assert not calls
