"""Checkpoints: shards of the state keyed by name, files that are complete or absent, written while training continues."""
