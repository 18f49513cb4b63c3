"""Losses of numbers and of several classes: the formula on single rows in fp64, metrics, ignored rows."""

from typing import Any

import pytest
import torch
from torch import nn

from drumline.train.objectives.bce import BinaryCrossEntropy
from drumline.train.objectives.mse import MeanSquaredError


class Linear(nn.Module):
    """Outputs [n, k] of features [n, 5]."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(5, outputs).double()

    def forward(self, features: Any) -> Any:
        return self.layer(features)


def batch_of(targets: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    count = len(targets)
    return {
        "features": torch.randn(count, 5).double(),
        "targets": targets,
        "weights": torch.rand(count),
    }


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_squared_error_is_the_formula(outputs: int) -> None:
    """Weighted mean over outputs of the squared difference, row by row; -100 is a number like any other."""
    targets = torch.randn(6, outputs).double()
    targets[2] = -100.0
    batch, model = batch_of(targets), Linear(outputs)
    found = MeanSquaredError().sums(model, batch)
    errors = (model(batch["features"]) - targets).detach()
    wanted = sum(
        float(w) * sum(float(e) ** 2 for e in row) / outputs
        for w, row in zip(batch["weights"], errors, strict=True)
    )
    assert float(found.loss) == pytest.approx(wanted, rel=1e-12)
    total, count = found.metrics["mae"]
    assert float(total / count) == pytest.approx(float(errors.abs().mean()), rel=1e-12)


def test_the_binary_cross_entropy_is_the_formula() -> None:
    """And its metrics count labels, not rows."""
    targets = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).double()
    batch, model = batch_of(targets), Linear(3)
    found = BinaryCrossEntropy().sums(model, batch)
    shares = torch.sigmoid(model(batch["features"])).detach()
    rows = -(targets * shares.log() + (1 - targets) * (1 - shares).log()).mean(dim=1)
    assert float(found.loss) == pytest.approx(float((rows * batch["weights"]).sum()), rel=1e-9)
    said = shares > 0.5
    right, labels = found.metrics["accuracy"]
    assert (int(right), int(labels)) == (int((said == targets.bool()).sum()), 12)
    both = int((said & targets.bool()).sum())
    twice, sizes = found.metrics["f1"]
    assert (int(twice), int(sizes)) == (2 * both, int(said.sum() + targets.sum()))


@pytest.mark.parametrize("objective", [MeanSquaredError(), BinaryCrossEntropy()], ids=type)
def test_ignored_rows_add_exactly_nothing(objective: Any) -> None:
    """A rank without a sample runs a row of NaN targets, even where the model's outputs are not finite."""
    batch, model = batch_of(torch.full((2, 3), torch.nan).double()), Linear(3)
    batch["features"][1] = torch.inf
    found = objective.sums(model, batch)
    assert float(found.loss) == 0.0
    assert all(float(part) == 0.0 for pair in found.metrics.values() for part in pair)
    found.loss.backward()
    assert all(bool((p.grad == 0).all() or p.grad.isnan().any()) for p in model.parameters())
    batch = batch_of(torch.full((2, 3), torch.nan).double())
    model.zero_grad()
    objective.sums(model, batch).loss.backward()
    assert all(bool((p.grad == 0).all()) for p in model.parameters())
