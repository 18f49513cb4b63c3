"""`start_from`: what a plan takes over from another run's checkpoint, and what it refuses. No file is read."""

from dataclasses import replace
from typing import Any

import pytest

from drumline.errors import PlanError
from drumline.plan.model import Plan, read_plan
from drumline.plan.resolve import resolve
from drumline.plan.schedule import rate
from drumline.plan.start import Parent
from drumline.plan.steps import Place
from drumline.plan.world import World
from drumline.recipe.load import merge, validate
from plan.test_advice_followed import BASE

LORA = {"model": {"adapter": {"rank": 4}}}
N = 1000


def recipe_of(**sections: Any) -> Any:
    return validate(merge(BASE, {"data": {"samples": N}, **sections}), "r")


def parent_of(step: int = 60, **sections: Any) -> Parent:
    """A checkpoint of a run of BASE, of 16 samples a step and 63 steps an epoch."""
    plan = resolve(recipe_of(**sections), World(fingerprint="sha256:a"))
    return Parent(
        run="/runs/x-1",
        checkpoint=f"/runs/x-1/checkpoints/step-{step:08d}",
        sha256="0" * 64,
        training_sha256=plan.training_sha256,
        recipe=plan.recipe,
        fingerprint="sha256:a",
        place=plan.clock().place(step),
        rate=1e-3,
    )


def plan_of(
    what: str = "state",
    parent: Parent | None = None,
    fingerprint: str | None = "sha256:a",
    **sections: Any,
) -> Plan:
    start = {"run": "/runs/x-1", "what": what, **sections.pop("start_from", {})}
    recipe = recipe_of(start_from=start, **{"duration": {"steps": 200}, **sections})
    return resolve(recipe, World(fingerprint=fingerprint, samples=N, parent=parent or parent_of()))


def test_the_state_is_counted_on_where_the_samples_go_on() -> None:
    """The same data and seed: the steps are those of a run that never stopped, also at another batch."""
    plan = plan_of()
    whole = resolve(recipe_of(duration={"steps": 200}), World(fingerprint="sha256:a"))
    assert plan.first_step == 61
    assert plan.start is not None
    assert plan.start.continues_data
    for step in (61, 63, 64, 200):
        assert plan.clock().slots(step) == whole.clock().slots(step)
    assert read_plan(plan.to_json()) == plan
    larger = plan_of(batch={"effective": 32, "accumulation": 8})
    assert larger.clock().slots(61) == (960, 992)
    assert larger.clock().slots(62) == (992, 1000)
    epochs = plan_of(duration={"steps": None, "epochs": 2})
    assert epochs.steps.total == 126
    assert epochs.clock().slots(126)[1] == 2000


@pytest.mark.parametrize(
    "other",
    [{"fingerprint": "sha256:b"}, {"seed": 9}],
    ids=["other data", "another order"],
)
def test_other_data_begin_anew(other: dict[str, Any]) -> None:
    """The steps are counted on, the data begin at their first sample; an epoch is one of the new data."""
    plan = plan_of(duration={"steps": None, "epochs": 1}, **other)
    assert plan.start is not None
    assert not plan.start.continues_data
    assert plan.clock().slots(61) == (0, 16)
    assert plan.clock().consumed(61) == 960 + 16
    assert plan.steps.total == 60 + 63


def test_weights_alone_are_a_training_of_its_own() -> None:
    """From step 1 and the first sample, with any optimizer."""
    plan = plan_of("weights", optimizer={"name": "lion", "lr": 1e-4})
    assert plan.first_step == 1
    assert plan.clock().slots(1) == (0, 16)
    assert plan.start is not None
    assert plan.start.place == Place()


