"""Networks of timm through the pipeline: ten steps, stopped and resumed exactly, handed off, evaluated, as ONNX.

They need timm and all that training needs in one environment.
"""

from pathlib import Path

import pytest
import torch

from pretrain import convert, evaluate
from pretrain.handoff.folder import load_handoff
from pretrain.metrics import read_metrics
from pretrain.outcome import ExitCode
from tests.data_pipeline.datasets import build_into
from tests.data_pipeline.images import class_folders
from tests.system.launching import changes, launched

pytestmark = [pytest.mark.slow, pytest.mark.timm, pytest.mark.timeout(1800)]
INJECT = "tests/system/inject.py"
SIDE = 64
SIZED = f"img_size: {SIDE}, "
"""Of those whose parameters depend on the image size."""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    return build_into(class_folders(folder / "images", 17), folder / "shards", "--val-fraction", "0.2")


@pytest.mark.parametrize(
    ("name", "arguments", "policy"),
    [
        ("pvt_v2_b2", "", "none"),
        ("swin_tiny_patch4_window7_224", SIZED, "none"),
        ("deit_small_patch16_224", SIZED, "all"),
        ("convnext_tiny", "", "all"),
        ("resnet50", "", "none"),
    ],
)
def test_ten_steps_stopped_and_resumed_are_ten_steps_and_their_hand_off_is_the_network(
    name: str, arguments: str, policy: str, photographs: Path, tmp_path: Path
) -> None:
    model = f"{{model_name: {name}, {arguments}drop_path_rate: 0.2}}"
    fields = changes(
        data__path=photographs, data__image_size=SIDE, evaluation__batch_size=10, log_every_steps=1,
        model=f"{{factory: 'timm:create_model', arguments: {model}, activation_checkpointing: {policy}}}",
        schedule__epochs=1, schedule__warmup_epochs=0.5, optimizer__layer_decay=0.9,
        deepspeed__train_batch_size=4, probes=f"{{path: {photographs}, every_epochs: 1}}",
    )  # fmt: skip
    losses = {}
    for case in ("straight", "stopped"):
        folder = tmp_path / case
        if case == "stopped":
            with launched(folder, *fields, ranks=0, program=(INJECT, "hold=6")) as run:
                run.wait_for_steps(folder / "demo", 5)
                run.process.terminate()
                assert run.end() == ExitCode.STOPPED, run.output()
        with launched(folder, *fields, ranks=0) as run:
            assert run.end(900) == ExitCode.FINISHED, run.output()
        losses[case] = [row["loss"] for row in read_metrics(folder / "demo/metrics.jsonl", "train")]
    assert losses["stopped"] == losses["straight"]
    assert len(losses["straight"]) == 10
    handoffs = [tmp_path / case / "demo/handoff" for case in losses]
    first, second = (load_handoff(handoff, trust_factory=True)[0] for handoff in handoffs)
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.equal(first(images), second(images))
    command = [str(handoffs[0]), "--data", str(photographs), "--trust-factory"]
    assert evaluate.main(command) == ExitCode.FINISHED
    for file in ("net.onnx", "net.pt2"):
        assert convert.main([str(handoffs[0]), str(tmp_path / file), "--trust-factory"]) == ExitCode.FINISHED
