import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models import create_model
from pretrain.handoff import CONFIG, WEIGHTS, is_handoff, load_handoff, model_card, write_handoff
from pretrain.outcome import UserError
from tests.pretrain.damage import cut, flip_byte

INPUT = {"path": "data/x", "image_size": 32, "interpolation": "bilinear"}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("lavit_micro", num_classes=4, image_size=32).eval()


@pytest.fixture(scope="module")
def written(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("handoff") / "h"
    content = {
        "architecture": model.config.to_dict(), "num_classes": 4, "class_names": list("abcd"),
        "class_ids": ["n1", "n2", "n3", "n4"], "input": INPUT,
        "weights": "raw", "dataset": {"name": "x", "fingerprint": "f", "samples": 100},
        "recipe": {"name": "r", "data": {"val_split": "val", "image_size": 32, "mean": [0], "std": [1]}},
        "metrics": {"top1": 50.0, "top5": 100.0, "loss": 1.0}, "samples_seen": 1000,
    }  # fmt: skip
    write_handoff(folder, model.state_dict(), content, model_card(content, 40))
    return folder


def test_the_loaded_model_gives_the_same_outputs_bit_for_bit(written: Path, model: Any) -> None:
    loaded, config = load_handoff(written)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert config.class_names == list("abcd")
    assert config.class_ids == ["n1", "n2", "n3", "n4"]
    assert is_handoff(written)


def test_a_handoff_from_before_class_ids_were_kept_still_loads(written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "h"
    shutil.copytree(written, copy)
    config = json.loads((copy / CONFIG).read_text())
    del config["class_ids"]
    (copy / CONFIG).write_text(json.dumps(config))
    assert load_handoff(copy)[1].class_ids is None


def test_the_card_says_what_was_measured(written: Path) -> None:
    card = (written / "README.md").read_text()
    assert "50.00 %" in card
    assert "40 pictures" in card
    assert "10.0 epochs" in card


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_damaged_handoff_is_refused_in_one_line(written: Path, tmp_path: Path, file: str, damage: Any) -> None:
    copy = tmp_path / "h"
    shutil.copytree(written, copy)
    damage(copy / file)
    with pytest.raises(UserError, match=str(copy)) as caught:
        load_handoff(copy)
    assert "\n" not in str(caught.value)


def test_weights_that_were_tampered_with_are_refused(written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "h"
    shutil.copytree(written, copy)
    flip_byte(copy / WEIGHTS)
    with pytest.raises(UserError, match="other content than when it was handed off"):
        load_handoff(copy)


def test_a_config_of_another_architecture_is_refused(written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "h"
    shutil.copytree(written, copy)
    config = json.loads((copy / CONFIG).read_text())
    config["architecture"]["num_classes"] = 5
    (copy / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="do not fit"):
        load_handoff(copy)


def test_what_is_no_handoff_names_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"python -m pretrain\.export"):
        load_handoff(tmp_path)
