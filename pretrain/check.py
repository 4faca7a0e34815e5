"""Checks and counts that a recipe allows before anything is started, on a machine without GPUs."""

from dataclasses import dataclass
from typing import Any

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from models import model_config
from models.config import LaViTConfig
from models.cost import count_parameters
from pretrain.checkpoints.checkpoint import list_checkpoints
from pretrain.class_tree import read_ancestors
from pretrain.engine.deepspeed_config import ResolvedDeepSpeed, resolve_deepspeed_config
from pretrain.engine.optimizers import peak_learning_rate
from pretrain.evaluation.probes import open_probe_sets
from pretrain.factory import FactoryConfig
from pretrain.handoff.folder import read_handoff
from pretrain.handoff.initialize import check_architecture
from pretrain.outcome import UserError, exit_code
from pretrain.recipe import Recipe
from pretrain.run_folder import RunFolder

COPIES = {"adamw": 3, "lamb": 3, "sgd": 2}
"""Copies of a parameter in a checkpoint, in fp32: the weight and the optimizer's moments; an average is one more."""


@dataclass(frozen=True)
class RunSize:
    """Size of a run."""

    parameters: int
    classes: int
    train_samples: int
    val_samples: int
    checkpoint_bytes: int


def check_recipe_here(recipe: Recipe, run: RunFolder) -> RunSize:
    """Open the data and the hand-off of the initial weights, and count the model's parameters.

    The hand-off is not read where ``run`` has a checkpoint.

    Raises:
        UserError: data, model, class tree or hand-off cannot be used as the recipe asks; in one line.
    """
    try:
        train_set = Dataset.open(recipe.data.path, recipe.data.train_split, recipe.data.cache)
        val_set = Dataset.open(recipe.data.path, recipe.data.val_split, recipe.data.cache)
        if recipe.probes is not None:
            open_probe_sets(recipe.probes)
    except DataError as error:
        raise UserError(str(error), exit_code(error)) from None
    if recipe.loss.class_tree is not None:
        read_ancestors(recipe.loss.class_tree, train_set.class_ids)
    network = architecture(recipe, train_set.num_classes)
    if isinstance(network, FactoryConfig):
        parameters = network.parameters
    else:
        parameters = count_parameters(network)
        if recipe.initialize_from is not None and not list_checkpoints(run.checkpoints):
            check_architecture(recipe.initialize_from, read_handoff(recipe.initialize_from.handoff)[0], network)
    size = checkpoint_bytes(recipe, parameters)
    return RunSize(parameters, train_set.num_classes, len(train_set), len(val_set), size)


def resolve_for(
    recipe: Recipe,
    config: dict[str, Any],
    *,
    world_size: int,
    has_gpu: bool,
    has_bf16_gpu: bool,
) -> ResolvedDeepSpeed:
    """``resolve_deepspeed_config`` with what it needs to know of a recipe.

    Raises:
        UserError: the recipe, the configuration and the ranks do not go together.
    """
    resolved = resolve_deepspeed_config(
        config,
        world_size=world_size,
        has_gpu=has_gpu,
        has_bf16_gpu=has_bf16_gpu,
        pairs=recipe.mixing.in_pairs,
        optimizer=recipe.optimizer.kind,
    )
    peak, lowest = peak_learning_rate(recipe.optimizer, resolved.batch.global_batch)[0], recipe.schedule.min_lr
    if lowest > peak:
        raise UserError(f"schedule.min_lr ({lowest:g}) is above the peak learning rate ({peak:g}): lower it")
    return resolved


def architecture(recipe: Recipe, num_classes: int) -> LaViTConfig | FactoryConfig:
    """Configuration of the recipe's network.

    Raises:
        UserError: the variant does not exist, or a field of it makes no sense.
    """
    model = recipe.model
    if model.factory is not None:
        return FactoryConfig(model.factory, model.arguments, num_classes, recipe.data.size)
    try:
        return model_config(model.title, num_classes=num_classes, image_size=recipe.data.size, **model.overrides)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model: {' '.join(str(error).split())}") from None


def checkpoint_bytes(recipe: Recipe, parameters: int) -> int:
    """Bytes of all ranks' files, without their index of names and shapes, which is some kilobytes."""
    return 4 * parameters * (COPIES[recipe.optimizer.kind] + (recipe.ema is not None))
