"""Checkpoints: shards of the state keyed by name; files are complete or absent, written while training continues."""
