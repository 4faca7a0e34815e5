"""The recipe, the loop, checkpoints, metrics, evaluation and hand-off. The door is ``pretrain/main.py``."""
