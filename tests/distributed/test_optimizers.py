"""Every optimizer under the strategies that it goes with: one curve at any split, the same bits after a resume."""

from typing import Any

import pytest
import torch
from arena import STEPS, Arena
from whole_tensors import whole_tensors

from drumline.errors import PlanError
from drumline.plan.model import Plan
from drumline.plan.optimizers import OPTIMIZERS
from pretrained_folders import saved

pytestmark = [pytest.mark.xdist_group("matrix"), pytest.mark.heavy]

LLAMA = {"hidden_size": 80, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 257}  # fmt: skip
GROUPS = [
    {"match": "*norm*", "weight_decay": 0.1},
    {"match": "model.embed_tokens.*", "lr_ratio": 0.5},
]
RULES: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"lr": 0.005, "weight_decay": 0.1},
    "adafactor": {"lr": 0.01},
    "lion": {"lr": 0.001, "weight_decay": 0.1},
    "muon": {"lr": 0.005, "weight_decay": 0.1},
    "adamw": {"lr": 0.005, "weight_decay": 0.1, "groups": GROUPS, "layer_decay": 0.7},
}
TRIED = ["ddp", "fsdp", "accelerate", "zero2", "zero3"]
TOLERANCE = {"adamw_8bit": 2e-4, "lion": 2e-4}
"""Of losses; a rounding moves a code of 8 bits, or turns the sign of a small direction."""
SPLITS = {
    "ddp": (6, 1, 2),
    "fsdp": (2, 2, 3),
    "accelerate": (3, 2, 2),
    "zero2": (3, 2, 2),
    "zero3": (2, 2, 3),
}


def engines_of(rule: str) -> list[str]:
    legal = OPTIMIZERS[rule].strategies
    return [one for one in TRIED if ("ddp" if one == "accelerate" else one) in legal]


def plan_of(
    arena: Arena, rule: str, engine: str, split: tuple[int, int, int] | None = None
) -> Plan:
    folder = arena.folder / "llama"
    if not folder.exists():
        saved(folder, "AutoModelForCausalLM", "llama", LLAMA)
    return arena.plan(
        engine,
        split or SPLITS[engine],
        model={"source": "folder", "path": str(folder)},
        optimizer={"name": rule, **RULES[rule]},
    )


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("optimizers"))
    stopped = [(rule, "fsdp" if "fsdp" in engines_of(rule) else "ddp") for rule in RULES]
    for rule in RULES:
        for engine in engines_of(rule):
            made.ask("train", f"{rule}-{engine}", plan_of(made, rule, engine))
    for rule, engine in stopped:
        made.ask("train", f"stopped-{rule}", plan_of(made, rule, engine), stop_after=5)
    made.ask("train", "moved", plan_of(made, "adamw_8bit", "ddp", (6, 1, 2)), stop_after=4)
    made.go()
    for rule, engine in stopped:
        made.ask("train", f"stopped-{rule}", plan_of(made, rule, engine))
    made.ask("train", "moved", plan_of(made, "adamw_8bit", "fsdp"))
    made.go()
    return made


CASES = [(rule, engine) for rule in RULES for engine in engines_of(rule)]


@pytest.mark.parametrize(("rule", "engine"), CASES, ids=str)
def test_every_engine_is_one_curve(arena: Arena, rule: str, engine: str) -> None:
    """The losses of one process; the loss falls."""
    ours, reference = arena.lines(f"{rule}-{engine}"), arena.lines(f"{rule}-ddp")
    assert len(ours) == STEPS
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.02
    for mine, theirs in zip(ours, reference, strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < TOLERANCE.get(rule, 2e-5) * theirs["loss"]


@pytest.mark.parametrize("rule", RULES)
def test_a_resume_goes_on_bitwise(arena: Arena, rule: str) -> None:
    """Stopped after step 5: every state tensor was saved, codes and scales among them."""
    engine = "fsdp" if "fsdp" in engines_of(rule) else "ddp"
    runs = [
        arena.folder / name / f"checkpoints/step-{STEPS:08d}"
        for name in (f"stopped-{rule}", f"{rule}-{engine}")
    ]
    stopped, straight = (whole_tensors(run, "") for run in runs)
    assert stopped.keys() == straight.keys()
    assert all(torch.equal(stopped[name], straight[name]) for name in straight)
    assert [line["loss"] for line in arena.lines(f"stopped-{rule}")] == [
        line["loss"] for line in arena.lines(f"{rule}-{engine}")
    ]


def test_eight_bits_are_few_bytes_and_move_to_another_split(arena: Arena) -> None:
    """Codes of the weight's shape and a scale for each 256 of a row; saved by one rank, resumed on two shards."""
    held = whole_tensors(
        arena.folder / f"adamw_8bit-ddp/checkpoints/step-{STEPS:08d}", "optimizer."
    )
    name = "optimizer.model.layers.0.mlp.up_proj.weight.exp_avg"
    assert held[f"{name}_code"].dtype == torch.uint8
    assert held[f"{name}_code"].shape == (96, 80)
    assert held[f"{name}_scale"].shape == (96, 1)
    assert held["optimizer.lm_head.weight.exp_avg_sq_code"].shape == (257, 80)
    assert held["optimizer.model.norm.weight.exp_avg"].dtype == torch.float32
    moved, reference = arena.lines("moved"), arena.lines("adamw_8bit-ddp")
    for mine, theirs in zip(moved, reference, strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < 2e-4 * theirs["loss"]


def test_a_strategy_that_cannot_is_refused(arena: Arena) -> None:
    """By name, with those that can; torch's Adafactor needs whole tensors, ZeRO's partitions are flat."""
    for rule, engine in (("adafactor", "fsdp"), ("muon", "zero2"), ("adamw_8bit", "zero3")):
        with pytest.raises(
            PlanError, match=f"optimizer.name: {rule} does not go with strategy {engine}"
        ):
            plan_of(arena, rule, engine)
