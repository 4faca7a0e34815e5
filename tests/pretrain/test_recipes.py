"""Every recipe for ImageNet can be started: it loads, its network is built, its batch divided, its schedule adds up."""

import re
from pathlib import Path

import pytest
import torch

from models import create_model
from models.cost import count_macs, count_parameters
from pretrain.engine.deepspeed_config import read_deepspeed_config, resolve_for
from pretrain.engine.optimizers import parameter_groups, peak_learning_rate
from pretrain.engine.schedule import Schedule
from pretrain.recipe import load_recipe

ROOT = Path(__file__).parents[2]
TIMM = "in1k_timm_example"
FOR_A_CPU = {"demo", "template", "fashion_mnist_lavit"}
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml") if path.stem not in {*FOR_A_CPU, TIMM})
CLASSES_AND_IMAGES = {
    "data/imagenet-1k": (1_000, 1_281_167),
    "data/imagenet-21k": (21_841, 14_197_122),
    "data/imagenet-21k-p": (10_450, 11_060_223),
}


@pytest.mark.parametrize("name", sorted(FOR_A_CPU))
def test_a_recipe_for_a_cpu_loads_and_its_head_has_the_command(name: str) -> None:
    path = ROOT / f"recipes/{name}.yaml"
    assert load_recipe(path).name == {"template": "mine"}.get(name, name)
    command = f"pretrain/main.py --recipe recipes/{'mine' if name == 'template' else name}.yaml"
    assert command in path.read_text().partition("\nname:")[0]


def test_there_is_one_for_each_size_and_purpose() -> None:
    sizes = ("tiny", "small", "base", "large")
    wanted = {f"in1k_lavit_{size}" for size in sizes[:3]} | {f"in21k_lavit_{size}" for size in sizes}
    wanted |= {f"in1k_finetune_lavit_{size}{px}" for size in sizes for px in ("", "_384")} | {"in21kp_lavit_small"}
    assert set(RECIPES) == wanted


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_can_be_started(name: str) -> None:
    path = ROOT / f"recipes/{name}.yaml"
    recipe = load_recipe(path)
    assert recipe.name == name
    assert recipe.model.compile
    classes, images = CLASSES_AND_IMAGES[str(recipe.data.path)]
    with torch.device("meta"):
        model = create_model(recipe.model.name, classes, recipe.data.size, **recipe.model.overrides)
    model.set_activation_checkpointing(recipe.model.activation_checkpointing)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(model.config)
    groups = parameter_groups(model, recipe.optimizer, no_decay=model.no_weight_decay(), layers=model.layer_groups())
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))

    config = read_deepspeed_config(ROOT / "ds_config.json", recipe.deepspeed)
    for ranks in (8, 32, 64):
        resolved = resolve_for(recipe, config, world_size=ranks, has_gpu=True, has_bf16_gpu=True)
        batch = resolved.batch
        assert batch.global_batch == ranks * batch.micro_batch * batch.accumulation
        assert (resolved.precision, resolved.stage) == ("bf16", 1)

    schedule, total = recipe.schedule, resolved.batch.global_batch
    steps = Schedule(recipe, images, total).total_steps
    assert steps * total <= schedule.epochs * images < (steps + 1) * total
    peak = peak_learning_rate(recipe.optimizer, total)[0]
    assert schedule.min_lr < peak

    head = re.sub(r"\n#\s+", " ", path.read_text().split("\nname:")[0])
    assert f"{steps:,} steps" in head, "the head states other steps than there are"
    assert f"{count_macs(model.config) / 1e9:.2f} GMACs" in head, "the head states other costs"
    assert f"the batch of {total:,}" in head
    assert "not measured on a GPU" in head
    assert f"python -m slurm.launch --recipe recipes/{name}.yaml" in head


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if load_recipe(ROOT / f"recipes/{name}.yaml").initialize_from]
)
def test_a_recipe_begins_with_the_handoff_of_another_one_for_the_same_network(name: str) -> None:
    recipe = load_recipe(ROOT / f"recipes/{name}.yaml")
    assert recipe.initialize_from is not None
    run, handoff = recipe.initialize_from.handoff.removeprefix("runs/").split("/")
    assert handoff == "handoff"
    source = load_recipe(ROOT / f"recipes/{run}.yaml")
    assert source.model.name == recipe.model.name
    assert {**source.model.overrides, "drop_path": 0} == {**recipe.model.overrides, "drop_path": 0}
    assert (source.data.mean, source.data.std) == (recipe.data.mean, recipe.data.std)


def test_the_example_with_a_network_of_timm_can_be_started_and_its_head_is_true() -> None:
    path = ROOT / f"recipes/{TIMM}.yaml"
    recipe = load_recipe(path)
    assert (recipe.name, recipe.model.factory) == (TIMM, "timm:create_model")
    config = read_deepspeed_config(ROOT / "ds_config.json", recipe.deepspeed)
    resolved = resolve_for(recipe, config, world_size=8, has_gpu=True, has_bf16_gpu=True)
    assert resolved.precision == "bf16 autocast", "its running statistics are to stay in fp32"
    steps = Schedule(recipe, 1_281_167, 1024).total_steps
    head = re.sub(r"\n#\s+", " ", path.read_text().split("\nname:")[0])
    for fact in (f"{steps:,} steps", f"their {1024 * steps:,} images", "not run", f"--recipe recipes/{TIMM}.yaml"):
        assert fact in head
