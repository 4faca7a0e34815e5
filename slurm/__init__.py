"""Starts runs on a cluster and restarts them. Knows a run folder and how to start main.py, nothing of training."""
