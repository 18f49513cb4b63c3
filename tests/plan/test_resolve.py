"""resolve(recipe, world) -> Plan: defined behaviour or one clear error for every corner."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from conftest import tiny_recipe
from drumline.architectures.known_models import known_config
from drumline.errors import PlanError
from drumline.plan.advise import with_advice
from drumline.plan.model import Plan, read_plan
from drumline.plan.resolve import resolve
from drumline.plan.resplit import on_gpus
from drumline.plan.schedule import rate
from drumline.plan.world import World
from drumline.recipe import catalogue
from drumline.recipe.load import load_recipe, validate
from drumline.recipe.schema import Recipe

LLAMA = {
    "source": "config", "architecture": "llama", "factory": None,
    "config": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
               "num_attention_heads": 8, "vocab_size": 1000},
}  # fmt: skip
TEXT = {"source": "files", "name": None, "path": "/x/*.txt", "task": "causal_lm",
        "sequence_length": 128, "samples": None, "validation": 0.1}  # fmt: skip


def plan_of(world: World = World(), **changes: Any) -> Plan:  # noqa: B008
    return resolve(validate(tiny_recipe(**changes), "r.yaml"), world)


def shipped(name: str) -> tuple[Recipe, World]:
    """A shipped recipe, with the published config of its model."""
    recipe = load_recipe(name)
    return recipe, World(
        model_config=known_config(recipe.model.name) if recipe.model.name else None
    )


@pytest.mark.parametrize("name", catalogue.names())
def test_every_shipped_recipe_resolves_and_its_description_states_its_split(name: str) -> None:
    """The equation in a recipe's description is the one that the plan checks."""
    plan = resolve(*shipped(name))
    words = plan.recipe.description.replace(",", "")
    b = plan.batch
    assert plan.memory.fits is not False
    assert str(b.effective) in words
    for number, noun in (
        (b.per_device, "per_device"),
        (b.gpus, "gpu"),
        (b.accumulation, "accumulation"),
    ):
        stated = f"{number} {noun}" in words or f"× {number}" in words or f"= {number} ×" in words
        assert stated or (name == "eighty" and "five CPU" in words), (number, noun)


def test_the_worked_example_at_two_splits() -> None:
    """32 × 1 × 1 and 8 × 1 × 4: 313 steps an epoch, 1,565 in all, the same training."""
    one = resolve(load_recipe("worked-example"))
    four = resolve(load_recipe("worked-example", ["batch.per_device=8", "batch.accumulation=4"]))
    for plan in (one, four):
        assert (plan.steps.per_epoch, plan.steps.total, plan.steps.last_batch) == (313, 1565, 16)
        assert plan.clock().epoch(363) == 2
    assert one.training_sha256 == four.training_sha256
    assert one.recipe_sha256 != four.recipe_sha256
    rates = [[rate(p.schedule, t, p.clock()) for t in range(1, 1566)] for p in (one, four)]
    assert rates[0] == rates[1]
    drop = resolve(
        load_recipe("worked-example", ["batch.remainder=drop", "evaluation.every_steps=9"])
    )
    assert drop.steps.per_epoch == 312


def test_another_worked_example() -> None:
    """4 × 5 × 4 = 80."""
    assert resolve(load_recipe("eighty")).batch.effective == 80


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": {"effective": 10, "per_device": 4}}, r"4 per_device × 2 gpus × k cannot make effective 10"),
        ({"batch": {"effective": 20000, "per_device": 1, "remainder": "drop"}},
         r"drop leaves no step: effective 20000 > 10000 samples. Nearest: .*effective 10000"),
        ({"schedule": {"name": "cosine", "warmup_steps": 21}}, r"warmup_steps: 21 > 20 steps"),
        ({"schedule": {"name": "wsd", "warmup_steps": 18}}, r"warm-up 18 \+ decay 4 = 22 > 20 steps"),
        ({"cluster": {"gpus_per_node": 8}, "batch": {"effective": 48, "per_device": 1, "gpus": 12}},
         r"gpus_per_node: 8 does not divide 12 gpus \(12 / 8 = 1.50\). Nearest: gpus 16; or gpus_per_node 6"),
        ({"cluster": {"gpus_per_node": 2, "nodes": 2}}, r"2 nodes × 2 gpus_per_node = 4, not gpus 2"),
        ({"cluster": {"gpu": "a100"}},
         r"'a100' is not in the table. Did you mean 'a100-40gb' or 'a100-80gb'\? .*states one that it lacks"),
        ({"launch": {"launcher": "torchrun"}, "strategy": {"name": "zero2"}},
         r"zero2 does not go with launcher torchrun. torchrun: ddp, fsdp"),
        ({"data": {"samples": None}, "duration": {"steps": None, "epochs": 2}},
         r"duration.epochs: the number of steps is unknown .*drumline prepare"),
        ({"data": {"samples": None}, "schedule": {"unit": "epoch"}}, r"unit: epoch needs the number of samples"),
        ({"model": {"sync_batchnorm": True}}, r"sync_batchnorm.*needs a GPU"),
        ({"model": {"sync_batchnorm": True}, "strategy": {"name": "fsdp"}}, r"sync_batchnorm goes with strategy ddp"),
    ],
)  # fmt: skip
def test_what_is_impossible_is_refused(changes: dict[str, Any], message: str) -> None:
    """One error each, with the arithmetic and the nearest legal recipe."""
    with pytest.raises(PlanError, match=message):
        plan_of(**changes)


