"""The real training step on fake tensors, without a GPU: what it would allocate. Imports torch."""
