"""Checks and counts that a recipe allows before anything is started, on a machine without GPUs."""

from dataclasses import dataclass

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from pretrain.checkpoints.checkpoint import list_checkpoints
from pretrain.class_tree import read_ancestors
from pretrain.evaluation.probes import open_probe_sets
from pretrain.factory import architecture, count_parameters
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
    if recipe.initialize_from is not None and not list_checkpoints(run.checkpoints):
        check_architecture(recipe.initialize_from, read_handoff(recipe.initialize_from.handoff)[0], network)
    parameters = count_parameters(network)
    size = checkpoint_bytes(recipe, parameters)
    return RunSize(parameters, train_set.num_classes, len(train_set), len(val_set), size)


def checkpoint_bytes(recipe: Recipe, parameters: int) -> int:
    """Bytes of all ranks' files, without their index of names and shapes, which is some kilobytes."""
    return 4 * parameters * (COPIES[recipe.optimizer.kind] + (recipe.ema is not None))
