"""The mechanisms equal their formulae, computed naively in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.attention import LessAttention, VanillaAttention
from models.block import Block, layer_norm
from models.diagonality import diagonality_loss, diagonality_loss_as_printed, pool_queries
from models.residual import AttentionResidual


@pytest.fixture(autouse=True)
def in_float64():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def perturb(module):
    """Move every parameter off its initial value, so that no test passes thanks to an identity or a zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


GRIDS = [((4, 6), 1), ((4, 6), 2), ((3, 3), 1), ((8, 4), 4)]


@pytest.mark.parametrize(("grid", "ratio"), GRIDS)
def test_less_attention_equals_the_written_formula(grid, ratio):
    width, heads, batch = 6, 2, 3
    attention = perturb(LessAttention(width, heads, ratio, layer_norm, grid))
    queries, keys = grid[0] * grid[1], grid[0] * grid[1] // ratio**2
    before = torch.randn(batch, heads, queries, keys)  # as in the paper: queries x keys
    tokens = torch.randn(batch, queries, width)
    output, scores, _ = attention(tokens, grid, before.transpose(-2, -1), False)

    psi, theta, bias = attention.psi.weight, attention.theta.weight, attention.theta.bias
    reduced = attention.reduced(tokens, grid)
    expected = torch.empty(batch, queries, width)
    for b in range(batch):
        for h in range(heads):
            mixed = before[b, h] @ theta.T + bias  # Theta reads each row: the key axis
            mixed = (mixed.T @ psi.T).T  # Psi reads each column: the query axis
            torch.testing.assert_close(scores[b, h].T, mixed)
            columns = slice(h * width // heads, (h + 1) * width // heads)
            value = reduced[b] @ attention.v.weight.T[:, columns]
            rows = [sum(p * v for p, v in zip(F.softmax(row, 0), value, strict=True)) for row in mixed]
            expected[b, :, columns] = torch.stack(rows)
    torch.testing.assert_close(output, expected @ attention.proj.weight.T + attention.proj.bias)


@pytest.mark.parametrize(("grid", "ratio"), GRIDS)
@pytest.mark.parametrize("keeps_scores", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_vanilla_attention_equals_the_written_formula_fused_or_not(grid, ratio, keeps_scores, with_residual):
    width, heads, batch = 6, 2, 2
    attention = perturb(VanillaAttention(width, heads, ratio, layer_norm, keeps_scores=keeps_scores))
    queries, keys = grid[0] * grid[1], grid[0] * grid[1] // ratio**2
    tokens = torch.randn(batch, queries, width)
    initial = torch.randn(batch, heads, keys, queries) if with_residual else None
    output, scores, _ = attention(tokens, grid, initial, False)

    query, reduced = attention.q(tokens), attention.reduced(tokens, grid)
    key, value = reduced @ attention.kv.weight[:width].T, reduced @ attention.kv.weight[width:].T
    expected = torch.empty(batch, queries, width)
    for b in range(batch):
        for h in range(heads):
            columns = slice(h * width // heads, (h + 1) * width // heads)
            written = query[b, :, columns] @ key[b, :, columns].T / math.sqrt(width // heads)
            if initial is not None:
                written = written + initial[b, h].T
            if keeps_scores:
                torch.testing.assert_close(scores[b, h].T, written)
            expected[b, :, columns] = F.softmax(written, -1) @ value[b, :, columns]
    assert (scores is not None) == keeps_scores
    torch.testing.assert_close(output, expected @ attention.proj.weight.T + attention.proj.bias)


@pytest.mark.parametrize(("key_grid", "key_ratio"), [((2, 3), 1), ((4, 6), 2), ((4, 6), 1)])
def test_averaging_attention_residual_equals_pooling_query_and_key_patches_on_the_grid(key_grid, key_ratio):
    grid, heads = (4, 6), 2
    residual = AttentionResidual(heads, heads, key_ratio)
    with torch.no_grad():
        residual.pool.fill_(1 / (4 * key_ratio**2))
        residual.mix.copy_(torch.eye(heads))
        residual.gamma.copy_(torch.tensor([2.0, -3.0]))
    scores = torch.randn(2, heads, key_grid[0] * key_grid[1], grid[0] * grid[1])
    out = residual(scores, grid, key_grid)

    maps = scores.view(2, heads, *key_grid, *grid)
    rows, columns = key_grid[0] // key_ratio, key_grid[1] // key_ratio
    expected = torch.empty(2, heads, rows, columns, 2, 3)
    for r in range(rows):
        for c in range(columns):
            for y in range(2):
                for x in range(3):
                    key_rows = slice(r * key_ratio, (r + 1) * key_ratio)
                    key_columns = slice(c * key_ratio, (c + 1) * key_ratio)
                    patch = maps[:, :, key_rows, key_columns, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                    expected[:, :, r, c, y, x] = patch.mean((2, 3, 4, 5))
    expected = expected.flatten(4).flatten(2, 3) * torch.tensor([2.0, -3.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(out, expected)


def test_the_residuals_four_axis_kernel_weighs_key_offsets_and_query_offsets_apart():
    residual = perturb(AttentionResidual(3, 4, 2))
    scores = torch.randn(1, 3, 16, 16)
    out = residual(scores, (4, 4), (4, 4))
    kernel = residual.pool  # head, key offsets, query offsets
    patches = scores.view(3, 2, 2, 2, 2, 2, 2, 2, 2)  # head, (grid, offset) of 4 axes
    pooled = torch.einsum("hiajbkcld,habcd->hijkl", patches, kernel)
    mixed = torch.einsum("gh,hijkl->gijkl", residual.mix, pooled)
    expected = mixed * residual.gamma.view(4, 1, 1, 1, 1)
    torch.testing.assert_close(out[0], expected.flatten(3).flatten(1, 2))


@pytest.mark.parametrize(("grid", "ratio"), GRIDS)
def test_a_fresh_less_attention_block_repeats_its_predecessors_attention(grid, ratio):
    attention = LessAttention(6, 2, ratio, layer_norm, grid)
    keys = grid[0] * grid[1] // ratio**2
    before = torch.randn(2, 2, keys, grid[0] * grid[1])
    _, scores, _ = attention(torch.randn(2, grid[0] * grid[1], 6), grid, before, False)
    assert torch.equal(scores, before)


def test_a_rectangular_attention_is_pooled_over_the_queries_of_each_keys_place():
    attention = torch.rand(2, 3, 6, 24).softmax(2)  # keys 2 x 3, queries 4 x 6
    square = pool_queries(attention, (4, 6), (2, 3))
    expected = attention.view(2, 3, 6, 2, 2, 3, 2).mean((4, 6)).flatten(3)
    torch.testing.assert_close(square, expected)
    torch.testing.assert_close(square.sum(2), torch.ones(2, 3, 6))


def test_the_diagonality_loss_equals_its_closed_form_on_hand_made_matrices():
    identity, uniform = torch.eye(5), torch.full((5, 5), 1 / 5)
    shift = torch.eye(5).roll(1, 0)
    assert diagonality_loss(identity).item() == pytest.approx(1 - 5)
    assert diagonality_loss(uniform).item() == pytest.approx(0)
    assert diagonality_loss(shift).item() == pytest.approx(2 + 1)  # nothing on the diagonal, nothing symmetric
    attention = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.2, 0.4]])
    asymmetry = 2 * (0.2 + 0.2 + 0.1)
    dominance = 3 - 3 * 1.5
    assert diagonality_loss(attention).item() == pytest.approx((asymmetry + dominance) / 3)
    assert diagonality_loss(attention.T).item() == pytest.approx((asymmetry + dominance) / 3)
    both = torch.stack([attention, torch.eye(3)])
    assert diagonality_loss(both).item() == pytest.approx(((asymmetry + dominance) / 3 + 1 - 3) / 2)
    assert diagonality_loss_as_printed(attention).item() == pytest.approx(asymmetry - dominance)


def descend(loss, steps=400):
    """Plain gradient descent on the scores of a random attention matrix; what it becomes."""
    scores = torch.randn(6, 6, requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(scores.softmax(-1)), scores)
        with torch.no_grad():
            scores -= 0.1 * gradient
    return scores.softmax(-1).detach()


def diagonal_and_asymmetry(attention):
    return attention.diagonal().mean().item(), (attention - attention.T).abs().sum().item()


def test_the_intended_loss_drives_a_random_matrix_to_symmetric_and_diagonal():
    diagonal, asymmetry = diagonal_and_asymmetry(descend(diagonality_loss))
    assert diagonal > 0.9
    assert asymmetry < 0.5


def test_the_printed_loss_drives_a_random_matrix_away_from_the_diagonal():
    diagonal, _ = diagonal_and_asymmetry(descend(diagonality_loss_as_printed))
    assert diagonal < 0.02  # a sixth is chance


@pytest.mark.parametrize("ratio", [1, 2])
def test_gradients_are_right_through_a_vanilla_and_a_less_attention_block(ratio):
    grid, width, heads = ((2, 2), 4, 2) if ratio == 1 else ((2, 4), 4, 2)
    tokens_count = grid[0] * grid[1]
    vanilla = Block(width, VanillaAttention(width, heads, ratio, layer_norm, keeps_scores=True), 1.0, 0.0, layer_norm)
    less = Block(width, LessAttention(width, heads, ratio, layer_norm, grid), 1.0, 0.0, layer_norm)
    residual = AttentionResidual(heads, 3, 1 if ratio == 2 else 2)
    modules = [perturb(module) for module in (vanilla, less, residual)]
    parameters = [p for module in modules for p in module.parameters()]

    def run(tokens, initial, *values):
        del values  # they are the parameters themselves, moved in place by gradcheck
        tokens, scores, _ = vanilla(tokens, grid, initial, None, True)
        tokens, scores, loss = less(tokens, grid, scores, None, True)
        return tokens, residual(scores, grid, (grid[0] // ratio, grid[1] // ratio)), loss

    tokens = torch.randn(1, tokens_count, width, requires_grad=True)
    initial = torch.randn(1, heads, tokens_count // ratio**2, tokens_count, requires_grad=True)
    assert torch.autograd.gradcheck(run, (tokens, initial, *parameters))
