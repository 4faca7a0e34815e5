"""What keeps a run alive or ends it in order: signals, stops, hangs, bad numbers, nodes that are not there."""
