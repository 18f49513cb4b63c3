"""A loss of one's own: quantiles of a noisy function, by the pinball loss (Koenker and Bassett 1978)."""

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from drumline.train.objectives import Objective, Sums


class NoisySine(Dataset):
    """Points of a sine whose noise grows to the right; the same for every epoch."""

    def __init__(self, size):
        draw = np.random.default_rng(1)
        self.x = draw.uniform(0, 6, size).astype(np.float32)
        self.y = (np.sin(self.x) + 0.1 * self.x * draw.normal(size=size)).astype(np.float32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, number):
        return {"features": self.x[number : number + 1], "goal": self.y[number]}


class Pinball(Objective):
    """Σ over quantiles of max(q·e, (q − 1)·e), e: target − output. Coverage: points below the middle one."""

    metrics = ("below",)

    def __init__(self, quantiles):
        self.quantiles = quantiles

    def sums(self, model, batch):
        """Undivided sums over the micro-batch. A row of weight 0 is a dummy, and adds zero to all of them."""
        outputs, weights = model(batch["features"]), batch["weights"]
        q = outputs.new_tensor(self.quantiles)
        errors = batch["goal"][:, None] - outputs
        losses = (q * errors).maximum((q - 1) * errors).sum(dim=1)
        counted = (weights > 0).float()
        below = (batch["goal"] < outputs[:, len(q) // 2]) * counted
        return Sums((losses * weights).sum(), {"below": (below.sum(), counted.sum())})


def dataset(size):
    """The data set of the recipe."""
    return NoisySine(size)


def objective(quantiles):
    """The objective of the recipe."""
    return Pinball(quantiles)


def model(width, outputs):
    """The model of the recipe; its weights follow from the recipe's seed."""
    return nn.Sequential(
        nn.Linear(1, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, outputs),
    )
