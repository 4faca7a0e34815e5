"""The recipe's losses: class tree from a file, ramp of the diagonality loss."""

from pathlib import Path

import pytest
import torch

from data_pipeline.transforms import MixingConfig
from pretrain.class_tree import read_ancestors
from pretrain.losses import Classification, diagonality_weight
from pretrain.outcome import UserError
from pretrain.recipe import LossSection

IDS = ["n01", "n02", "n03", "n04"]  # furniture, chair, armchair, dog
TREE = "n00 n01\nn01 n09\nn09 n02\nn02 n03\nn05 n02\n\nn00 n08\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    file = tmp_path / "wordnet.is_a.txt"
    file.write_text(TREE)
    return file


def test_ids_that_are_no_classes_are_passed_through_and_the_first_parent_counts(tree: Path) -> None:
    assert read_ancestors(tree, IDS) == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [3, -1, -1]]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("n01 n02\nn02 n01\n", "is its own ancestor"),
        ("n01 n02 n03\n", r"line 1: must be PARENT CHILD, got 'n01 n02 n03'"),
        ("m1 m2\n", r"names none of the dataset's classes \(n01, n02, n03, \.\.\.\)"),
        (None, "cannot be read"),
    ],
)
def test_a_tree_that_cannot_be_used_is_told_in_one_line(content: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "tree.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=told):
        read_ancestors(file, IDS)


def test_semantic_softmax_smooths_by_itself(tree: Path) -> None:
    section = LossSection(classification="semantic_softmax", class_tree=tree)
    loss = Classification(section, MixingConfig(mixup=0.8, label_smoothing=0.2), IDS, torch.device("cpu"))
    assert (loss.name, loss.mixing.label_smoothing, loss.mixing.mixup) == ("semantic_softmax", 0.0, 0.8)
    assert loss.levels is not None
    assert loss.levels.tolist() == [0, 1, 2, 0]
    certain = torch.eye(4)
    assert loss(100 * certain, certain) > 1, "nothing was smoothed"


def test_the_diagonality_weight_grows_within_its_ramp() -> None:
    section = LossSection(diagonality_weight=0.4, diagonality_ramp_epochs=2)
    assert [diagonality_weight(section, epoch=epoch) for epoch in (0, 0.5, 2, 9)] == [0, 0.1, 0.4, 0.4]
    assert diagonality_weight(LossSection(diagonality_weight=0.4), epoch=0) == 0.4
