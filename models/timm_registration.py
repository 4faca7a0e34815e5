"""``import models.timm_registration`` makes every LaViT one of timm's: ``timm.create_model("lavit_small", ...)``.

timm is an optional extra. It knows no published weights of these names; `pretrained=True` takes a file that
`pretrained_cfg_overlay` names, resampled to `img_size`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .config import LaViTConfig
from .lavit import LaViT
from .variants import list_models, model_config
from .weights import resample_weights

_POOLS = {"map": "class_attention", "avg": "mean"}
"""timm's names of pools to ours; timm calls attention pooling "map"."""


class TimmLaViT(LaViT):
    """A LaViT with timm's methods; parameters have the same names, so weights go both ways.

    `forward_features` is timm's here, the normed last map. The four maps come from `forward_intermediates`, and from
    `features_only=True`.
    """

    def __init__(self, config: LaViTConfig, drop_rate: float = 0.0) -> None:
        super().__init__(config)
        self.num_classes = config.num_classes
        self.in_chans = config.in_channels
        self.num_features = self.head_hidden_size = config.widths[-1]
        self.global_pool = "map" if self.pool is not None else "avg"
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = [
            {"num_chs": width, "reduction": config.patch_size * 2**stage, "module": f"stages.{stage}"}
            for stage, width in enumerate(config.widths)
        ]

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """(batch, in_chans, height, width) to logits (batch, num_classes), or features where there is no classifier."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """The last stage's map after the final norm, (batch, num_features, height / 32, width / 32)."""
        last = self._trunk(images, None, with_diagonality=False)[0][-1]
        return self.norm(last.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, last.shape[-2:])

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the map of `forward_features`, then classify unless `pre_logits`."""
        if not self.global_pool:
            return features
        tokens = features.flatten(2).transpose(1, 2)
        pooled = self.head_drop(tokens.mean(1) if self.pool is None else self.pool(tokens))
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(  # noqa: PLR0917 - timm's signature
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,  # noqa: ARG002 - `prune_intermediate_layers` spares the work
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of the wanted stages, before the final norm; without `intermediates_only` after the last, normed.

        Raises:
            ValueError: another format than NCHW, or `norm`: only the last stage has one.
        """
        if output_fmt != "NCHW" or norm:
            raise ValueError(f"LaViT gives intermediate maps as NCHW and without norm, got {output_fmt}, norm={norm}")
        maps = self._trunk(images, None, with_diagonality=False)[0]
        taken = [maps[index] for index in feature_take_indices(len(maps), indices)[0]]
        if intermediates_only:
            return taken
        return self.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2), taken

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the wanted maps do not need; returns the indices, counted from the front."""
        taken, last = feature_take_indices(len(self.stages), indices)
        pruned = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        if prune_norm or pruned:
            self.norm = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return list(taken)

    def get_classifier(self) -> nn.Module:
        """The linear classifier, or an identity where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; none for 0 classes.

        Args:
            num_classes: its outputs.
            global_pool: None leaves the pool as it is; "avg" averages, "" leaves the map unpooled.

        Raises:
            ValueError: "map" where the model has no class attention, or an unknown pool.
        """
        if global_pool is not None:
            if global_pool not in {"", *_POOLS} or (global_pool == "map" and self.pool is None):
                raise ValueError(
                    f"global_pool: '', 'avg' or, where the model was built with it, 'map'; got {global_pool!r}"
                )
            self.global_pool = global_pool
            if global_pool != "map":
                self.pool = None
        self.num_classes = num_classes
        like = next(self.parameters())
        head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.train(self.training)  # type: ignore[assignment]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks for the backward pass, or not."""
        for stage in self.stages:
            stage.checkpointed = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm counts layers for layer-wise learning rates: by stage, or by block; see `layer_groups`."""
        blocks: Any = [
            (r"^stages\.(\d+)\.(?:embed|position|residual)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        ]
        return {"stem": r"^stages\.0\.(?:embed|position)", "blocks": r"^stages\.(\d+)" if coarse else blocks}


def resample_checkpoint(state_dict: Mapping[str, Tensor], model: LaViT) -> dict[str, Tensor]:
    """The filter that timm applies to a checkpoint: what belongs to another grid of tokens is resampled."""
    if not {name for name, _ in model.named_parameters() if "stages" in name} <= set(state_dict):
        return dict(state_dict)  # not a LaViT's; timm refuses it and names what is missing
    return {**state_dict, **resample_weights(model, state_dict)}


def _build(
    *,
    name: str,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    num_classes: int = 1000,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str | None = None,
    **fields: Any,
) -> TimmLaViT:
    """The arguments that timm's users give, turned into ours; any other is a field of `LaViTConfig`.

    Raises:
        ValueError: one that makes no sense, named.
    """
    if global_pool not in {None, "", *_POOLS}:
        raise ValueError(f"global_pool: '', 'avg' or 'map', got {global_pool!r}")
    if global_pool in _POOLS:
        fields["pool"] = _POOLS[global_pool]
    config = model_config(name, max(num_classes, 1), img_size, in_channels=in_chans, drop_path=drop_path_rate, **fields)
    model = TimmLaViT(config, drop_rate)
    if num_classes == 0 or global_pool == "":
        model.reset_classifier(num_classes, global_pool)
    return model


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return build_model_with_cfg(
            _build,
            name,
            pretrained,
            name=name,
            pretrained_filter_fn=resample_checkpoint,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **arguments,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name} of models/variants.py with timm's methods."
    return build


def _input_of(name: str) -> dict[str, Any]:
    config = model_config(name)
    height, width = config.image_size
    return {
        "num_classes": config.num_classes,
        "input_size": (config.in_channels, height, width),
        "pool_size": (height // config.stride, width // config.stride),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stages.0.embed.conv",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2406.00427",
    }


default_cfgs = generate_default_cfgs({name: _input_of(name) for name in list_models()})
"""timm reads them here when a model is registered."""

for _name in list_models():
    register_model(_entrypoint(_name))
