"""What of a recipe is checked before anything is started."""

from pathlib import Path

import pytest

from pretrain.check import check_recipe_here
from pretrain.outcome import UserError
from pretrain.recipe import Recipe, load_recipe
from pretrain.run_folder import RunFolder
from tests.system.launching import RECIPE

NEW = RunFolder(Path("runs/there-is-none"))


def demo(digits: Path, *assignments: str) -> Recipe:
    return load_recipe(RECIPE, [f"data.path={digits}", *assignments])


def test_it_counts_what_the_run_will_have(digits: Path) -> None:
    run_size = check_recipe_here(demo(digits), NEW)
    assert (run_size.train_samples, run_size.val_samples, run_size.classes) == (1437, 360, 10)
    assert run_size.parameters == 910_552
    assert run_size.checkpoint_bytes == 3 * 4 * run_size.parameters
    assert check_recipe_here(demo(digits, "ema.decay=0.9"), NEW).checkpoint_bytes == 4 * 4 * run_size.parameters


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("data.path=/no/such/data", "no/such/data"),
        ("model.name=lavit_micr", "model: .*lavit_micr"),
        ("model.overrides={depths: [1]}", "model: .*depths"),
        ("loss={classification: semantic_softmax, class_tree: /no/tree}", "loss.class_tree: /no/tree cannot be read"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(assignment: str, told: str, digits: Path) -> None:
    with pytest.raises(UserError, match=told) as error:
        check_recipe_here(demo(digits, assignment), NEW)
    assert "\n" not in str(error.value)
