"""Runs the real training step on fake tensors to record what a GPU would allocate. Imports torch."""
