"""Checkpoints: shards of the state keyed by name, files that are whole or not there, written beside training."""
