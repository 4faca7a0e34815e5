"""The four maps of a hand-off feed real heads, at another picture size than the pretraining's."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples import detection, segmentation
from examples.backbone import load_backbone
from examples.training import Settings, train

EVALUATED = 60


def run(door, handoff: Path, out: Path, steps: int) -> dict:
    arguments = ["--handoff", str(handoff), "--steps", str(steps), "--evaluated", str(EVALUATED), "--out", str(out)]
    assert door.main(arguments) == 0
    (written,) = out.glob("*-0.json")
    assert Image.open(written.with_suffix(".png")).size[0] >= 2 * 96 * 3
    return json.loads(written.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)  # trains for a minute, or for many beside other work
def test_fine_tuned_features_segment_clearly_better_than_fixed_ones(
    handoff: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(segmentation, handoff, tmp_path, steps=200)
    tuned, frozen = result["fine_tuned"]["mean_iou"], result["frozen"]["mean_iou"]
    line = capsys.readouterr().out
    assert f"mean IoU {tuned:.1f} % fine-tuned" in line
    assert "pretrained at 32 x 32" in line
    assert "resampled to 64 x 96" in line
    assert tuned > frozen + 3
    assert tuned > 25


@pytest.mark.slow
@pytest.mark.timeout(900)  # trains for a minute, or for many beside other work
def test_detection_finds_what_an_untrained_head_does_not(
    handoff: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(detection, handoff, tmp_path, steps=160)
    assert f"AP50 {result['ap50']:.1f} %" in capsys.readouterr().out
    assert result["ap50_untrained"] < 2
    assert result["ap50"] > 8


def test_frozen_features_stay_as_they_are_and_fine_tuned_ones_move(handoff: Path) -> None:
    for frozen in (True, False):
        torch.manual_seed(0)
        backbone, _ = load_backbone(handoff, (64, 96), frozen=frozen)
        model = segmentation.SemanticFPN(backbone, 5)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        settings = Settings(handoff, (64, 96), steps=2, batch=2, lr=1e-3, evaluated=1, out=Path())
        train(model, settings, partial(segmentation.segmentation_loss, model))
        moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
        assert any(name.startswith("pyramid") for name in moved)
        assert any(name.startswith("backbone.net.stages") for name in moved) is not frozen
        assert not any(name.startswith(("backbone.net.head", "backbone.net.norm", "backbone.mean")) for name in moved)


@pytest.mark.parametrize("door", [segmentation, detection])
def test_what_is_no_hand_off_or_no_possible_size_is_one_line(
    door, handoff: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door.main(["--handoff", str(tmp_path / "none")]) == 2
    assert door.main(["--handoff", str(handoff), "--image-size", "50", "64"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "is not a finished hand-off" in first
    assert "multiple of 32" in second
