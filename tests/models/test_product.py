"""The products of attention equal the plain ones, and their gradients lie in memory as they are wanted."""

import pytest
import torch

from models.product import attended, scores_of
from tests.accuracy import assert_as_accurate


def heads_of(tokens, heads):
    """(batch, T, C) to (batch, heads, T, d), a view, as the blocks have it."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def plain_and_ours(dtype, heads, computed_in=None):
    """Attention from raw factors of a type, by torch.matmul and by our products; (outputs and gradients) of each."""
    torch.manual_seed(0)
    shapes = [(2, 6, 4 * heads), (2, 24, 4 * heads), (2, 6, 4 * heads)]
    results = []
    for multiply_scores, multiply_values in (
        (lambda k, q: k @ q.transpose(-2, -1), lambda a, v: a.transpose(-2, -1) @ v),
        (scores_of, attended),
    ):
        torch.manual_seed(1)
        factors = [torch.randn(s, dtype=dtype).to(computed_in or dtype).requires_grad_() for s in shapes]
        keys, queries, values = (heads_of(factor, heads) for factor in factors)
        scores = multiply_scores(keys, queries)
        output = multiply_values(scores.softmax(-2), values)
        weights = torch.linspace(-1, 1, output.numel(), dtype=dtype).to(output.dtype)
        (output * weights.view(output.shape)).sum().backward()
        results.append([scores.detach(), output.detach(), *(factor.grad for factor in factors)])
    return results


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_and_outputs_and_all_gradients_equal_those_of_the_plain_product(dtype, heads):
    plain, ours = plain_and_ours(dtype, heads)
    exact, _ = plain_and_ours(dtype, heads, computed_in=torch.float64)
    for results in zip(ours, plain, exact, strict=True):
        assert_as_accurate(*results)


def test_under_autocast_gradients_are_those_of_the_plain_product_too():
    with torch.autocast("cpu", torch.bfloat16):
        values = torch.nn.functional.linear(torch.randn(2, 3, 6, 4, requires_grad=True), torch.eye(4))
        scores = torch.randn(2, 3, 6, 24, requires_grad=True)
        results = []
        for multiply in (lambda a, v: a.transpose(-2, -1) @ v, attended):
            attention = scores.softmax(-2)
            assert attention.dtype == torch.float32 != values.dtype
            output = multiply(attention, values)
            results.append([output, *torch.autograd.grad(output.square().sum(), (scores, values), retain_graph=True)])
    for expected, got in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)


def test_gradients_of_gradients_are_right():
    torch.manual_seed(0)
    three, four = (torch.rand(1, 2, rows, 2, dtype=torch.float64, requires_grad=True) for rows in (3, 4))
    assert torch.autograd.gradgradcheck(scores_of, (three, four))
    assert torch.autograd.gradgradcheck(lambda keys, queries: attended(scores_of(keys, queries), keys), (three, four))


def test_the_gradient_of_a_transposed_factor_lies_in_memory_as_the_factor_does():
    attention, values = torch.rand(2, 3, 6, 24, requires_grad=True), torch.rand(2, 3, 6, 4)
    output = attended(attention, values)
    (gradient,) = torch.autograd.grad(output.sum(), attention)
    assert gradient.is_contiguous()
    (copied,) = torch.autograd.grad((attention.transpose(-2, -1) @ values).sum(), attention)
    assert not copied.is_contiguous()  # what torch's own product gives: a reason for ours, for as long as this holds
