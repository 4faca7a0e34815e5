"""The recipe, the loop, checkpoints, metrics, evaluation and hand-off. The entry point is ``pretrain/main.py``."""
