"""Embeddings of questions and answers, with all other answers of the batch as negatives (InfoNCE)."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

from drumline.train.objectives import Objective, Sums
from drumline.train.objectives.over_ranks import gather_over_ranks


class Pairs(Dataset):
    """A question and its answer: two noisy views of the same hidden point."""

    def __init__(self, size):
        draw = np.random.default_rng(2)
        hidden = draw.normal(size=(size, 8))
        views = [draw.normal(size=(8, 24)) for _ in range(2)]
        self.question, self.answer = ((hidden @ view).astype(np.float32) for view in views)

    def __len__(self):
        return len(self.question)

    def __getitem__(self, number):
        """The noise is new in every epoch, and the same at any split: torch's generator is seeded before."""
        noise = 0.3 * torch.randn(2, 24)
        return {
            "question": self.question[number] + noise[0].numpy(),
            "answer": self.answer[number] + noise[1].numpy(),
        }


class Contrast(Objective):
    """−log softmax of each question's own answer among those of all ranks, by cosine over a temperature."""

    metrics = ("found",)
    why_not_additive = (
        "a question is compared with the other answers of its forward (per_device × gpus of them), so "
        "another split has other negatives"
    )

    def __init__(self, temperature):
        self.temperature = temperature

    def sums(self, model, batch):
        """Sums over the questions of this rank; the answers are those of all ranks."""
        counted = batch["weights"] > 0
        questions, answers = model(batch["question"], batch["answer"])
        everyone, places = gather_over_ranks(answers, counted)
        if not len(everyone):  # a dummy on every rank
            nothing = (questions.sum() + answers.sum()) * 0.0
            return Sums(nothing, {"found": (nothing, nothing)})
        scores = questions @ everyone.T / self.temperature
        losses = functional.cross_entropy(scores, places, reduction="none") * batch["weights"]
        right = (scores.argmax(dim=1) == places) & counted
        return Sums(losses.sum(), {"found": (right.sum(), counted.sum())})


class TwoTowers(nn.Module):
    """Unit vectors of both, [n, 24] -> [n, width]."""

    def __init__(self, width):
        super().__init__()
        self.question, self.answer = nn.Linear(24, width), nn.Linear(24, width)

    def forward(self, question, answer):
        """A pair of [n, width]."""
        return tuple(
            functional.normalize(tower(one), dim=-1)
            for tower, one in ((self.question, question), (self.answer, answer))
        )


def dataset(size):
    """The data set of the recipe."""
    return Pairs(size)


def objective(temperature):
    """The objective of the recipe."""
    return Contrast(temperature)


def model(width):
    """The model of the recipe."""
    return TwoTowers(width)
