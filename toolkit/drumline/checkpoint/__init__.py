"""Checkpoints as files: their state, their manifests, and the folder that holds them. No torch."""
