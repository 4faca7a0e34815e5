"""The engine: DeepSpeed as its configuration and the recipe say, its precision, its optimizers, and the ranks."""
