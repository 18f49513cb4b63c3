"""The run folder and its record: what ran, how it was started, and how it ended."""
