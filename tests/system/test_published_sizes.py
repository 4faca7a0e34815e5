"""Networks of the published sizes, and compiled kernels: too slow for the quick suite."""

from pathlib import Path
from typing import Any

import onnx
import pytest

from pretrain.convert import TOLERANCE, convert
from pretrain.handoff.folder import load_handoff
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_convert import hand_off, largest_difference, run_onnx
from tests.pretrain.test_engine import compiled_equals_eager

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "options"), [("lavit_tiny", {"pool": "mean"}), ("lavit_small", {}), ("lavit_base", {})]
)
def test_an_onnx_file_of_each_published_size_gives_torchs_logits(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder, out = hand_off(tmp_path / "h", name, **options), tmp_path / "model.onnx"
    done = convert(folder, out)
    model, _ = load_handoff(folder)
    assert "(batch, 3, 224, 224) to (batch, 3); logits of 10 images" in done
    assert largest_difference(model, run_onnx(out), (224, 224)) <= TOLERANCE
    onnx.checker.check_model(out, full_check=True)


@pytest.mark.timeout(600)
def test_training_with_compiled_kernels_equals_eager_training() -> None:
    run_ranks(1, compiled_equals_eager, "inductor")
