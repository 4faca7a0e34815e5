"""LaViT, the Less-Attention Vision Transformer (CVPR 2024, arXiv 2406.00427)."""

import math
from collections.abc import Sequence
from typing import Literal, cast, overload

import torch
from torch import Tensor, nn

from .attention import ClassAttention, TokenMap
from .block import layer_norm
from .config import STAGES, LaViTConfig
from .diagonality import Diagonality
from .residual import AttentionResidual
from .stage import PositionEmbedding, Stage


class LaViT(nn.Module):
    """Four stages at strides 4, 8, 16 and 32 (for patches of 4), a final LayerNorm, a pool and a linear classifier.

    Any image whose sides are multiples of `config.stride` can be fed, another size at every call: what depends on the
    token grid is resampled on the way when the size is not `config.image_size`.
    """

    def __init__(self, config: LaViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_drop_paths = 2 * sum(config.depths)
        """Residual branches, two a block: the rows of `drop_path_uniforms`."""
        self.stages = cast("Sequence[Stage]", nn.ModuleList(Stage(config, stage) for stage in range(STAGES)))
        self.norm = layer_norm(config.widths[-1], config.norm)
        self.pool = ClassAttention(config.widths[-1], config.heads[-1]) if config.pool == "class_attention" else None
        self.head = nn.Linear(config.widths[-1], config.num_classes)
        _initialize(self)

    @overload
    def forward(
        self, images: Tensor, *, drop_path_uniforms: Tensor | None = ..., with_diagonality: Literal[False] = ...
    ) -> Tensor: ...
    @overload
    def forward(
        self, images: Tensor, *, drop_path_uniforms: Tensor | None = ..., with_diagonality: Literal[True, "as_printed"]
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, images: Tensor, *, drop_path_uniforms: Tensor | None = None, with_diagonality: Diagonality = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Classify.

        Args:
            images: (batch, in_channels, height, width), float; each side a multiple of `config.stride`.
            drop_path_uniforms: (num_drop_paths, batch) in [0, 1): branch k keeps sample b when the number is at least
                the branch's drop rate. Read while training only. None: drawn from torch's generator.
            with_diagonality: also return the diagonality-preserving loss; 'as_printed': with the paper's printed sign.

        Returns:
            Logits (batch, num_classes). With `with_diagonality` also an fp32 scalar: the mean of `diagonality_loss`
            over the Less Attention blocks, heads and batch; zero where there is no such block.

        Raises:
            ValueError: images or uniforms of a wrong shape.
        """
        maps, losses = self._trunk(images, drop_path_uniforms, with_diagonality)
        tokens = self.norm(maps[-1].flatten(2).transpose(1, 2))
        logits = self.head(tokens.mean(1) if self.pool is None else self.pool(tokens))
        if not with_diagonality:
            return logits
        return logits, torch.stack(losses).mean() if losses else torch.zeros((), device=logits.device)

    def forward_features(self, images: Tensor, *, drop_path_uniforms: Tensor | None = None) -> list[Tensor]:
        """The four maps that detection and segmentation heads take, before the final norm.

        Args:
            images: as in `forward`.
            drop_path_uniforms: as in `forward`.

        Returns:
            Maps (batch, widths[m], height / s, width / s) at strides s = 1, 2, 4, 8 times the patch size.
        """
        return self._trunk(images, drop_path_uniforms, with_diagonality=False)[0]

    def _trunk(
        self, images: Tensor, uniforms: Tensor | None, with_diagonality: Diagonality
    ) -> tuple[list[Tensor], list[Tensor]]:
        if images.ndim != 4 or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"images: (batch, {self.config.in_channels}, height, width) is wanted (in_channels is "
                f"{self.config.in_channels}), got {tuple(images.shape)}"
            )
        self.config.grids((images.shape[2], images.shape[3]))  # raises where the size is no multiple of the stride
        if uniforms is not None and uniforms.shape != (self.num_drop_paths, images.shape[0]):
            raise ValueError(
                f"drop_path_uniforms: {(self.num_drop_paths, images.shape[0])} is wanted, (num_drop_paths, batch), "
                f"got {tuple(uniforms.shape)}"
            )
        if not self.training or self.config.drop_path == 0:
            uniforms = None
        elif uniforms is None:
            uniforms = torch.rand(self.num_drop_paths, images.shape[0], device=images.device)
        features, scores, maps, losses, row = images, None, [], [], 0
        for stage in self.stages:
            rows = 2 * len(stage.blocks)
            drawn = None if uniforms is None else uniforms[row : row + rows]
            features, scores, more = stage(features, scores, drawn, with_diagonality)
            maps.append(features)
            losses += more
            row += rows
        return maps, losses

    def set_activation_checkpointing(self, policy: Literal["all", "none"] | Sequence[bool]) -> None:
        """Choose the stages whose blocks keep their inputs only and are recomputed for the backward pass.

        Args:
            policy: 'all', 'none', or one truth value a stage, first stage first.

        Raises:
            ValueError: anything else.
        """
        if isinstance(policy, str):
            if policy not in {"all", "none"}:
                raise ValueError(f"activation checkpointing: 'all', 'none' or {STAGES} booleans, got {policy!r}")
            policy = [policy == "all"] * STAGES
        if len(policy) != STAGES:
            raise ValueError(f"activation checkpointing: one boolean for each of {STAGES} stages, got {policy!r}")
        for stage, checkpointed in zip(self.stages, policy, strict=True):
            stage.checkpointed = bool(checkpointed)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must spare.

        They are norms, biases, LayerScale, position embeddings and the class token: all but the weights of Linear
        layers (Psi and Theta are such) and convolutions (the attention residual's are such).
        """
        decayed = {
            f"{name}.{weight}"
            for name, module in self.named_modules()
            for weight in (("pool", "mix") if isinstance(module, AttentionResidual) else ("weight",))
            if isinstance(module, nn.Linear | nn.Conv2d | TokenMap | AttentionResidual)
        }
        return {name for name, _ in self.named_parameters() if name not in decayed}

    def layer_groups(self) -> list[list[str]]:
        """Names of all parameters in the order of depth: the stem, then block by block, then the head.

        Layer-wise learning-rate decay counts these groups. What is at the entry of stages 2 to 4 belongs to the
        first block there; the final norm and the pool belong to the head.
        """
        groups: list[list[str]] = [[] for _ in range(sum(self.config.depths) + 2)]
        starts = [1 + sum(self.config.depths[:stage]) for stage in range(STAGES)]
        for name, _ in self.named_parameters():
            parts = name.split(".")
            if parts[0] != "stages":
                groups[-1].append(name)
            elif parts[2] == "blocks":
                groups[starts[int(parts[1])] + int(parts[3])].append(name)
            else:
                groups[0 if parts[1] == "0" else starts[int(parts[1])]].append(name)
        return groups


def _initialize(model: LaViT) -> None:
    """Start every layer so that activations keep their scale at any width and depth (this project's choice).

    Weights are truncated normal with variance 1 / fan-in; the two layers that end a residual branch are divided by
    the square root of the number of branches, so that all branches together add about one unit of variance. The
    attention residual starts as the average over its patch and over heads, and norms, Psi and Theta as the identity,
    where they are defined; biases are zero. Position embeddings, the class token and the head are small.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            _truncated_normal(module.weight, 1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, PositionEmbedding):
            _truncated_normal(module.table, 0.02)
        elif isinstance(module, ClassAttention):
            _truncated_normal(module.class_token, 0.02)
    shrink = 1 / math.sqrt(model.num_drop_paths)
    with torch.no_grad():
        for stage in model.stages:
            for block in stage.blocks:
                block.attention.proj.weight.mul_(shrink)
                block.mlp.fc2.weight.mul_(shrink)
    _truncated_normal(model.head.weight, 0.02)


def _truncated_normal(tensor: Tensor, std: float) -> None:
    """Fill with a normal cut at two of its deviations, whose own deviation is `std` after the cut.

    By the inverse of the distribution function, one draw a number: torch's `trunc_normal_` redraws the whole tensor
    until no number lies outside, which takes a minute of every rank's start for a billion parameters.
    """
    full = std / 0.8796256610342398  # the deviation of a unit normal cut at +-2
    inside = math.erf(2 / math.sqrt(2))
    with torch.no_grad():
        tensor.uniform_(-inside, inside).erfinv_().mul_(math.sqrt(2) * full)
