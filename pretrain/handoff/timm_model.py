"""A hand-off as one of timm's models."""

from pathlib import Path
from typing import Any

from torch import nn

from pretrain.handoff.folder import load_handoff
from pretrain.outcome import UserError


def create_timm_model(handoff: Path | str, **arguments: Any) -> nn.Module:
    """Build timm's model of a hand-off, with its weights.

    `timm.data.resolve_model_data_config` then gives the hand-off's size, mean, std, interpolation and crop.

    Args:
        handoff: a folder or a name of the Hugging Face Hub, as `load_handoff` takes it.
        **arguments: those of `timm.create_model`: another `num_classes` starts a fresh classifier, another `img_size`
            resamples, `features_only=True` gives the four maps, `drop_path_rate` and so on.

    Raises:
        UserError: no hand-off, or timm is missing.
        ValueError: an argument that makes no sense.
    """
    try:
        import timm  # noqa: PLC0415 - an optional extra

        import models.timm_registration  # noqa: F401, PLC0415
    except ImportError as error:
        raise UserError(
            f"timm cannot be imported ({error}): pip install timm and a torchvision that fits torch"
        ) from None
    net, config = load_handoff(handoff)
    fields = net.config.to_dict()
    name, classes, channels = fields.pop("name"), fields.pop("num_classes"), fields.pop("in_channels")
    size = tuple(fields.pop("image_size"))
    del fields["drop_path"]  # belongs to the training that comes
    overlay = {
        "state_dict": net.state_dict(),
        "num_classes": classes,
        "input_size": (channels, *size),
        "mean": config.input.mean,
        "std": config.input.std,
        "interpolation": config.input.interpolation,
        "crop_pct": config.input.eval_crop_ratio,
        "label_names": tuple(config.class_names),
    }
    arguments = {"num_classes": classes, "in_chans": channels, "img_size": size} | fields | arguments
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    model.pretrained_cfg.pop("state_dict")  # the weights are in the model now
    return model
