"""Allocations and frees in the form that the allocator model replays."""

ROUND = 512
"""The CUDA allocator's granularity in bytes."""

FREE = -1

Event = tuple[int, int, int]
"""(block number, bytes or FREE, stream): one allocation, or one free if the size is FREE."""
