"""Attention diagnostics measure what they say and leave nothing behind."""

import pytest
import torch

from models.attention import Attention
from models.diagnostics import attention_diagnostics
from tests.models.test_lavit import small
from tests.rounding import allowed_error


def attentions(model):
    return [module for module in model.modules() if isinstance(module, Attention)]


def test_a_known_attention_gets_its_known_numbers():
    model = small()
    block = model.stages[3].blocks[1].attention
    tokens = block.psi.weight.shape[0]
    with torch.no_grad():
        block.theta.weight.zero_()
        block.theta.bias.copy_(torch.linspace(0, 1, tokens) * 1000)  # every query looks at the last key
    last = attention_diagnostics(model, torch.randn(2, 3, 32, 32))[-1]
    exactly = {"rel": allowed_error(operations=3, terms=tokens**2)}
    assert last.diagonality == pytest.approx(1 / tokens, **exactly)
    assert last.symmetry == pytest.approx(1 / tokens, **exactly)


def test_measuring_leaves_the_model_as_it_was():
    model = small(drop_path=0.2).train()
    uniforms = torch.rand(model.num_drop_paths, 2)
    images = torch.randn(2, 3, 32, 32)
    before = model(images, drop_path_uniforms=uniforms)
    attention_diagnostics(model, images)
    assert model.training
    assert not [module for module in attentions(model) if "observer" in vars(module)]
    assert torch.equal(before, model(images, drop_path_uniforms=uniforms))
    with pytest.raises(ValueError, match="images"):
        attention_diagnostics(model, torch.randn(2, 1, 32, 32))
    assert model.training
    assert not [module for module in attentions(model) if "observer" in vars(module)]


def test_there_is_one_entry_and_one_look_a_block_with_numbers_in_their_ranges():
    model, seen = small(vanilla_blocks=(1, 1, 2, 1)), []
    rows = attention_diagnostics(model, torch.randn(2, 3, 32, 64), lambda *shown: seen.append(shown))
    places = [(s, b) for s, depth in enumerate((1, 2, 3, 2)) for b in range(depth)]
    assert [(r.stage, r.block) for r in rows] == [(stage, block) for stage, block, *_ in seen] == places
    assert [r.kind for r in rows] == ["vanilla", "vanilla", "less", "vanilla", "vanilla", "less", "vanilla", "less"]
    for row, (_, _, attention, grid, key_grid) in zip(rows, seen, strict=True):
        assert 0 <= row.diagonality <= 1
        assert 0 <= row.symmetry <= 1
        assert (row.saturation is None) == (row.block == 0)
        if row.kind == "less":  # fresh: a cosine of two equal vectors over at most 64 keys
            assert row.saturation == pytest.approx(1, abs=allowed_error(operations=3, terms=64))
        elif row.block:
            assert row.saturation < 0.99
        keys = key_grid[0] * key_grid[1]
        assert attention.shape[-2:] == (keys, grid[0] * grid[1])
        assert (attention.sum(-2) - 1).abs().max() < keys * torch.finfo(torch.float32).eps
