"""The products of attention equal the plain ones, and their gradients lie in memory as they are wanted."""

import pytest
import torch

from models.attention import attended, scores_of
from tests.rounding import allowed_error, relative_error


def heads_of(tokens, heads):
    """(batch, T, C) to (batch, heads, T, d), a view, as the blocks have it."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def outputs_and_gradients(multiply_scores, multiply_values, factors, heads):
    """Of attention from raw factors: scores, output, and the gradient of each factor."""
    factors = [factor.clone().requires_grad_() for factor in factors]
    keys, queries, values = (heads_of(factor, heads) for factor in factors)
    scores = multiply_scores(keys, queries)
    output = multiply_values(scores.softmax(-2), values)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    gradients = torch.autograd.grad((output * weights.to(output.dtype)).sum(), factors)
    return [scores.detach(), output.detach(), *gradients]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_and_outputs_and_all_gradients_equal_those_of_the_plain_product(dtype, heads):
    """To rounding: ten operations in a row, sums over 24 queries at most, which bfloat16's kernels keep in float32."""
    torch.manual_seed(0)
    factors = [torch.randn(2, tokens, 4 * heads).to(dtype) for tokens in (6, 24, 6)]
    exact = outputs_and_gradients(
        lambda k, q: k @ q.transpose(-2, -1),
        lambda a, v: a.transpose(-2, -1) @ v,
        [factor.double() for factor in factors],
        heads,
    )
    for got, expected in zip(outputs_and_gradients(scores_of, attended, factors, heads), exact, strict=True):
        assert got.dtype == dtype
        terms = 1 if dtype == torch.bfloat16 else 24
        assert relative_error(got, expected) < allowed_error(operations=10, terms=terms, dtype=dtype)


def test_under_autocast_gradients_are_those_of_the_plain_product_too():
    torch.manual_seed(0)
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
        error = relative_error(got, expected.double())
        assert error < 2 * allowed_error(operations=3, terms=1, dtype=torch.bfloat16)  # of both, at most


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
