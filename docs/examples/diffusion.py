"""A small diffusion model (Ho et al. 2020) of points on two half moons."""

import math

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from drumline.train.objectives import Objective, Sums


class NoisyMoons(Dataset):
    """A point, a time and noise. Time and noise are drawn with the sample, so that no split changes them.

    Drawn in the objective instead, they would come from each rank's generator.
    """

    def __init__(self, size, times):
        draw = np.random.default_rng(4)
        angle, which = draw.uniform(0, math.pi, size), draw.integers(0, 2, size)
        upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], axis=1)
        self.points = np.where(which[:, None], upper, lower).astype(np.float32)
        self.kept = torch.cos(torch.linspace(0, math.pi / 2, times + 2)[1:-1]) ** 2

    def __len__(self):
        return len(self.points)

    def __getitem__(self, number):
        time = int(torch.randint(0, len(self.kept), ()))
        noise = torch.randn(2)
        kept = self.kept[time]
        noisy = kept.sqrt() * torch.from_numpy(self.points[number]) + (1 - kept).sqrt() * noise
        return {"noisy": noisy, "time": np.float32(time / len(self.kept)), "noise": noise}


class Denoise(Objective):
    """Squared distance of the guessed noise from the noise."""

    def sums(self, model, batch):
        """Σ weight × the mean over both coordinates."""
        errors = model(batch["noisy"], batch["time"]) - batch["noise"]
        return Sums((errors.square().mean(dim=1) * batch["weights"]).sum())


class Guess(nn.Module):
    """Noise of noisy points at a time, [n, 2], [n] -> [n, 2]."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, noisy, time):
        """[n, 2]."""
        waves = time[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0], device=time.device) * math.pi
        return self.layers(torch.cat([noisy, waves.sin(), waves.cos()], dim=1))


def dataset(size, times):
    """The data set of the recipe."""
    return NoisyMoons(size, times)


def objective():
    """The objective of the recipe."""
    return Denoise()


def model(width):
    """The model of the recipe."""
    return Guess(width)
