"""The hand-off: weights that leave this project, or come back to begin a run."""

from pretrain.handoff.folder import load_handoff

__all__ = ["load_handoff"]
