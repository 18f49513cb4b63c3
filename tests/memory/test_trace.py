"""The trace: fake tensors allocate what real ones do, and the closed form says the same."""

import json
import random
import statistics
from typing import Any

import pytest

from drumline.architectures.shapes import ACTIVATIONS
from drumline.errors import PlanError
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve
from drumline.recipe.load import load_recipe
from drumline.trace.rehearse import blank_manifest, rehearse
from drumline.train.models.build import build_model
from memory.plans import BERT, FULL, SMALL, random_plan, small_plan

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama bf16": ("llama", {}),
    "llama fp32, shared heads": ("llama", {"precision": "fp32"}),
    "llama bf16-pure, checkpointed": ("llama", {**FULL, "precision": "bf16-pure"}),
    "qwen3 bf16, checkpointed": ("qwen3", FULL),
    "gpt2 bf16 with dropout": ("gpt2", {}),
    "gpt2 fp32, checkpointed": ("gpt2", {**FULL, "precision": "fp32"}),
    "mixtral bf16-pure": ("mixtral", {"precision": "bf16-pure"}),
    "qwen3_moe bf16, chunked": ("qwen3_moe", {"loss": {"chunked": True}}),
    "bert bf16": ("bert", {}),
    "vit bf16": ("vit", {}),
    "llama eager, two micro-batches": ("llama", {"model": {"attention": "eager"}, "k": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_fake_tensors_allocate_what_real_ones_do(name: str) -> None:
    """The same bytes at the same peak, and the same blocks of the same sizes, to the byte."""
    architecture, changes = CASES[name]
    plan = small_plan(architecture, **changes)
    fake, real = rehearse(plan), rehearse(plan, fake=False)
    assert fake.peak(1).bytes == real.peak(1).bytes > 0
    assert fake.peaks_by_phase(1) == real.peaks_by_phase(1)
    large = [[size for _, size, _ in r.events if size > 4096] for r in (fake, real)]
    assert large[0] == large[1]


def traced_bytes(**changes: Any) -> int:
    return rehearse(small_plan("llama", **changes)).peak().bytes


def test_accumulating_under_fsdp_costs_a_shard_of_gradients() -> None:
    """Gradients are scattered at every micro-batch: k = 4 needs an eighth of them more, not all."""
    sharded = {"strategy": {"name": "fsdp"}, "gpus": 8}
    plan = small_plan("llama", **sharded)
    assert plan.cost.parameters
    shard = 4 * plan.cost.parameters / 8
    more = traced_bytes(**sharded, k=4) - traced_bytes(**sharded)
    assert 0 <= more < 1.2 * shard


def test_accumulating_under_ddp_costs_nothing() -> None:
    """Gradients stay in the buckets, which are there anyway."""
    once, often = traced_bytes(gpus=2), traced_bytes(gpus=2, k=4)
    assert often == pytest.approx(once, rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gpus": 2},
        {"gpus": 8, "strategy": {"name": "fsdp"}},
        {"gpus": 16, "strategy": {"name": "fsdp", "shard": "node"}},
    ],
)
def test_the_last_micro_batch_needs_what_two_in_a_row_do(changes: dict[str, Any]) -> None:
    """The trace plays one, with gradients as they are by then; the real engine's two agree with it."""
    plan = small_plan("llama", **changes, k=2)
    one, two = (rehearse(plan, micro_batches=count).peak().bytes for count in (1, 2))
    assert two == pytest.approx(one, rel=5e-3)


@pytest.mark.parametrize(
    ("reshard", "reduce"),
    [("backward", "micro_batch"), ("step", "micro_batch"), ("forward", "step"), ("step", "step")],
)
@pytest.mark.parametrize("shard", ["all", "node"])
def test_kept_weights_and_whole_gradients_are_counted(
    reshard: str, reduce: str, shard: str
) -> None:
    """What FSDP2 keeps between layers and micro-batches: the closed form is the trace, and more than without."""
    own = [f"strategy.reshard={reshard}", f"strategy.reduce={reduce}"]
    common = ["model.config.num_hidden_layers=4", "batch.effective=48", "batch.accumulation=3",
              f"strategy.shard={shard}", "cluster.gpus_per_node=4"]  # fmt: skip
    plan = resolve(load_recipe("llama-8b-8xh100", [*common, *own]))
    assert abs(error_of(plan)) <= 0.01
    plain = resolve(load_recipe("llama-8b-8xh100", common))
    assert max(plan.memory.phases.values()) > 1.01 * max(plain.memory.phases.values())


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(
    ("architecture", "key"), [("gpt2", "activation_function"), ("llama", "hidden_act")]
)
def test_every_activation_has_its_closed_form(architecture: str, key: str, name: str) -> None:
    """What its backward needs, its input, its output or one tensor a term, is what the trace finds."""
    config = {**SMALL[architecture], key: name}
    assert abs(error_of(small_plan(architecture, config, b=4, length=256))) <= 0.01


def error_of(plan: Plan) -> float:
    """Closed form over trace, less one; cuBLAS' workspace is in neither."""
    found = plan.memory.phases
    workspace = plan.memory.parts["workspace"]
    traced = rehearse(plan).peak().bytes
    return (max(found.values()) - workspace) / traced - 1


def test_the_closed_form_is_the_trace_on_shapes_it_has_never_seen() -> None:
    """Over 16 random shapes, precisions and strategies: median error ≤ 1 %, none above 4 %."""
    draw = random.Random(20261124)
    errors = {}
    for _ in range(16):
        words, plan = random_plan(draw)
        errors[words] = error_of(plan)
    worst = max(errors, key=lambda words: abs(errors[words]))
    sizes = [abs(error) for error in errors.values()]
    print(
        f"median {100 * statistics.median(sizes):.2f} %, worst {100 * errors[worst]:+.2f} %: {worst}"
    )
    assert statistics.median(sizes) <= 0.01
    assert max(sizes) <= 0.04, f"{worst}: {100 * errors[worst]:+.2f} %"


@pytest.mark.parametrize(
    ("architecture", "name"), [("dinov2", "mask_token"), ("siglip", "vision_model.head.probe")]
)
def test_ddp_cannot_train_weights_that_the_loss_does_not_use(architecture: str, name: str) -> None:
    """The trace and the warm-up say so, and what helps; torch's DDP would fail at its second micro-batch."""
    with pytest.raises(
        PlanError, match=rf"the loss does not use .*{name}.*Nearest: strategy.name=fsdp"
    ) as error:
        rehearse(small_plan(architecture, gpus=2))
    patterns = json.loads(str(error.value).partition("model.frozen=")[2])
    assert rehearse(small_plan(architecture, gpus=2, model={"frozen": patterns})).traced().peak
    assert rehearse(small_plan(architecture, gpus=2, strategy={"name": "fsdp"})).traced().peak
    assert rehearse(small_plan("vit", gpus=2)).traced().peak


CONVNEXT = {"hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 3, 2], "image_size": 64}


@pytest.mark.parametrize("architecture", ["convnext", "resnet", "deberta"])
def test_what_has_no_closed_form_is_traced(architecture: str) -> None:
    """Convolutions and attention of a model's own, which transformers' scaled_dot_product_attention lacks."""
    config = {"convnext": CONVNEXT, "resnet": {k: v for k, v in CONVNEXT.items() if k != "image_size"},
              "deberta": {**BERT, "relative_attention": True, "pos_att_type": "c2p|p2c"}}[architecture]  # fmt: skip
    image = {"sequence_length": None} if architecture != "deberta" else {}
    data = {"task": "classification", **image}
    plan = small_plan(architecture, config, data=data)
    assert plan.memory.verdict == "unknown"
    assert rehearse(plan).traced().peak > 4 * 4 * sum_of_parameters(plan)


def sum_of_parameters(plan: Plan) -> int:
    model = build_model(plan.recipe, blank_manifest(plan)).model
    return sum(p.numel() for p in model.parameters())
