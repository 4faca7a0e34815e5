"""Evaluation: accuracy during training, reports on hand-offs, and probes of the features."""
