"""What a sample weighs: sums over counted tokens, by hand and by property."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from drumline.memory.load import CHUNK_TOKENS
from drumline.train.objectives import ObjectiveModule
from drumline.train.objectives.cross_entropy import (
    ClassCrossEntropy,
    TokenCrossEntropy,
    token_loss_sum,
)
from drumline.train.scaler import GROWTH_INTERVAL, LossScaler


class Toy(nn.Module):
    """A causal model with the parts that the chunked loss needs."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.base_model = _Base(vocabulary)
        self.head = nn.Linear(8, vocabulary, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> object:
        hidden = self.base_model(input_ids).last_hidden_state
        return type("Out", (), {"logits": self.head(hidden)})


class _Base(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 8)

    def forward(self, input_ids: torch.Tensor) -> object:
        return type("Out", (), {"last_hidden_state": torch.tanh(self.table(input_ids))})


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (rows, length), generator=generator)
    targets = torch.randint(0, 11, (rows, length), generator=generator)
    targets[0, length // 2 :] = -100
    return {
        "input_ids": ids,
        "targets": targets,
        "weights": torch.tensor([0.5] + [2.0] * (rows - 1)),
    }


def test_the_sum_is_the_weighted_sum_over_counted_tokens() -> None:
    """Σ weight × cross-entropy, by a loop over single tokens."""
    torch.manual_seed(0)
    logits, b = torch.randn(3, 6, 11), batch(3, 6)
    expected = sum(
        float(b["weights"][i] * functional.cross_entropy(logits[i, j], b["targets"][i, j]))
        for i in range(3)
        for j in range(6)
        if b["targets"][i, j] != -100
    )
    assert float(token_loss_sum(logits, b["targets"], b["weights"])) == pytest.approx(expected)


def test_chunked_loss_has_the_same_value_and_gradient() -> None:
    """Chunks change memory, not the sum: equal to 1e-12 in fp64, over several chunks."""
    torch.manual_seed(0)
    model = Toy(11).double()
    b = batch(4, CHUNK_TOKENS)
    b["weights"] = b["weights"].double()
    gradients = []
    for chunked in (False, True):
        model.zero_grad()
        total = ObjectiveModule(model, TokenCrossEntropy(5 if chunked else 0))(b)[0]
        total.backward()
        gradients.append(
            [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
    for whole, parts in zip(*gradients, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-12, atol=1e-12)


def test_smoothed_targets_are_spread_evenly_in_training_only() -> None:
    """(1 - s) of the target's loss and s of the mean over all tokens; chunks and evaluation agree."""
    torch.manual_seed(0)
    model = Toy(11).double()
    b = batch(3, 7)
    b["weights"] = b["weights"].double()
    losses = -functional.log_softmax(model(input_ids=b["input_ids"]).logits, dim=-1)
    counted = b["targets"] != -100
    own = losses.gather(-1, b["targets"].clamp_min(0).unsqueeze(-1)).squeeze(-1)
    mixed = (0.9 * own + 0.1 * losses.mean(-1)) * counted * b["weights"].unsqueeze(1)
    plain = own * counted * b["weights"].unsqueeze(1)
    for chunks in (0, 3):
        objective = TokenCrossEntropy(chunks, 0.1)
        assert float(objective.sums(model.train(), b).loss) == pytest.approx(float(mixed.sum()))
        assert float(objective.sums(model.eval(), b).loss) == pytest.approx(float(plain.sum()))


def test_a_z_loss_is_the_square_of_the_denominators_logarithm_in_training_only() -> None:
    """Value and gradients are those of logsumexp, and exactly zero where no token is counted; chunks agree."""
    torch.manual_seed(0)
    model = Toy(11).double()
    b = batch(3, 7)
    b["weights"] = b["weights"].double()
    counted = b["targets"] != -100

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters())))

    def by_hand(coefficient: float) -> torch.Tensor:
        logits = model(input_ids=b["input_ids"]).logits
        own = functional.cross_entropy(
            logits.flatten(0, 1), b["targets"].flatten(), reduction="none"
        )
        added = coefficient * logits.logsumexp(-1).square()
        return ((own.view_as(added) + added) * counted * b["weights"].unsqueeze(1)).sum()

    for chunks in (0, 3):
        objective = TokenCrossEntropy(chunks, z_loss=0.01)
        ours, wanted = objective.sums(model.train(), b).loss, by_hand(0.01)
        assert float(ours) == pytest.approx(float(wanted))
        for mine, theirs in zip(gradients(ours), gradients(wanted), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
        assert float(objective.sums(model.eval(), b).loss) == pytest.approx(float(by_hand(0.0)))
        nothing = {**b, "targets": torch.full_like(b["targets"], -100)}
        empty = objective.sums(model.train(), nothing).loss
        assert float(empty) == 0.0
        assert not any(gradient.any() for gradient in gradients(empty))


def test_a_dummy_row_adds_exactly_zero() -> None:
    """No counted token: value and every gradient are zero to the last bit."""
    torch.manual_seed(0)
    model = Toy(11)
    b = batch(1, 5)
    b["targets"].fill_(-100)
    total = ObjectiveModule(model, TokenCrossEntropy())(b)[0]
    total.backward()
    assert total.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_classification_counts_right_answers() -> None:
    """The loss, rows predicted right, rows that count; weights act on the first."""
    model = nn.Identity()
    logits = torch.tensor([[5.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    b = {"features": logits, "targets": torch.tensor([0, 1, -100]), "weights": torch.ones(3)}
    total, right, answers = ObjectiveModule(model, ClassCrossEntropy())(b)
    assert (right, answers) == (1, 2)
    assert float(total) == pytest.approx(
        2 * functional.cross_entropy(logits[:2], b["targets"][:2]).item()
    )


def test_the_loss_scale_halves_and_doubles() -> None:
    """Overflow halves and counts; 2,000 good steps double."""
    scaler = LossScaler(scale=8.0)
    scaler.update(overflow=True)
    assert (scaler.scale, scaler.overflows) == (4.0, 1)
    for _ in range(GROWTH_INTERVAL):
        scaler.update(overflow=False)
    assert scaler.scale == 8.0
