"""Gradients of weights that are sharded over the processes."""
