"""Training with compiled kernels: too slow for the quick suite."""

import pytest
import torch.distributed as dist

from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_engine import compiling
from tests.pretrain.test_equality import assert_equal, recipe, trained, zero

pytestmark = pytest.mark.slow


def compiled_equals_eager(control: dist.ProcessGroup) -> None:
    options = {"accumulation": 2, "zero_optimization": zero(1)}
    mine, plain = (trained(chosen, **options) for chosen in (compiling("all"), recipe("all")))
    assert mine[1].keys() == plain[1].keys(), "compiling renamed parameters"
    assert_equal("compiled", mine, plain, loss=5e-6, weights=1e-4)


@pytest.mark.timeout(600)
def test_training_with_compiled_kernels_equals_eager_training() -> None:
    run_ranks(1, compiled_equals_eager)