def test_an_effective_batch_above_the_samples() -> None:
    """keep: steps of N, and a warning; carry: a step spans epochs."""
    batch = {"effective": 20000, "per_device": 10000}
    keep = plan_of(batch=batch, duration={"steps": None, "epochs": 3})
    assert (keep.steps.total, keep.steps.last_batch, keep.steps.forwards_per_step) == (3, 10000, 1)
    assert "every step takes all 10000" in keep.warnings[-1]
    carry = plan_of(batch={**batch, "remainder": "carry"}, duration={"steps": None, "epochs": 3})
    assert carry.steps.total == 2


def test_duration_in_tokens() -> None:
    """The first step that reaches it: 128 tokens a row, 12 rows a step."""
    world = World(samples=100, cache="/c", fingerprint="f")
    plan = plan_of(world, data=TEXT, model=LLAMA, duration={"steps": None, "tokens": 128 * 100 + 1})
    assert (plan.steps.per_epoch, plan.steps.total) == (9, 10)
    assert plan.steps.tokens_per_step == 12 * 128


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_the_rate_scales_with_the_batch(rule: str, factor: float) -> None:
    """lr × B/ref or its root, shown as derived; the split has no part in it."""
    scaling = {"rule": rule, "reference_batch": 3}
    plan = plan_of(optimizer={"lr_scaling": scaling})
    assert plan.schedule.peak_lr == pytest.approx(factor * 1e-3)
    assert plan.schedule.base_lr == 1e-3
    other = plan_of(optimizer={"lr_scaling": scaling}, batch={"per_device": 1, "gpus": 4})
    assert other.schedule == plan.schedule


def test_split_invariance_is_told_with_its_reason() -> None:
    """BatchNorm, dropout and fp16 break it; GPT-2's defaults have dropout."""
    assert plan_of().split_invariance.level == "rounding"
    assert "fp16" in plan_of(precision="fp16").split_invariance.why
    norm = plan_of(World(batchnorm="yes"))
    assert norm.split_invariance.level == "none"
    assert "BatchNorm sees 3 samples at a time, fewer than 8" in norm.warnings[-1]
    assert "GroupNorm" in norm.warnings[-1]
    gpt2 = {**LLAMA, "architecture": "gpt2", "config": {}}
    assert "dropout 0.1" in plan_of(model=gpt2, data=TEXT).split_invariance.why
    quiet = {**gpt2, "config": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}}
    assert plan_of(model=quiet, data=TEXT).split_invariance.level == "rounding"


