"""The estimated time of a step against throughputs that were published and that we measured."""

import csv
from functools import cache
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve
from drumline.plan.world import World
from drumline.recipe.load import validate

PUBLISHED = ROOT / "tests/fixtures/published/throughput.csv"
"""Runs of llm-foundry on H100 and A100 (its table of 2024, MosaicML): tokens per second and GPU."""
MEASURED = ROOT / "benchmarks/step_time/h100-80gb-torch2.11.0.csv"
WIDTHS = {
    "125m": (768, 12, 12), "350m": (1024, 16, 24), "760m": (1536, 12, 24), "1b": (2048, 16, 24), "3b": (2560, 20, 32),
    "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 56, 48), "70b": (8192, 64, 80),
}  # fmt: skip
"""Width, heads and layers of MPT models, which are GPT-2's but for biases and the approximated GELU."""
GPT2 = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
BASE = {
    "recipe": "r", "schema": 1, "precision": "bf16", "optimizer": {"name": "adamw", "lr": 1e-4},
    "duration": {"steps": 1000},
}  # fmt: skip
FP8 = "amp_fp8"


def plan_of(row: dict[str, str]) -> Plan:
    """The plan of a published run."""
    width, heads, layers = WIDTHS[row["Model"]]
    length, gpus = int(row["SeqLen (T)"]), int(row["# GPUs"])
    config: dict[str, Any] = {
        "vocab_size": 50368, "n_positions": length, "n_embd": width, "n_layer": layers, "n_head": heads,
        "activation_function": "gelu_pytorch_tanh", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    policy = "full" if row["Activation Checkpointing"] == "True" else "none"
    raw = {
        **BASE,
        "model": {
            "source": "config", "architecture": "gpt2", "config": config, "activation_checkpointing": policy,
        },
        "data": {"source": "files", "path": "x", "task": "causal_lm", "sequence_length": length},
        "batch": {
            "per_device": int(row["MicroBatchSize"]), "gpus": gpus, "accumulation": int(row["GradAccum"]),
        },
        "cluster": {"gpu": row["GPU"].replace("_", "-"), "gpus_per_node": 8},
        "strategy": {"name": "fsdp"},
    }  # fmt: skip
    return resolve(validate(raw, "r"), World())


@cache
def published() -> list[tuple[dict[str, str], float]]:
    """Rows, each with estimated over published tokens per second and GPU."""
    with PUBLISHED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["Precision"] != FP8]
    found = []
    for row in rows:
        time = plan_of(row).time
        assert time and time.tokens_per_s
        found.append((row, time.tokens_per_s / int(row["# GPUs"]) / published_rate(row)))
    return found


def published_rate(row: dict[str, str]) -> float:
    return float(row["Throughput (T/s/GPU)"])


def test_published_throughputs() -> None:
    """Median error at most 10 %, and nine of ten runs within a quarter; the plan's range covers as many."""
    errors = np.array([abs(ratio - 1) for _, ratio in published()])
    assert len(errors) > 60
    assert np.median(errors) <= 0.06
    assert np.mean(errors <= 0.25) >= 0.95
    assert np.mean([0.8 <= 1 / ratio <= 1.25 for _, ratio in published()]) >= 0.95


@pytest.mark.parametrize("gpu", ["h100_80gb", "a100_80gb", "a100_40gb"])
def test_no_kind_of_card_is_off(gpu: str) -> None:
    """Nor does one hide behind the others: mean of the logarithms."""
    ratios = [ratio for row, ratio in published() if row["GPU"] == gpu]
    assert abs(np.mean(np.log(ratios))) <= 0.06


def test_configurations_of_a_model_are_in_order() -> None:
    """Spearman's correlation of estimated and published rates over the configurations of each model.

    At least 0.9, but for 13b: 0.87, where two pairs that lie within 10 % are the other way round.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for row, ratio in published():
        rate = published_rate(row)
        groups.setdefault(row["Model"], []).append((ratio * rate, rate))
    assert len(groups) == len(WIDTHS)
    found = {model: spearman(*zip(*pairs, strict=True)) for model, pairs in groups.items()}
    assert found.pop("13b") >= 0.86
    assert min(found.values()) >= 0.89, found


def spearman(ours: tuple[float, ...], theirs: tuple[float, ...]) -> float:
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (ours, theirs)]
    return float(np.corrcoef(*ranks)[0, 1])


def measured() -> list[dict[str, str]]:
    lines = [line for line in MEASURED.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


@pytest.mark.parametrize("row", measured(), ids=lambda row: f"{row['model']}-{row['per_device']}")
def test_our_own_steps_are_in_the_range(row: dict[str, str]) -> None:
    """What drumline's step took on an H100, in eager kernels of transformers, without a second rank."""
    is_gpt2 = row["model"].startswith("gpt2")
    raw = {
        **BASE,
        "precision": row["precision"],
        "model": {"source": "config", "architecture": "gpt2" if is_gpt2 else "llama",
                  "config": GPT2 if is_gpt2 else LLAMA_1B},
        "data": {"source": "files", "path": "x", "task": "causal_lm", "sequence_length": int(row["length"])},
        "batch": {"per_device": int(row["per_device"]), "gpus": 1, "accumulation": int(row["accumulation"])},
        "cluster": {"gpu": "h100-80gb"},
    }  # fmt: skip
    time = resolve(validate(raw, "r"), World()).time
    assert time and time.mfu
    seconds = float(row["ms"]) / 1000
    assert time.step_s.low <= seconds <= time.step_s.high
    assert time.mfu == pytest.approx(float(row["mfu"]), rel=0.2)
    assert time.step_s.expected == pytest.approx(sum(time.parts.values()))


def test_a_plan_s_time_adds_up() -> None:
    """Hours, GPU-hours and energy are the steps' time and that of saves, by the GPUs and the card's power."""
    row = next(row for row, _ in published() if row["# GPUs"] == "64")
    plan = plan_of(row)
    time = plan.time
    assert time and time.energy_kwh and time.tokens_per_s
    saves = time.beside["saves"]
    assert saves and time.beside.keys() == {"saves"}
    assert time.hours.expected == pytest.approx((1000 * time.step_s.expected + saves) / 3600)
    assert time.gpu_hours == pytest.approx(64 * time.hours.expected)
    assert time.energy_kwh == pytest.approx(0.7 * time.gpu_hours)
    tokens = plan.batch.effective * int(row["SeqLen (T)"])
    assert time.tokens_per_s == pytest.approx(tokens / time.step_s.expected)
