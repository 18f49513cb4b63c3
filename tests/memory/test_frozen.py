"""Adapters and frozen weights: the closed form says what the trace of the real step says."""

import statistics
from typing import Any

import pytest

from drumline.architectures.known_models import known_config
from drumline.recipe.load import merge
from memory.family_grid import Cell, _trace, diagonal
from memory.plans import SMALL, small_plan

LORA = {"adapter": {"rank": 8}}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", LORA),
    "dropout": ("llama", {"adapter": {"rank": 8, "dropout": 0.1}}),
    "two targets": ("llama", {"adapter": {"rank": 8, "targets": ["q_proj", "v_proj"]}}),
    "norms too": ("qwen3", {"adapter": {"rank": 4, "rslora": True, "train_also": ["*norm*"]}}),
    "dora": ("llama", {"adapter": {"rank": 8, "dora": True}}),
    "nf4": ("llama", {**LORA, "quantization": "nf4"}),
    "int8": ("mistral", {**LORA, "quantization": "int8"}),
    "conv1d": ("gpt2", LORA),
    "experts": ("mixtral", LORA),
    "latent": ("deepseek_v3", LORA),
    "classifier": ("bert", LORA),
    "capped": ("gemma2", LORA),
    "frozen": ("llama", {"frozen": ["model.embed_tokens.*", "model.layers.0.*", "model.layers.1.*"]}),
    "a name in all layers": ("mistral", {"frozen": ["*.self_attn.*", "lm_head.*"]}),
}  # fmt: skip


def cells(kind: str) -> list[Cell]:
    """Three combinations of shape, precision and strategy."""
    architecture, model = KINDS[kind]
    found = []
    for one in diagonal():
        sections = merge(one, {"model": model})
        plan = small_plan(architecture, **sections)
        found.append(Cell(architecture, sections, plan, _trace(plan, architecture)))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_form_is_the_trace(kind: str) -> None:
    """Median ≤ 1.5 %, none above 5 %, and far below a training of all weights."""
    errors = []
    for cell in cells(kind):
        assert cell.plan.memory.method == "closed-form"
        errors.append(abs(cell.error))
        whole = small_plan(cell.architecture, **merge(cell.sections, {"model": {"adapter": None, "frozen": [], "quantization": "none"}}))  # fmt: skip
        mine, theirs = cell.plan.memory.parts, whole.memory.parts
        assert mine["optimizer"] < theirs["optimizer"]
        assert mine["gradients"] <= theirs["gradients"]
    assert statistics.median(errors) <= (0.035 if kind == "classifier" else 0.015)
    assert max(errors) <= 0.05


def test_adapters_of_an_encoder_and_decoder() -> None:
    """T5 within 2 %; with checkpointed layers the closed form was too low by 9 %, so there is none."""
    for precision, strategy in (("fp32", "fsdp"), ("bf16", "ddp"), ("bf16-pure", "fsdp")):
        sections = {
            "precision": precision,
            "strategy": {"name": strategy},
            "b": 2,
            "length": 192,
            "gpus": 4,
            "model": LORA,
        }
        plan = small_plan("t5", **sections)
        assert plan.memory.method == "closed-form"
        assert abs(Cell("t5", sections, plan, _trace(plan, "t5")).error) <= 0.02
    full = {"adapter": {"rank": 8}, "activation_checkpointing": "full"}
    assert small_plan("t5", model=full).memory.method == "unknown"


def test_what_people_report_fits() -> None:
    """LoRA of Llama 3 8B on a card of 24 GB, QLoRA of 70B on one of 80 GB, and neither without."""
    for name, gpu, model in (
        ("meta-llama/Meta-Llama-3-8B", "rtx-4090", LORA),
        ("meta-llama/Meta-Llama-3-70B", "h100-80gb", {**LORA, "quantization": "nf4"}),
    ):
        config = known_config(name)
        assert config
        fields = {k: v for k, v in config.items() if k in SMALL["llama"]}
        common = {"cluster": {"gpu": gpu}, "loss": {"chunked": True}}
        verdicts = []
        for own in (model, {"adapter": None, "quantization": "none"}):
            sections = {"model": {"activation_checkpointing": "full", **own}}
            plan = small_plan("llama", fields, b=1, length=2048, **merge(common, sections))
            verdicts.append(plan.memory.verdict)
        assert verdicts == ["fits", "does_not_fit"], name


def test_names_that_only_the_built_model_knows_are_traced() -> None:
    """Patterns over parameters that the closed form does not know by name: unknown, not wrong."""
    plan = small_plan("gpt2", model={"frozen": ["transformer.h.0.ln_1.*"]})
    assert plan.memory.method == "unknown"
    assert "known by name" in plan.memory.why
    assert small_plan("gpt_neox", model={"frozen": ["gpt_neox.embed_in.*"]}).memory.fits is None
