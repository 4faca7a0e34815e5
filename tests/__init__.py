"""Tests; the quick ones lie by package, complete runs in ``system``, Slurm clusters in ``slurm``."""

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What launchers set for each rank."""
