"""Model, optimizer and DeepSpeed engine, as recipe and DeepSpeed's configuration say."""

import logging
from typing import Any

import torch

from models import LaViT, create_model
from pretrain.deepspeed_config import ResolvedDeepSpeed
from pretrain.optimizers import build_optimizer, peak_learning_rate
from pretrain.outcome import UserError
from pretrain.recipe import Recipe


def build_model(recipe: Recipe, num_classes: int) -> LaViT:
    """The recipe's network with weights drawn from its seed: equal on every rank.

    Raises:
        UserError: the variant does not exist, or a field of it makes no sense.
    """
    torch.manual_seed(recipe.seed)
    try:
        model = create_model(
            recipe.model.name, num_classes=num_classes, image_size=recipe.data.size, **recipe.model.overrides
        )
        model.set_activation_checkpointing(recipe.model.activation_checkpointing)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model: {error}") from None
    return model


def build_engine(
    model: LaViT, recipe: Recipe, resolved: ResolvedDeepSpeed, device: torch.device
) -> tuple[Any, list[str]]:
    """Wrap the model by ``deepspeed.initialize``; the process group must exist.

    Returns:
        ``deepspeed.DeepSpeedEngine``, which takes what ``LaViT.forward`` takes; and lines about what was chosen.

    Raises:
        UserError: DeepSpeed refuses the configuration for a reason that was not foreseen.
    """
    import deepspeed  # noqa: PLC0415 - slow to import, and reads the environment that distributed.py sets

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    model.to(device)
    section = recipe.optimizer
    optimizer, notes = build_optimizer(model, section, no_decay=model.no_weight_decay(), layers=model.layer_groups())
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=resolved.config, dist_init_required=False
        )
    except (AssertionError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"DeepSpeed refuses its configuration: {reason}") from error
    if resolved.stage == 0:
        _clip_without_waiting(engine)
    return engine, [peak_learning_rate(section, resolved.batch.global_batch)[1], *notes]


def _clip_without_waiting(engine: Any) -> None:
    """Clip at stage 0 by torch's multi-tensor function.

    DeepSpeed's own goes parameter by parameter, adds up the norm over ranks that have the same one, and waits for the
    device to learn whether to clip. This also gives the norm to the metrics, which DeepSpeed's does not.
    """
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]

    def clip() -> None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, engine.gradient_clipping(), foreach=True)
        engine._global_grad_norm = norm  # noqa: SLF001

    engine.clip_fp32_gradients = clip
