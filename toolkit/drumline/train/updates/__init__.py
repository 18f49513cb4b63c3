"""Optimizers that torch lacks, or whose result there would depend on how weights are sharded."""
