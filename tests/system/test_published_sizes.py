"""A network of a published size, and compiled kernels: too slow for the quick suite."""

from pathlib import Path

import onnx
import pytest
import torch.distributed as dist

from pretrain.convert import TOLERANCE, convert
from pretrain.handoff.folder import load_handoff
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_convert import hand_off, largest_difference, run_onnx
from tests.pretrain.test_engine import compiling
from tests.pretrain.test_equality import assert_equal, recipe, trained, zero

pytestmark = pytest.mark.slow


def test_an_onnx_file_of_a_published_size_gives_torchs_logits(tmp_path: Path) -> None:
    """The smallest: the others differ in depths and widths only, and `convert` itself compares before it publishes."""
    folder, out = hand_off(tmp_path / "h", "lavit_tiny", pool="mean"), tmp_path / "model.onnx"
    done = convert(folder, out)
    model, _ = load_handoff(folder)
    assert "(batch, 3, 224, 224) to (batch, 3); logits of 8 images" in done
    assert largest_difference(model, run_onnx(out), (224, 224)) <= TOLERANCE
    onnx.checker.check_model(out, full_check=True)


def compiled_equals_eager(control: dist.ProcessGroup) -> None:
    options = {"accumulation": 2, "zero_optimization": zero(1)}
    mine, plain = (trained(chosen, **options) for chosen in (compiling("all"), recipe("all")))
    assert mine[1].keys() == plain[1].keys(), "compiling renamed parameters"
    assert_equal("compiled", mine, plain, loss=5e-6, weights=1e-4)


@pytest.mark.timeout(600)
def test_training_with_compiled_kernels_equals_eager_training() -> None:
    run_ranks(1, compiled_equals_eager)
