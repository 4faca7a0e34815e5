"""LaViT for the transformers library, which finds these classes by `auto_map` in a hand-off's config.json.

A hand-off contains this file and those that it imports, and nothing else of this project. It is the only file of this
package that needs more than torch, and no other file imports it.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

# Older releases of transformers (4.57, 5.4) copy from a folder only the files that this one itself imports.
from .attention import Attention  # noqa: F401
from .block import Block  # noqa: F401
from .config import LaViTConfig
from .diagonality import diagonality_loss  # noqa: F401
from .lavit import LaViT
from .resample import resample_map  # noqa: F401
from .residual import AttentionResidual  # noqa: F401
from .stage import Stage  # noqa: F401

HANDOFF_FIELDS = frozenset(
    {
        "num_classes", "class_names", "class_ids", "class_levels", "input", "weights", "weights_blake2", "files_blake2",
        "dataset", "recipe", "metrics", "samples_seen", "initialized_from", "config_blake2",
    }
)  # fmt: skip
"""Fields of a hand-off's config.json that describe its weights: not saved again, with weights that were fine-tuned."""


class LaViTPretrainedConfig(PretrainedConfig):
    """config.json of a hand-off as transformers reads it: `architecture`, and the library's own fields."""

    model_type = "lavit"

    def __init__(self, architecture: dict[str, Any] | None = None, **fields: Any) -> None:
        self.architecture = architecture or {}
        super().__init__(**{name: value for name, value in fields.items() if name not in HANDOFF_FIELDS})


class LaViTForImageClassification(PreTrainedModel):
    """A LaViT with the interface of transformers' image classifiers; the network itself is `lavit`."""

    config_class = LaViTPretrainedConfig
    base_model_prefix = "lavit"
    main_input_name = "pixel_values"

    def __init__(self, config: LaViTPretrainedConfig) -> None:
        super().__init__(config)
        # apex's LayerNorm has the same weights and outputs as torch's.
        config.architecture = {**config.architecture, "num_classes": config.num_labels, "norm": "torch"}
        self.lavit = LaViT(LaViTConfig.from_dict(config.architecture))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the head where the weights are of other classes; `LaViT` has initialized everything else."""
        if module is self.lavit.head:
            super()._init_weights(module)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Classify.

        Args:
            pixel_values: (batch, 3, height, width), normalized; each side a multiple of `lavit.config.stride`.
            labels: (batch,) numbers of classes, for the cross-entropy, or None.

        Returns:
            `logits` (batch, classes), and `loss`, a scalar, where there are labels.
        """
        logits = self.lavit(pixel_values)
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)

    def forward_features(self, pixel_values: Tensor) -> list[Tensor]:
        """Maps (batch, C, height / s, width / s) of the four stages, at strides s = 4, 8, 16, 32 for patches of 4."""
        return self.lavit.forward_features(pixel_values)
