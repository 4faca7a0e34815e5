"""How good the weights are: in training, of a hand-off, and by probes that need no labels of the task."""