def test_two_numbers_are_solved_by_the_memory_estimate() -> None:
    """On a larger GPU the same recipe gets a larger micro-batch and the same effective batch."""
    big = {**LLAMA, "config": {**LLAMA["config"], "hidden_size": 1024, "intermediate_size": 4096,
                               "num_hidden_layers": 16, "vocab_size": 128256}}  # fmt: skip
    batch = {"effective": 1024, "per_device": None, "gpus": 8}
    data = {**TEXT, "sequence_length": 2048}
    found = {
        gpu: plan_of(batch=batch, model=big, data=data, precision="bf16", cluster={"gpu": gpu})
        for gpu in ("a100-40gb", "h100-80gb", "b200")
    }
    sizes = [found[gpu].batch.per_device for gpu in found]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3
    for plan in found.values():
        assert plan.batch.split.effective == 1024
        assert plan.memory.verdict == "fits"
        larger = {**batch, "per_device": 2 * plan.batch.per_device}
        gpu = {"gpu": plan.recipe.cluster.gpu}
        twice = plan_of(batch=larger, model=big, data=data, precision="bf16", cluster=gpu)
        assert twice.memory.verdict != "fits"


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {**LLAMA, "edits": ["mine:freeze"]}},
        {"objective": {"name": "custom", "factory": "mine:freeze"}},
        {"data": {**TEXT, "task": "custom", "task_factory": "mine:freeze"}},
    ],
)
def test_code_of_the_project_makes_the_estimate_unknown(changed: dict[str, Any]) -> None:
    """An edit, an objective or a task that the closed form cannot see is never estimated as if it were not there."""
    plan = plan_of(**{"model": LLAMA, "data": TEXT, **changed})
    assert (plan.memory.fits, plan.memory.device, plan.cost.flops_per_step) == (None, None, None)
    assert any("mine:freeze" in line and "--trace" in line for line in plan.warnings)


def test_what_does_not_fit_is_advised_with_plans_that_do() -> None:
    """Every advice keeps the effective batch and was re-planned; applying it gives its number."""
    recipe = load_recipe("llama-1b-8xh100", ["batch.per_device=16", "batch.accumulation=4"])
    plan = with_advice(resolve(recipe), World())
    assert plan.memory.fits is False
    assert plan.advice
    for advice in plan.advice:
        overrides = [
            f"{section}.{key}={json.dumps(value)}"
            for section, values in advice.change.items()
            for key, value in values.items()
        ]
        both = ["batch.per_device=16", "batch.accumulation=4", *overrides]
        again = resolve(load_recipe("llama-1b-8xh100", both))
        assert again.memory.device
        assert again.memory.device.high == advice.device_high
        assert again.memory.fits
        assert again.batch.effective == 512


def test_gpus_resplits_at_the_same_effective_batch() -> None:
    """--gpus N: the same training; what cannot be divided is refused with the nearest counts."""
    recipe = load_recipe("llama-8b-8xh100")
    for gpus in (4, 8, 16, 32, 64, 128, 256):
        plan = resolve(on_gpus(recipe, gpus, None, World()))
        assert plan.batch.split.effective == 256
        assert plan.batch.nodes == max(1, gpus // 8)
        assert plan.training_sha256 == resolve(recipe).training_sha256
    with pytest.raises(PlanError, match=r"24 gpus × b × k cannot make effective 256"):
        on_gpus(recipe, 24, None, World())
    smaller = resolve(on_gpus(recipe, None, "a100-40gb", World()))
    assert smaller.batch.effective == 256
    assert smaller.recipe.cluster.gpu == "a100-40gb"


def test_plan_json_is_the_published_one() -> None:
    """to_json validates against the published schema and reads back equal."""
    schema = TypeAdapter(Plan).json_schema()
    for name in catalogue.names():
        plan = resolve(*shipped(name))
        jsonschema.validate(json.loads(plan.to_json()), schema)
        assert read_plan(plan.to_json()) == plan
    keys = json.loads(plan.to_json())
    assert set(keys) >= {"plan_version", "recipe", "recipe_sha256", "training_sha256", "split_invariance",
                         "batch", "steps", "memory", "schedule", "cost", "advice", "warnings"}  # fmt: skip
    with pytest.raises(PlanError, match="plan_version 99"):
        read_plan(json.dumps({**keys, "plan_version": 99}))


def test_a_resolved_recipe_plans_the_same_by_itself() -> None:
    """recipe.yaml of a run folder resolves to the same plan."""
    for name in catalogue.names():
        recipe, world = shipped(name)
        plan = resolve(recipe, world)
        assert resolve(plan.recipe, world) == plan


def test_hashes_ignore_paths_logging_and_description(tmp_path: Path) -> None:
    """The same recipe in another folder has the same hash; another rate has not."""
    base = plan_of()
    same = plan_of(project=str(tmp_path), description="other", logging={"every_steps": 3})
    assert same.recipe_sha256 == base.recipe_sha256
    for change in ({"optimizer": {"lr": 2e-3}}, {"seed": 6}, {"batch": {"effective": 24}}):
        assert plan_of(**change).training_sha256 != base.training_sha256
    fsdp = plan_of(strategy={"name": "fsdp"}, cluster={"gpu": "h200"}, batch={"gpus": 4})
    assert fsdp.training_sha256 == base.training_sha256


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": "abc"}, "hidden_size: 'abc' is text, llama takes a whole number"),
        ({"hidden_size": -128}, "hidden_size: -128"),
        ({"vocab_size": 1.5}, "vocab_size: 1.5"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0"),
        ({"num_attention_heads": 7}, r"512 hidden / 7 heads = 73.14.* Nearest: 511 or 518"),
        ({"attention_dropout": "abc"}, "attention_dropout: 'abc'"),
        (
            {"num_hidden_layer": 2},
            r"num_hidden_layer: llama has no such key. Did you mean 'num_hidden_layers'",
        ),
    ],
)
def test_wrong_widths_of_a_known_model_are_refused(config: dict[str, Any], message: str) -> None:
    """A value that cannot be a width, and a key that is nearly a known one."""
    with pytest.raises(PlanError, match=message):
        plan_of(model={**LLAMA, "config": {**LLAMA["config"], **config}}, data=TEXT)


