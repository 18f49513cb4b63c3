"""NEFTune under every engine: the same noise for a row at any split, and none where nothing trains."""

import math
from typing import Any

import pytest
import torch
from arena import PARITY, SPLITS, STEPS, Arena
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    ViTConfig,
)

from advice import heard
from drumline.errors import PlanError
from drumline.plan.model import Plan
from drumline.train.models.embedding_noise import EmbeddingNoise
from memory.family_grid import Cell, _trace
from memory.plans import small_plan

pytestmark = [pytest.mark.xdist_group("kinds"), pytest.mark.heavy]

ENGINES = ["ddp", "fsdp", "accelerate", "zero2", "zero3"]
FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 257,
}
LLAMA = {"source": "config", "architecture": "llama", "config": FIELDS}
ALPHA = 5.0


def plan_of(
    arena: Arena, engine: str, split: tuple[int, int, int], alpha: float | None = ALPHA, **more: Any
) -> Plan:
    held = {"data": {"validation": 0.1}, "evaluation": {"every_steps": 8, "per_device": 2}}
    return arena.plan(engine, split, model={**LLAMA, "neftune_alpha": alpha, **more}, **held)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("neftune"))
    for engine, split in PARITY:
        made.ask("train", f"{engine}-{split}", plan_of(made, engine, split))
    for engine in ENGINES:
        made.ask("train", f"stopped-{engine}", plan_of(made, engine, (3, 2, 2)), stop_after=5)
    made.ask("train", "without", plan_of(made, "ddp", (3, 2, 2), None))
    made.ask("train", "lora", plan_of(made, "fsdp", (3, 2, 2), adapter={"rank": 4}))
    made.ask("train", "lora-alone", plan_of(made, "ddp", (6, 1, 2), adapter={"rank": 4}))
    made.ask("verify", "verify", plan_of(made, "zero2", (2, 2, 3)), fault="")
    made.go()
    for engine in ENGINES:
        made.ask("train", f"stopped-{engine}", plan_of(made, engine, (3, 2, 2)))
    made.go()
    return made


def losses(arena: Arena, name: str) -> list[float]:
    return [line["loss"] for line in arena.lines(name)]


@pytest.mark.parametrize(("engine", "split"), PARITY, ids=str)
def test_the_noise_of_a_row_is_the_same_at_every_split(
    arena: Arena, engine: str, split: tuple[int, int, int]
) -> None:
    """Though rows are padded to other widths beside other rows."""
    found = losses(arena, f"{engine}-{split}")
    assert len(found) == STEPS
    assert found == pytest.approx(losses(arena, f"ddp-{SPLITS[0]}"), abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_resumes_bitwise(arena: Arena, engine: str) -> None:
    """Stopped after step 5."""
    assert losses(arena, f"stopped-{engine}") == losses(arena, f"{engine}-(3, 2, 2)")


def test_there_is_noise_in_training_alone(arena: Arena) -> None:
    """It moves the first loss; with adapters too; verification compares the step without it."""
    noisy, plain = losses(arena, "ddp-(3, 2, 2)"), losses(arena, "without")
    assert noisy[0] != plain[0]
    assert losses(arena, "lora") == pytest.approx(losses(arena, "lora-alone"), abs=1e-5)
    assert arena.verdict("verify") == (True, True)


def test_its_size_is_that_of_the_paper() -> None:
    """Uniform within alpha / √(L·d) of each row's own L; another row, step or place has other noise."""
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**FIELDS))
    noise = EmbeddingNoise(model, ALPHA, 7, longest=40)
    embedding = model.requires_grad_(False).get_input_embeddings()
    ids = torch.randint(0, 257, (3, 30))
    plain = embedding(ids)
    lengths = torch.tensor([30, 10, 1])

    def drawn(step: int, slot: int, rows: slice = slice(None), width: int = 30) -> torch.Tensor:
        noise.begin(step, slot, lengths[rows])
        found = embedding(ids[rows, :width]) - plain[rows, :width]
        noise.end()
        return found

    first = drawn(4, 100)
    for row, length in enumerate(lengths.tolist()):
        most = ALPHA / math.sqrt(length * 32)
        assert first[row].abs().max() <= most * 1.0001
        assert first[row].std() == pytest.approx(most / math.sqrt(3), rel=0.1)
    alone = drawn(4, 101, slice(1, 2), width=12)
    assert torch.allclose(alone[0], first[1, :12], atol=1e-6)
    assert not torch.allclose(drawn(5, 100), first, atol=1e-3)
    assert torch.equal(embedding(ids), plain)
    with pytest.raises(PlanError) as told:
        EmbeddingNoise(AutoModelForImageClassification.from_config(ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)), ALPHA, 7, 40)  # fmt: skip
    heard("has no embedding of tokens. Nearest: model.neftune_alpha=null", str(told.value))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_it_costs_is_small_beside_the_peak(strategy: str) -> None:
    """It is freed before the first layer has kept anything: the closed form leaves it out, within 0.5 %."""
    sections = {"strategy": {"name": strategy}, "model": {"neftune_alpha": ALPHA}}
    plan = small_plan("llama", **sections)
    assert abs(Cell("llama", sections, plan, _trace(plan, "llama")).error) <= 0.005
