"""The engine: DeepSpeed, precision, optimizers and ranks."""
