"""Initial weights of a run from another run's hand-off, fitted to other classes and another image size."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.dataset import Dataset
from models import LaViT, LaViTConfig, load_weights
from pretrain.checkpoints.checkpoint import list_checkpoints
from pretrain.handoff.folder import HandoffConfig, read_handoff
from pretrain.outcome import UserError
from pretrain.recipe import InitializeSection, Recipe
from pretrain.run_folder import RunFolder

MAY_DIFFER = ("name", "num_classes", "image_size", "drop_path", "norm")
"""Fields of the architecture that change no weight but the head's and those of a token grid."""


@dataclass(frozen=True)
class Beginning:
    """Initial weights of a run."""

    origin: dict[str, Any] | None
    """Hand-off that the run was initialized from, for its folder and its own hand-off; None: fresh weights."""
    initialized: bool
    """Whether the model was filled now, on this rank alone."""
    notes: tuple[str, ...] = ()


def begin(folder: RunFolder, model: LaViT, recipe: Recipe, train_set: Dataset) -> Beginning:
    """Fill a fresh model from the recipe's hand-off, if the run has no checkpoint yet. For one rank, under the lock.

    A run that has one reads no hand-off, which may have been removed.

    Raises:
        UserError: no hand-off, a damaged one, one of another network, or not the one that the run was started from.
    """
    section = recipe.initialize_from
    if section is None:
        return Beginning(None, initialized=False)
    has_checkpoint = bool(list_checkpoints(folder.checkpoints))
    started = has_checkpoint or (folder.path / "environment.json").exists()
    recorded = folder.read_origin() if started else None
    if has_checkpoint:
        if recorded is None:
            raise UserError(
                f"{folder.path} was not started from a hand-off: leave initialize_from out, or choose another name"
            )
        if Path(section.handoff).absolute() != Path(recorded["handoff"]).absolute():
            _check_same(section, read_handoff(section.handoff)[0], recorded)
        return Beginning(recorded, initialized=False)
    config, state = read_handoff(section.handoff)
    if recorded is not None:
        _check_same(section, config, recorded)
    check_architecture(section, config, model.config)
    notes = _fill(model, section, config, state, train_set)
    for name in ("mean", "std"):
        if (there := getattr(config.input, name)) != (here := getattr(recipe.data, name)):
            notes.append(f"WARNING initialized: the hand-off was trained with {name} {there}, this recipe has {here}")
    origin = {
        "handoff": section.handoff,
        "weights_blake2": config.weights_blake2,
        "weights": config.weights,
        "run": config.recipe["name"],
        "dataset": config.dataset,
        "samples_seen": config.samples_seen,
        "initialized_from": config.initialized_from,
    }
    return Beginning(origin, initialized=True, notes=tuple(notes))


def _fill(
    model: LaViT, section: InitializeSection, config: HandoffConfig, state: Mapping[str, torch.Tensor], data: Dataset
) -> list[str]:
    """Take over all weights but the head's rows of other classes; lines that report what was done."""
    rows, head = _head_rows(config, data)
    try:
        resampled = load_weights(model, state, fresh=["head."])
        for name in ("head.weight", "head.bias"):
            fresh = model.state_dict()[name].mul_(section.head_init_scale)
            for here, there in rows.items():
                fresh[here] = state[name][there]
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"initialize_from: {section.handoff} lacks weights that its config names: {reason}") from None
    if len(rows) < model.config.num_classes and section.head_init_scale != 1:
        head += f", their fresh weights times {section.head_init_scale:g}"
    run, dataset = config.recipe["name"], config.dataset["name"]
    what = f"{config.weights} weights of {run}, {config.samples_seen:,} images of {dataset}"
    lines = [f"initialized from {section.handoff}: {what}; digest {config.weights_blake2}", f"initialized: {head}"]
    if resampled:
        sizes = [" x ".join(map(str, size)) for size in (config.architecture["image_size"], model.config.image_size)]
        lines.append(f"initialized: {len(resampled)} tensors of the token grids resampled, {sizes[0]} -> {sizes[1]}")
    return lines


def share_weights(model: torch.nn.Module, device: torch.device) -> None:
    """Broadcast the weights of rank 0, before the engine partitions them. Collective.

    Only one rank reads the hand-off, and all have the same weights even if the folder changes meanwhile.
    """
    for tensor in model.state_dict().values():
        there = tensor.to(device)
        dist.broadcast(there, src=0)
        tensor.copy_(there)


def check_architecture(section: InitializeSection, config: HandoffConfig, wanted: LaViTConfig) -> None:
    """Refuse a hand-off whose weights are those of another network.

    Raises:
        UserError: names the fields that differ.
    """
    try:
        there, here = LaViTConfig.from_dict(config.architecture).to_dict(), wanted.to_dict()
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"initialize_from: {section.handoff}: {' '.join(str(error).split())}") from None
    differ = [
        f"{name} is {there[name]} there and {here[name]} here"
        for name in here
        if name not in MAY_DIFFER and there[name] != here[name]
    ]
    if differ:
        raise UserError(
            f"initialize_from: {section.handoff} is of another network, a {there['name']} ({'; '.join(differ)}): "
            "choose its model and overrides in the recipe, or another hand-off"
        )


def _head_rows(config: HandoffConfig, data: Dataset) -> tuple[dict[int, int], str]:
    """Find the rows of a hand-off's head that belong to the classes here, by their ids.

    Ids that are only the labels (as of shards indexed in place) do not identify a class; they are compared only where
    the data is the same to the last image.

    Returns:
        row here -> row there, and a line that reports it.
    """
    wanted, known = list(data.class_ids), config.class_ids
    counts = f"{len(wanted)} classes here, {config.num_classes} there"
    if known is None:
        return {}, f"a new head ({counts}; the hand-off has no class ids)"
    numbers = all(ids == [str(label) for label in range(len(ids))] for ids in (wanted, list(known)))
    if numbers and config.dataset["fingerprint"] != data.fingerprint:
        return {}, f"a new head ({counts}, whose ids are only numbers, which may mean other things elsewhere)"
    row_of = {class_id: row for row, class_id in enumerate(known)}
    rows = {row: row_of[class_id] for row, class_id in enumerate(wanted) if class_id in row_of}
    if not rows:
        return {}, f"a new head ({counts}, none in common)"
    if len(rows) == len(wanted):
        return rows, f"the head's rows of all {len(wanted)} classes are reused, of {config.num_classes} there"
    return rows, (
        f"the head's rows of {len(rows)} classes are reused, of {config.num_classes} there; "
        f"{len(wanted) - len(rows)} are new"
    )


def _check_same(section: InitializeSection, config: HandoffConfig, recorded: Mapping[str, Any]) -> None:
    if config.weights_blake2 != recorded["weights_blake2"]:
        raise UserError(
            f"initialize_from: {section.handoff} holds other weights ({config.weights_blake2}) than this run was "
            f"started from ({recorded['weights_blake2']} of {recorded['handoff']}): restore those, or choose another "
            "name with --set name=..."
        )
