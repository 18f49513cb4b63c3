"""A run folder: what ran, how it was started, and how it ended."""