def test_learned_positions_bound_the_sequence() -> None:
    """GPT-2 with 64 positions cannot read 128 tokens."""
    model = {**LLAMA, "architecture": "gpt2", "config": {"n_positions": 64}}
    with pytest.raises(PlanError, match=r"sequence_length: 128 > 64 positions.*n_positions 128"):
        plan_of(model=model, data=TEXT)


def test_sharded_sgd_takes_the_kernel_that_exists() -> None:
    """Unset: foreach; stated fused: refused with the nearest."""
    sgd = {"name": "sgd", "lr": 0.1}
    fsdp = {"name": "fsdp"}
    assert plan_of(optimizer=sgd, strategy=fsdp).recipe.optimizer.implementation == "foreach"
    assert plan_of(optimizer=sgd).recipe.optimizer.implementation == "fused"
    with pytest.raises(PlanError, match="Nearest: foreach"):
        plan_of(optimizer={**sgd, "implementation": "fused"}, strategy=fsdp)


def test_the_mode_of_early_stopping_follows_its_metric() -> None:
    """Accuracy is better when larger, loss when smaller, unless stated."""
    evaluation = {"every_steps": 5}
    for metric, mode in (("eval/accuracy", "max"), ("eval/loss", "min")):
        plan = plan_of(evaluation=evaluation, early_stopping={"metric": metric})
        assert plan.recipe.early_stopping
        assert plan.recipe.early_stopping.mode == mode


def test_nodes_follow_a_resplit_in_both_directions() -> None:
    """What was derived is not read back as stated: 2 ranks to 3, 4 or 1, always one CPU node."""
    stored = plan_of(batch={"effective": 24, "per_device": 2, "gpus": 2}).recipe
    for gpus in (1, 3, 4, 8, 12):
        plan = resolve(on_gpus(stored, gpus, None, World()))
        assert (plan.batch.gpus, plan.batch.nodes) == (gpus, 1)
    assert plan_of(batch={"effective": 36, "per_device": 3, "gpus": 12}).batch.nodes == 1
    gpus = plan_of(batch={"effective": 36, "per_device": 3, "gpus": 12}, cluster={"gpu": "h200"})
    assert gpus.batch.nodes == 2


def test_the_nearest_fixes_are_legal_under_the_cluster_too() -> None:
    """Random batch and cluster sections: every suggested number of GPUs, applied, plans."""
    import random
    import re

    rng = random.Random(3)
    applied = 0
    for _ in range(1500):
        per_node, low = rng.choice([None, 1, 2, 4, 8]), rng.choice([1, 2])
        nodes = rng.choice([None, 1, 2, 3, {"min": low, "max": low + rng.choice([0, 1, 2])}])
        batch = {"effective": rng.randint(1, 64), "per_device": rng.choice([1, 2, 3, 4]),
                 "gpus": rng.choice([1, 2, 3, 4, 6, 8, 12])}  # fmt: skip
        cluster = {"gpu": "h200", "gpus_per_node": per_node, "nodes": nodes}
        try:
            plan_of(batch=batch, cluster=cluster)
        except PlanError as error:
            for fix in re.findall(r"(?:Nearest: |or )gpus (\d+)", str(error)):
                applied += 1
                plan_of(batch={**batch, "gpus": int(fix)}, cluster=cluster)
    assert applied > 200


