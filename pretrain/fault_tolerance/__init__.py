"""Stops, signals, hangs, non-finite gradients, loss spikes, missing nodes."""
