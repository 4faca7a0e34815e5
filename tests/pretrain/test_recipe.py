from pathlib import Path
from typing import Any

import pytest

from pretrain.fields import describe_fields
from pretrain.outcome import UserError
from pretrain.recipe import load_recipe, recipe_differences
from pretrain.run_folder import RunFolder

DEMO = Path(__file__).parents[2] / "recipes/demo.yaml"


def refusal(*assignments: str, path: Path = DEMO) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, list(assignments))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_set_changes_fields_and_reads_values_as_yaml() -> None:
    recipe = load_recipe(DEMO, ["optimizer.lr=1e-3", "name=other", "data.augment.affine=null"])
    assert (recipe.optimizer.lr, recipe.name, recipe.data.augment.affine) == (1e-3, "other", None)


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["optimizer.learning_rate=1"], "unknown key optimizer.learning_rate"),
        (["optimizer.weight_decai=1"], "did you mean optimizer.weight_decay?"),
        (["shedule.epochs=1"], "did you mean schedule?"),
        (["data.augment.affine.degree=1"], "did you mean data.augment.affine.degrees?"),
        (["optimizer.lr=-1"], "optimizer.lr"),
        (["name=../elsewhere"], "name"),
        (["optimizer.kind=adam"], "optimizer.kind"),
        (["optimizer.kind=sgd", "optimizer.eps=1.0e-3"], "eps is not read by sgd"),
        (["optimizer.momentum=0.5"], "momentum is not read by adamw"),
        (["optimizer.kind=lamb", "optimizer.weight_decay=0"], "use kind adamw"),
        (["optimizer.layer_decay=1.1"], "optimizer.layer_decay"),
        (["optimizer.lr"], "key=value"),
    ],
)
def test_an_assignment_that_cannot_be_made_is_refused(assignments: list[str], says: str) -> None:
    assert says in refusal(*assignments)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    text = refusal("optimizer.lr=fast", "schedule.epochs=0")
    assert "optimizer.lr" in text
    assert "schedule.epochs" in text


def test_a_missing_recipe_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    assert "a.yaml" in refusal(path=tmp_path / "b.yaml")


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "a: [1\n", "name: x\n", "\x00"])
def test_what_is_not_a_recipe_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    assert str(path) in refusal(path=path)


def test_a_resume_may_change_how_it_runs_but_not_what_it_computes() -> None:
    old = load_recipe(DEMO).model_dump(mode="json")
    allowed = load_recipe(DEMO, ["log_every_steps=1", "checkpoint.keep=5", "data.threads=4", "data.path=elsewhere",
                                 "data.device_memory_padding=0", "data.preallocate_hint=[375, 500]"])  # fmt: skip
    assert recipe_differences(old, allowed.model_dump(mode="json")) == []
    removed = load_recipe(DEMO, ["model.overrides.attention_kernel=triton"])
    assert recipe_differences(removed.model_dump(mode="json"), old) == []
    changed = load_recipe(DEMO, ["optimizer.lr=1e-4", "data.augment.affine.degrees=3", "seed=1"])
    lines = recipe_differences(old, changed.model_dump(mode="json"))
    assert [line.split(":")[0] for line in lines] == ["data.augment.affine.degrees", "optimizer.lr", "seed"]


@pytest.mark.parametrize("batch", [{}, {"train_batch_size": "auto"}, {"train_batch_size": None}])
def test_a_resume_without_its_global_batch_is_told_which_it_is(tmp_path: Path, batch: dict[str, Any]) -> None:
    folder, recipe, clipping = RunFolder(tmp_path), load_recipe(DEMO), {"gradient_clipping": 1.0}
    folder.write_description(recipe, {"train_batch_size": 64, **clipping}, {})
    folder.check_recipe(recipe, {"train_batch_size": 64, **clipping})
    told = rf"^train_batch_size must be given as a number, got {batch.get('train_batch_size')!r}: {tmp_path} .* 64$"
    with pytest.raises(UserError, match=told):
        folder.check_recipe(recipe, batch | clipping)
    with pytest.raises(UserError, match=r"another recipe \(train_batch_size: 64 -> 32\)"):
        folder.check_recipe(recipe, {"train_batch_size": 32, **clipping})


@pytest.mark.parametrize("content", ["[1]", "null", "{"])
def test_a_damaged_configuration_of_a_run_is_told_in_one_line(tmp_path: Path, content: str) -> None:
    folder, recipe = RunFolder(tmp_path), load_recipe(DEMO)
    folder.write_description(recipe, {"train_batch_size": 64}, {})
    (tmp_path / "ds_config.json").write_text(content)
    with pytest.raises(UserError, match=r"ds_config.json cannot be read \(.*\): put it back"):
        folder.check_recipe(recipe, {"train_batch_size": 64})


def test_every_field_explains_itself() -> None:
    lines = list(describe_fields())
    assert any(line.lstrip().startswith("optimizer.lr (required)") for line in lines)
    assert all(line.split("): ", 1)[1] for line in lines), "a field without a description"
