"""Tokens and FLOPs of a step are those of the rows as they are, not of rows of the full length."""

import numpy as np
import pytest

from drumline.architectures.trained import flops_per_sample
from drumline.plan.model import Plan, mean_of_quantiles
from drumline.plan.resolve import resolve, shape_of
from drumline.plan.world import World
from drumline.recipe.load import validate
from drumline.session.show import plan_table

LLAMA = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 1000, "max_position_embeddings": 4096,
}  # fmt: skip
ROWS = np.sort(np.random.default_rng(0).lognormal(5.5, 0.7, 20_000).clip(10, 2048).astype(int))
QUANTILES = [int(ROWS[round(part * (len(ROWS) - 1) / 100)]) for part in range(101)]


def plan_of(row_lengths: list[int] | None) -> Plan:
    raw = {
        "recipe": "r", "schema": 1, "duration": {"steps": 20}, "optimizer": {"name": "adamw", "lr": 1e-3},
        "model": {"source": "config", "architecture": "llama", "config": LLAMA},
        "data": {"source": "files", "path": "x.jsonl", "task": "sft", "sequence_length": 2048},
        "batch": {"per_device": 4, "gpus": 2, "accumulation": 2},
    }  # fmt: skip
    return resolve(validate(raw, "r"), World(samples=20_000, row_lengths=row_lengths))


def test_tokens_and_flops_are_those_of_the_rows() -> None:
    """Against the sum over every row; the full length would say six times as much."""
    plan, full = plan_of(QUANTILES), plan_of(None)
    shape = shape_of(plan.recipe, World())
    assert not isinstance(shape, str)
    assert plan.steps.tokens_per_step == pytest.approx(16 * ROWS.mean(), rel=0.01)
    flops = np.mean([flops_per_sample(shape, int(length)) for length in ROWS])
    assert plan.cost.flops_per_step == pytest.approx(16 * flops, rel=0.01)
    assert full.steps.tokens_per_step == 16 * 2048
    assert full.cost.flops_per_step == 16 * flops_per_sample(shape, 2048)
    assert f"about {plan.steps.tokens_per_step:,} tokens a step" in plan_table(plan)


def test_rows_of_one_length_count_as_stated() -> None:
    assert plan_of([2048] * 101).steps == plan_of(None).steps
    assert plan_of([2048] * 101).cost == plan_of(None).cost
    assert mean_of_quantiles([7]) == 7
    assert mean_of_quantiles([0, 10, 20]) == 10
