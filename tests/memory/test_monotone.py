"""More ranks never need more memory where states are sharded; larger batches and longer rows never less."""

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from drumline.architectures.config_fields import config_fields
from drumline.plan.model import MemoryFacts
from memory.plans import LATENT, SMALL, sized, small_plan

RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32, 40, 48, 64, 72, 96, 120, 128, 256, 512, 1000, 1024)
FAMILIES = [*SMALL, *3 * ["mixtral", "qwen3_moe", "deepseek_v3"]]


def config_of(architecture: str, draw: random.Random) -> dict[str, Any]:
    """A model of up to seven layers, of any width; experts from 4 to 128, more or fewer than ranks."""
    heads, width, layers = (
        draw.choice([4, 8, 16, 32]),
        draw.choice([32, 64, 128]),
        draw.randrange(1, 8),
    )
    ffn, vocabulary = draw.randrange(256, 8192, 64), draw.randrange(16000, 260000)
    config = sized(architecture, heads, width, layers, ffn, vocabulary)
    changes: dict[str, Any] = {
        "num_key_value_heads": heads if architecture in LATENT else draw.choice([1, 2, 4]),
        "num_local_experts": draw.choice([4, 8, 16]),
        "num_experts": draw.choice([8, 16, 60, 128]),
        "n_routed_experts": draw.choice([8, 16, 60, 128]),
        "moe_intermediate_size": draw.choice([96, 128, 768]),
    }
    config |= {key: value for key, value in changes.items() if key in config}
    learns = config_fields(architecture) or {}
    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    return {**config, positions: 4096} if positions in learns else config


ORDER = ("fits", "tight", "does_not_fit")


def needs_no_more(less: MemoryFacts, more: MemoryFacts) -> bool:
    """Allocated bytes of the first are at most those of the second, and its verdict is no worse.

    To 1/64: that much FSDP2 may pad, and the margin of the high end depends on what makes up the peak.
    """
    assert less.allocated
    assert more.allocated
    return (
        less.allocated.expected <= (1 + 1 / 64) * more.allocated.expected
        and less.allocated.high <= (1 + 1 / 64) * more.allocated.high
        and ORDER.index(less.verdict) <= ORDER.index(more.verdict)
    )


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 2**31))
def test_memory_is_monotone(seed: int) -> None:
    """250 × 4 plans: other ranks, twice the rows, twice the tokens; FSDP2 and ZeRO 1 to 3."""
    draw = random.Random(seed)
    architecture = draw.choice(FAMILIES)
    config, strategy = (
        config_of(architecture, draw),
        draw.choice(["fsdp", "fsdp", "zero1", "zero2", "zero3"]),
    )
    b, length, k = (
        draw.choice([1, 2, 3, 4, 8]),
        draw.choice([64, 128, 512, 1024]),
        draw.choice([1, 2]),
    )
    sections: dict[str, Any] = {
        "strategy": {"name": strategy},
        "launch": {"launcher": "torchrun" if strategy == "fsdp" else "deepspeed"},
        "precision": draw.choice(["bf16", "fp32"]),
        "model": {"activation_checkpointing": draw.choice(["none", "full", "selective"])},
    }

    def memory(b: int, length: int, gpus: int) -> MemoryFacts:
        cluster = {"gpus_per_node": 8 if gpus % 8 == 0 else gpus}
        plan = small_plan(architecture, config, b, length, gpus, k, cluster=cluster, **sections)
        return plan.memory

    few, many = sorted(draw.sample(RANKS, 2))
    now = memory(b, length, few)
    assert needs_no_more(memory(b, length, many), now), (
        architecture,
        config,
        sections,
        b,
        length,
        few,
        many,
    )
    assert needs_no_more(now, memory(2 * b, length, few))
    assert needs_no_more(now, memory(b, 2 * length, few))
