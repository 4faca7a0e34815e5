"""From original datasets to batches on the device. Knows nothing of models or training."""
