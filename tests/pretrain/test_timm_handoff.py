"""A hand-off as one of timm's models: the same numbers, and timm's data configuration has its input."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models import create_model
from pretrain.handoff.folder import load_handoff
from pretrain.handoff.timm_model import create_timm_model
from pretrain.outcome import UserError
from tests.pages import snippets
from tests.pretrain.handoffs import hand_off


def written(folder: Path, name: str, *, classes: int, size: int, **overrides: Any) -> Path:
    torch.manual_seed(0)
    model = create_model(name, num_classes=classes, image_size=size, **overrides)
    data = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1], "eval_crop_ratio": 1.0}
    return hand_off(folder, model, input=data | {"interpolation": "bilinear"})


@pytest.mark.timm
def test_the_same_logits_and_the_hand_offs_own_input_or_another(tmp_path: Path) -> None:
    from timm.data import resolve_model_data_config

    handoff = written(tmp_path / "h", "lavit_micro", classes=2, size=64, depths=(1, 2, 1, 1), drop_path=0.1)
    (net, _), model, images = load_handoff(handoff), create_timm_model(handoff).eval(), torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), net(images))
    found = resolve_model_data_config(model)
    assert (found["input_size"], found["interpolation"], found["crop_pct"]) == ((3, 64, 64), "bilinear", 1.0)
    assert (found["mean"], found["std"]) == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    assert model.pretrained_cfg["label_names"] == ("a", "b")
    assert "state_dict" not in model.pretrained_cfg
    images = torch.randn(1, 3, 32, 96)
    maps = create_timm_model(handoff, features_only=True, img_size=(32, 96)).eval()(images)
    for ours, theirs in zip(net.forward_features(images), maps, strict=True):
        torch.testing.assert_close(theirs, ours)
    assert create_timm_model(handoff, num_classes=5, drop_path_rate=0.2)(images).shape == (1, 5)


@pytest.mark.timm
def test_the_snippets_of_timm_and_torchvision_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [block for page, block in snippets("python") if "timm" in block or "torchvision" in block]
    assert len(shown) == 3
    written(tmp_path / "runs/demo/handoff", "lavit_micro", classes=10, size=32)
    written(tmp_path / "runs/NAME/handoff", "lavit_small", classes=1000, size=224)
    monkeypatch.chdir(tmp_path)
    for content in shown:
        found: dict[str, Any] = {}
        exec(content, found)
    assert len(found["losses"]) == 4
    sum(found["losses"].values()).backward()
    assert found["net"].stages[0].embed.conv.weight.grad.abs().sum() > 0


def test_without_timm_the_error_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm and a torchvision that fits torch"):
        create_timm_model(tmp_path)
