"""The network and its losses. Knows torch, nothing of files, ranks or recipes."""

from .config import LaViTConfig
from .diagnostics import BlockDiagnostics, attention_diagnostics
from .diagonality import diagonality_loss, diagonality_loss_as_printed
from .lavit import LaViT
from .semantic_softmax import SemanticSoftmax, within_level
from .transplant import apply_less_attention
from .variants import create_model, list_models, model_config
from .weights import load_weights

__all__ = [
    "BlockDiagnostics",
    "LaViT",
    "LaViTConfig",
    "SemanticSoftmax",
    "apply_less_attention",
    "attention_diagnostics",
    "create_model",
    "diagonality_loss",
    "diagonality_loss_as_printed",
    "list_models",
    "load_weights",
    "model_config",
    "within_level",
]