def test_a_training_is_what_it_began_from() -> None:
    """Its hash tells parent, step and what is taken over; not where the parent lies, nor how it is split."""
    plan = plan_of()
    moved = parent_of()
    moved = replace(
        moved, run="/elsewhere/x-1", checkpoint="/elsewhere/x-1/checkpoints/step-00000060"
    )
    same = plan_of(
        parent=moved,
        start_from={"run": "/elsewhere/x-1"},
        batch={"per_device": 8, "accumulation": 1},
    )
    assert same.training_sha256 == plan.training_sha256
    others = [
        plan_of(parent=parent_of(40)),
        plan_of("weights"),
        plan_of(parent=parent_of(optimizer={"weight_decay": 0.1})),
        resolve(recipe_of(duration={"steps": 200}), World(fingerprint="sha256:a")),
    ]
    assert len({plan.training_sha256, *(other.training_sha256 for other in others)}) == 5
    again = resolve(plan.recipe, World(fingerprint="sha256:a", samples=N, parent=parent_of()))
    assert again == plan
    assert plan.recipe.start_from is not None
    assert plan.recipe.start_from.step == 60


def test_a_run_that_has_begun_needs_its_parent_no_more() -> None:
    """What its first plan says of the parent is enough."""
    plan = plan_of()
    assert resolve(plan.recipe, World(fingerprint="sha256:a", samples=N, start=plan.start)) == plan


def test_a_jump_of_the_learning_rate_is_told() -> None:
    """From the parent's last rate to the first one here."""
    told = [w for w in plan_of(schedule={"name": "linear"}).warnings if "learning rate was" in w]
    assert told == []
    told = [w for w in plan_of(optimizer={"lr": 1e-4}).warnings if "learning rate was" in w]
    assert told == [
        "start_from: the learning rate was 0.001 at step 60 of /runs/x-1 and is 0.0001 at step 61"
    ]


