"""A model that takes its time, so that a test can kill a run in the middle of it."""

import time

from torch import Tensor, nn


class Slow(nn.Module):
    """An MLP large enough for several of DDP's buckets to matter; each forward waits a little."""

    def __init__(self, features: int, hidden: int, classes: int, wait_s: float) -> None:
        super().__init__()
        self.wait_s = wait_s
        self.layers = nn.Sequential(
            nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, values: Tensor) -> Tensor:
        """Features [n, features] to logits [n, classes]."""
        time.sleep(self.wait_s)
        return self.layers(values)


def slow(features: int, hidden: int, classes: int, wait_s: float) -> nn.Module:
    """The factory that the test's recipe names."""
    return Slow(features, hidden, classes, wait_s)
