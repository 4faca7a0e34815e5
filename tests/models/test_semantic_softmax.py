"""Semantic softmax equals a naive loop over images, labels and levels."""

import math

import pytest
import torch
import torch.nn.functional as F

from models import SemanticSoftmax, within_level
from tests.rounding import allowed_error, relative_error

# furniture(0) > chair(1) > armchair(2); furniture > table(3); animal(4) > dog(5); stone(6) stands alone
PARENTS = {1: 0, 2: 1, 3: 0, 5: 4}
CLASSES = 7


def chain(label: int) -> list[int]:
    nodes = [label]
    while nodes[-1] in PARENTS:
        nodes.append(PARENTS[nodes[-1]])
    return nodes[::-1]


ANCESTORS = [chain(label) + [-1] * (3 - len(chain(label))) for label in range(CLASSES)]


def naive(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> float:
    """Image by image, label by label, in float64."""
    total = 0.0
    for level in range(3):
        at_level = [c for c in range(CLASSES) if len(chain(c)) == level + 1]
        share = sum(len(chain(c)) > level for c in range(CLASSES)) / CLASSES
        loss = 0.0
        for scores, target in zip(logits.tolist(), targets.tolist(), strict=True):
            normaliser = math.log(sum(math.exp(scores[c]) for c in at_level))
            for label, mass in enumerate(target):
                if len(chain(label)) > level:
                    for c in at_level:
                        hit = (1 - smoothing) * (chain(label)[level] == c) + smoothing / len(at_level)
                        loss -= mass * hit * (scores[c] - normaliser)
        total += loss / len(logits) / share
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_it_equals_the_naive_loop_for_mixed_labels(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, CLASSES, generator=generator)
    targets = torch.rand(20, CLASSES, generator=generator).pow(4)
    targets /= targets.sum(1, keepdim=True)
    loss = SemanticSoftmax(ANCESTORS, smoothing)(logits, targets)
    exact = torch.tensor(naive(logits, targets, smoothing), dtype=torch.float64)
    # Three levels of six operations; the longest sum is over the 20 images. No term of the loss is negative.
    assert relative_error(loss, exact) < allowed_error(operations=18, terms=20)


def test_with_a_single_level_it_is_cross_entropy() -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 5
    loss = SemanticSoftmax([[c] for c in range(5)], 0.1)(logits, F.one_hot(labels, 5))
    exact = F.cross_entropy(logits.double(), labels, label_smoothing=0.1)
    assert relative_error(loss, exact) < allowed_error(operations=6, terms=8)


def test_bfloat16_logits_are_computed_with_in_float32() -> None:
    logits = torch.randn(16, CLASSES, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = F.one_hot(torch.arange(16) % CLASSES, CLASSES)
    loss = SemanticSoftmax(ANCESTORS, 0.2)
    assert loss(logits, targets).dtype == torch.float32
    assert torch.equal(loss(logits, targets), loss(logits.float(), targets)), "something was computed in bfloat16"


def test_evaluation_compares_a_label_with_its_own_level() -> None:
    levels = SemanticSoftmax(ANCESTORS).levels
    assert levels.tolist() == [0, 1, 2, 1, 0, 1, 0]
    logits = torch.tensor([[9.0, 1, 8, 2, 7, 3, 6]])
    restricted = within_level(logits, torch.tensor([3]), levels)
    assert restricted.argmax().item() == 5
    assert restricted.isfinite().tolist() == [[False, True, False, True, False, True, False]]


@pytest.mark.parametrize("table", [[[0, 1], [0, 1], [7, -1]], [[-1], [1]], [[1], [0]], [], [[0, -1], [-1, 1]]], ids=str)
def test_a_table_that_is_no_hierarchy_is_refused(table: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="ancestors: "):
        SemanticSoftmax(table)
