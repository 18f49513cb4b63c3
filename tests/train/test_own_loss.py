"""Our loss is what the model's own forward gives for labels; an error in ours that no reference sees shows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from unequal import unequal_plan, write_pairs

from drumline.train import verify
from drumline.train.batches import StepReader, open_rows
from drumline.train.objectives import cross_entropy
from drumline.train.own_loss import compare_with_own_loss
from memory.plans import SMALL

BART = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96,
        "max_position_embeddings": 64}  # fmt: skip
"""As a decoder it takes a token's own label as its target, unlike the others."""
FAMILIES = ["llama", "bart", "granite", "gemma2", "cohere", "phi", "mixtral"]
"""Among them logits that are scaled (granite, cohere), capped (gemma2), and a head with a bias (phi)."""


def compared(pairs: Path, architecture: str, **changes: Any) -> Any:
    model = {"source": "config", "architecture": architecture,
             "config": {**SMALL.get(architecture, BART), "vocab_size": 300}}  # fmt: skip
    if architecture == "gemma2":  # caps its attention scores
        model["attention"] = "eager"
    plan = unequal_plan(pairs, (3, 1, 4), **{"model": model, **changes})
    rows = open_rows(plan, "train")
    module = verify._plain_module(plan, rows, torch.device("cpu"))
    verify.silence_dropout(module)
    step = StepReader(plan, rows, rank=0).read(1)
    return compare_with_own_loss(plan, rows, module, step, torch.device("cpu"))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_loss_is_the_models_own(tmp_path: Path, architecture: str) -> None:
    """On a row whose prompt is masked; whole and, where the head alone makes logits, in chunks."""
    pairs = write_pairs(tmp_path)
    chunked = [False, True] if architecture in ("llama", "mixtral") else [False]
    for is_chunked in chunked:
        found = compared(pairs, architecture, loss={"chunked": is_chunked})
        assert found["relative_error"] < 1e-5
        assert found["theirs"] > 1


@pytest.mark.parametrize("fault", ["scaled", "shifted", "not masked"])
def test_a_fault_on_both_sides_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Planted in the objective, which training and its reference share."""
    original = cross_entropy.token_loss_sum

    def wrong(logits: torch.Tensor, targets: torch.Tensor, *others: Any) -> torch.Tensor:
        if fault == "scaled":
            return original(logits / 2, targets, *others)
        if fault == "shifted":
            return original(logits, targets.roll(1, dims=1), *others)
        return original(logits, targets.clamp(min=0), *others)

    monkeypatch.setattr(cross_entropy, "token_loss_sum", wrong)
    assert compared(write_pairs(tmp_path), "llama")["relative_error"] > 1e-4


def test_classes_and_images_too(tmp_path: Path) -> None:
    """A classifier of texts, padded; a factory's model and an objective of one's own have no loss to compare."""
    rows = [{"text": "ab" * (n % 5 + 1), "label": n % 3} for n in range(30)]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compared(
        path,
        "bert",
        data={"path": str(path), "task": "classification"},
        batch={"weighting": "sample"},
    )
    assert found["relative_error"] < 1e-5
    assert abs(found["theirs"] - np.log(3)) < 1
    factory = {"source": "factory", "factory": "example_models:mlp", "architecture": None,
               "config": {"features": 32, "hidden": 16, "classes": 10}}  # fmt: skip
    images = {"source": "builtin", "name": "synthetic-classification", "path": None, "task": "classification"}  # fmt: skip
    assert (
        compared(path, "llama", model=factory, data=images, batch={"weighting": "sample"}) is None
    )
