"""Starts runs on a cluster and keeps them alive. Knows a run folder and how to start main.py, nothing of training."""