@pytest.mark.parametrize(
    ("wrong", "parent", "advice", "right"),
    [
        ({"optimizer": {"name": "lion"}}, {}, "Nearest: start_from.what=weights", {"start_from": {"what": "weights"}}),
        ({"duration": {"steps": 60}}, {}, "Nearest: duration.steps=120", {"duration": {"steps": 120}}),
        ({"duration": {"steps": None, "epochs": 0.5}}, {}, "Nearest: duration.epochs=1", {"duration": {"epochs": 1}}),
        ({"duration": {"steps": None, "tokens": 3200}}, {}, "Nearest: duration.tokens=122880",
         {"duration": {"tokens": 122880}}),
        ({"start_from": {"training_sha256": "f" * 64}}, {}, "Nearest: start_from.training_sha256=null",
         {"start_from": {"training_sha256": None}}),
        (LORA, {}, "Nearest: `drumline export` that run", {"model": {"adapter": None}}),
        ({}, LORA, "Nearest: `drumline export --merge` that run", LORA),
        ({"model": {"adapter": {"rank": 8}}}, LORA, "Nearest: the same model.adapter", LORA),
        ({"model": {"adapter": {"rank": 4, "alpha": 64.0}}}, LORA, "alpha 16.0 there, 64.0 here", {"model": {"adapter": {"alpha": 16.0}}}),
        ({"model": {"adapter": {"rank": 4, "rslora": True}}}, LORA, "rslora False there, True here", {"model": {"adapter": {"rslora": False}}}),
        ({**LORA, "seed": 3}, LORA, "Nearest: seed=0 and the same model section", {"seed": 0}),
        ({"optimizer": {"name": "sgd", "momentum": 0.9}}, {"optimizer": {"name": "sgd"}}, "or the same optimizer section",
         {"optimizer": {"momentum": 0.0}}),
        ({"schedule": {"name": "cosine", "warmup_epochs": 1}, "seed": 3}, {}, "Nearest: schedule.warmup_epochs=null schedule.warmup_steps=160",
         {"schedule": {"warmup_epochs": None, "warmup_steps": 160}}),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_begin_there_is_refused(
    wrong: dict[str, Any], parent: dict[str, Any], advice: str, right: dict[str, Any]
) -> None:
    """Before anything starts, with a way out that works."""
    theirs = parent_of(**parent)
    with pytest.raises(PlanError) as told:
        plan_of(parent=theirs, **wrong)
    assert advice in str(told.value)
    plan_of(parent=theirs, **merge(wrong, right))


def test_another_model_is_refused_by_its_weights() -> None:
    """By element counts of layers and embedding, before anything is loaded."""
    shapes = {"model.embed_tokens.weight": (300, 64), "lm_head.weight": (300, 64)}
    with pytest.raises(PlanError, match="they hold 0 layers and the config says 2"):
        plan_of(parent=replace(parent_of(), weights=shapes))


def test_a_warm_up_of_epochs_is_that_of_the_whole_run() -> None:
    """The rates of a run that goes on are those of one that never stopped, also where they hold in an epoch."""
    for schedule in (
        {"name": "cosine", "warmup_epochs": 0.5},
        {"name": "cosine", "unit": "epoch"},
        {"name": "linear", "unit": "epoch", "warmup_epochs": 1.5},
    ):
        plan = plan_of(schedule=schedule)
        whole = resolve(
            recipe_of(duration={"steps": 200}, schedule=schedule), World(fingerprint="sha256:a")
        )
        assert plan.schedule == whole.schedule
        for step in range(61, 201):
            assert rate(plan.schedule, step, plan.clock()) == rate(
                whole.schedule, step, whole.clock()
            )


def test_another_evaluation_set_leaves_the_samples_where_they_are() -> None:
    """Whether the order goes on is a matter of the rows that are trained, where the checkpoint tells these."""
    told = replace(parent_of(), fingerprint="sha256:with-sets", rows="sha256:rows")
    for rows, goes_on in (("sha256:rows", True), ("sha256:others", False), (None, False)):
        recipe = recipe_of(
            start_from={"run": "/runs/x-1", "what": "state"}, duration={"steps": 200}
        )
        plan = resolve(recipe, World(fingerprint="sha256:a", rows=rows, samples=N, parent=told))
        assert plan.start is not None
        assert plan.start.continues_data == goes_on


def test_another_model_of_the_same_weights_is_told() -> None:
    """Nothing of its shapes differs, and it computes something else."""
    warnings = plan_of(model={"config": {"num_attention_heads": 2}}).warnings
    assert (
        "start_from: the model is not that of /runs/x-1: model.config.num_attention_heads 4 there, 2 here"
        in warnings
    )
    assert not any("the model is not" in warning for warning in plan_of().warnings)


def test_a_model_with_a_head_of_its_own_is_refused_if_it_ties_now() -> None:
    """Though every weight that it needs is there."""
    shape = resolve(recipe_of(), World()).cost.parameters
    assert shape
    layer = {f"model.layers.{n}.{name}.weight": size for n in range(2) for name, size in (
        ("self_attn.q_proj", (64, 64)), ("self_attn.k_proj", (64, 64)), ("self_attn.v_proj", (64, 64)), ("self_attn.o_proj", (64, 64)),
        ("mlp.gate_proj", (128, 64)), ("mlp.up_proj", (128, 64)), ("mlp.down_proj", (64, 128)), ("input_layernorm", (64,)), ("post_attention_layernorm", (64,)))}  # fmt: skip
    shapes = {
        **layer,
        "model.embed_tokens.weight": (300, 64),
        "lm_head.weight": (300, 64),
        "model.norm.weight": (64,),
    }
    parent = replace(parent_of(), weights=shapes)
    assert plan_of(parent=parent)
    with pytest.raises(PlanError, match="numbers, and the model has"):
        plan_of(parent=parent, model={"config": {"tie_word_embeddings": True}})


def test_samples_of_these_data_alone_count_for_tokens() -> None:
    """A run on other data, and one that goes on with it: tokens count from the beginning of those data."""
    other = plan_of(fingerprint="sha256:b", duration={"steps": None, "tokens": 64 * 160})
    assert other.steps.total == 70
    parent = replace(parent_of(), fingerprint="sha256:b", place=other.clock().place(70))
    more = plan_of(
        parent=parent, fingerprint="sha256:b", duration={"steps": None, "tokens": 64 * 320}
    )
    assert more.steps.total == 80
