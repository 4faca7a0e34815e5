"""The four maps of a hand-off feed a segmentation head, at another image size than the pretraining's."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from examples import segmentation
from examples.shapes import CLASSES, EVALUATED, draw, draw_many
from models import create_model
from tests.pretrain.handoffs import hand_off

SIDE, BATCH = 32, 32


def write_handoff(folder: Path, *, steps: int) -> Path:
    """Like the demo's, trained for less time: a small LaViT on scans of digits, 32 pixels a side."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = torch.tensor(scans.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    labels = torch.tensor(scans.target)
    torch.manual_seed(0)
    model = create_model("lavit_micro", num_classes=10, image_size=SIDE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(steps):
        drawn = torch.randint(len(images), (BATCH,))
        batch = F.interpolate(images[drawn], (SIDE, SIDE), mode="bilinear")
        optimizer.zero_grad()
        F.cross_entropy(model((batch - 0.5) / 0.5), labels[drawn]).backward()
        optimizer.step()
    return hand_off(folder, model, input={"mean": [0.5] * 3, "std": [0.5] * 3})


@pytest.fixture(scope="module")
def handoff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of fresh weights."""
    return write_handoff(tmp_path_factory.mktemp("h") / "handoff", steps=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fine_tuned_features_segment_clearly_better_than_frozen_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handoff = write_handoff(tmp_path / "handoff", steps=150)
    arguments = ["--handoff", str(handoff), "--steps", "200", "--evaluated", "60", "--out", str(tmp_path)]
    assert segmentation.main(arguments) == 0
    result = json.loads((tmp_path / "segmentation-0.json").read_text())
    assert Image.open(tmp_path / "segmentation-0.png").size[0] == 3 * 96 * 3
    tuned, frozen = result["fine_tuned"]["mean_iou"], result["frozen"]["mean_iou"]
    line = capsys.readouterr().out
    assert f"mean IoU {tuned:.1f} % fine-tuned" in line
    assert "pretrained at 32 x 32" in line
    assert "resampled to 64 x 96" in line
    assert tuned > frozen + 3
    assert tuned > 25


def test_frozen_features_stay_as_they_are_and_fine_tuned_ones_move(handoff: Path) -> None:
    options = argparse.Namespace(image_size=(64, 96), steps=2, batch=2, lr=1e-3)
    for frozen in (True, False):
        torch.manual_seed(0)
        backbone, _ = segmentation.load_backbone(handoff, (64, 96), frozen=frozen)
        model = segmentation.SemanticFPN(backbone, 5)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        segmentation.train(model, options)
        moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
        assert any(name.startswith("laterals") for name in moved)
        assert any(name.startswith("backbone.net.stages") for name in moved) is not frozen
        assert not any(name.startswith(("backbone.net.head", "backbone.net.norm", "backbone.mean")) for name in moved)


def test_mean_iou_is_100_for_the_truth_and_that_of_sets_of_pixels_otherwise() -> None:
    size, classes = (32, 32), len(CLASSES) + 1
    _, masks = draw_many(range(EVALUATED, EVALUATED + 30), size)
    wrong = masks.clone()
    wrong[:, :10] = 0
    for predicted in (masks, wrong):
        parts = iter(predicted.split(25))

        def answer(_: torch.Tensor, parts=parts) -> torch.Tensor:
            return F.one_hot(next(parts), classes).movedim(-1, 1)

        pairs = [(predicted == label, masks == label) for label in range(classes)]
        expected = [(a & b).sum().item() / (a | b).sum().item() for a, b in pairs]
        assert segmentation.evaluate(answer, size, 30) == pytest.approx(100 * sum(expected) / classes, rel=1e-5)


def test_an_image_is_a_function_of_its_seed() -> None:
    (images, masks), (again, _) = (draw_many(range(20), (64, 96)) for _ in range(2))
    assert torch.equal(images, again)
    for image, mask in zip(images, masks, strict=True):
        assert 0 <= image.min() < image.max() <= 1
        assert len(mask.unique()) > 1
    assert not torch.equal(draw(EVALUATED, (64, 96))[0], images[0])


def test_what_is_no_hand_off_or_no_possible_size_is_one_line(
    handoff: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segmentation.main(["--handoff", str(tmp_path / "none")]) == 2
    assert segmentation.main(["--handoff", str(handoff), "--image-size", "50", "64"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "is not a finished hand-off" in first
    assert "multiple of 32" in second
