"""What a project adds without touching drumline: rows, an objective, an optimizer, an edit of the model, a model."""

import numpy as np
import torch
from helpers import prefix  # lies beside this file, and is found
from torch import nn
from torch.nn import functional

from drumline.data.tasks import Encoded, Task
from drumline.train.objectives import Objective, Sums


class Pairs(Task):
    """Two token sequences a row; the model reads the first, and is to be near the second's mean."""

    needs_tokenizer = False

    def encode(self, row, tokenizer):
        """A ragged array of inputs, a fixed one of targets, and what the row weighs."""
        inputs = np.array(row["inputs"], dtype=np.int32)
        target = np.array(row["target"], dtype=np.float32)
        return Encoded(count=len(inputs), arrays={"inputs": inputs, "target": target})

    def collate(self, rows, indices):
        """Padded inputs with their lengths; the targets of a dummy row are marked by -100."""
        inputs = rows.array("inputs", indices)
        width = max(len(one) for one in inputs)
        padded = np.zeros((len(inputs), width), dtype=np.int64)
        for number, one in enumerate(inputs):
            padded[number, : len(one)] = one
        lengths = np.array([len(one) for one in inputs])
        return {
            "tokens": padded,
            "lengths": lengths,
            "goal": np.stack(rows.array("target", indices)),
            "targets": lengths.copy(),
        }


def pairs():
    """The task."""
    return Pairs()


def rows(count):
    """The rows of a factory source."""
    draw = np.random.default_rng(prefix())
    for _ in range(count):
        inputs = draw.integers(0, 16, size=int(draw.integers(1, 6)))
        yield {"inputs": inputs.tolist(), "target": draw.normal(size=3).tolist()}


class Distance(Objective):
    """Squared distance to the goal, times the row's length; a dummy row adds exactly zero."""

    metrics = ("near",)

    def sums(self, model, batch):
        """Its sum, and how many rows came near."""
        out = model(batch["tokens"], batch["lengths"])
        counts = (batch["targets"] != -100) * batch["lengths"]
        apart = (out - batch["goal"]).square().sum(dim=-1)
        real = (batch["targets"] != -100).float()
        loss = (apart * counts * batch["weights"] * real).sum()
        return Sums(loss, {"near": (((apart < 1.0) * real).sum(), real.sum())})


def distance():
    """The objective."""
    return Distance()


class SignSgd(torch.optim.Optimizer):
    """The sign of a running mean of the gradients, as in Lion."""

    def __init__(self, groups, lr, beta):
        super().__init__(groups, {"lr": lr, "beta": beta, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        """One update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                state["mean"].lerp_(parameter.grad, 1 - group["beta"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(torch.tanh(1e3 * state["mean"]), alpha=-group["lr"])


def sign_sgd(groups, lr, beta):
    """The optimizer."""
    return SignSgd(groups, lr, beta)


class Bag(nn.Module):
    """Mean of embeddings, then two layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 12)
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 3)

    def forward(self, tokens, lengths):
        """[n, L], [n] -> [n, 3]."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        inside = (place < lengths[:, None]).float().unsqueeze(-1)
        mean = (self.embedding(tokens) * inside).sum(dim=1) / lengths[:, None]
        return self.second(functional.gelu(self.first(mean)))


def bag():
    """The model."""
    return Bag()


def freeze_embeddings(model):
    """An edit: freezing by pattern."""
    for name, parameter in model.named_parameters():
        if "embed" in name or name.startswith("first.bias"):
            parameter.requires_grad_(False)