def test_where_only_more_gpus_help_they_are_advised() -> None:
    """70B on 8 GPUs: the smallest number that fits, at the same effective batch."""
    recipe = on_gpus(load_recipe("llama-70b-64xh100"), 8, None, World())
    plan = with_advice(resolve(recipe), World())
    assert plan.memory.fits is False
    (advice,) = plan.advice
    changed = [
        f"{s}.{k}={json.dumps(v)}" for s, values in advice.change.items() for k, v in values.items()
    ]
    again = resolve(load_recipe("llama-70b-64xh100", changed))
    assert again.memory.fits
    assert again.batch.effective == 512
    assert resolve(on_gpus(recipe, again.batch.gpus // 2, None, World())).memory.fits is False


def test_a_missing_file_is_told_before_an_unknown_number_of_steps() -> None:
    """The cause first."""
    world = World(problems=["data.path: x.txt does not exist"])
    with pytest.raises(PlanError, match="x.txt does not exist"):
        plan_of(world, data={"samples": None}, duration={"steps": None, "epochs": 2})


def test_options_that_the_estimate_does_not_know_are_said() -> None:
    """torch.compile is a warning; flash attention on a GPU without it is refused."""
    plan = resolve(load_recipe("llama-1b-8xh100", ["model.compile=true"]))
    assert any("without torch.compile" in warning for warning in plan.warnings)
    with pytest.raises(PlanError, match="flash needs compute capability 8.0"):
        resolve(load_recipe("llama-1b-8xh100", ["model.attention=flash", "cluster.gpu=v100-32gb"]))


def test_part_of_a_node_is_one_node() -> None:
    """2 GPUs of a node that has 8: one node with 2 of its 8, for the plan, the launcher and a re-split."""
    recipe = validate(
        tiny_recipe(
            cluster={"gpu": "h200", "gpus_per_node": 8}, batch={"effective": 12, "gpus": 2}
        ),
        "r",
    )
    plan = resolve(recipe)
    assert (plan.batch.nodes, plan.mesh.ranks_per_node, plan.mesh.ranks) == (1, 2, 2)
    assert plan.recipe.cluster.gpus_per_node == 8
    moved = resolve(on_gpus(plan.recipe, 4, None, World()))
    assert (moved.batch.nodes, moved.mesh.ranks_per_node) == (1, 4)
    two = {"nodes": 2, "gpus_per_node": 8, "gpu": "h200"}
    with pytest.raises(PlanError, match=r"2 nodes × 8 gpus_per_node = 16, not gpus 2"):
        resolve(validate(tiny_recipe(cluster=two, batch={"effective": 12, "gpus": 2}), "r"))


@given(nodes=st.integers(1, 8), per_node=st.integers(1, 8), shard=st.sampled_from(["all", "node"]))
def test_the_mesh_places_every_rank_once(nodes: int, per_node: int, shard: str) -> None:
    """Each rank has a node and a data rank, each data rank a reader; replicas × shards are all ranks."""
    gpus = nodes * per_node
    recipe = validate(
        tiny_recipe(cluster={"gpus_per_node": per_node}, strategy={"name": "fsdp", "shard": shard},
                    batch={"effective": gpus, "per_device": 1, "gpus": gpus}), "r",
    )  # fmt: skip
    mesh = resolve(recipe).mesh
    assert mesh.nodes == nodes
    assert mesh.replicas * mesh.shards == mesh.ranks == gpus
    assert mesh.shards == (per_node if shard == "node" else gpus)
    assert sorted(mesh.data_rank(rank) for rank in range(gpus)) == list(range(mesh.data_ranks))
    assert [mesh.data_rank(mesh.reader(n)) for n in range(mesh.data_ranks)] == list(
        range(mesh.data_ranks)
    )
    assert [mesh.node(rank) for rank in range(gpus)] == [
        n for n in range(nodes) for _ in range(per_node)
    ]
    assert {mesh.writer(number) for number in range(2 * gpus)} == set(range(gpus))
