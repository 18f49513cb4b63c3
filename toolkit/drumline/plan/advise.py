"""Advice: changes of a plan at the same effective batch, each re-planned for its peak memory and cost."""

import bisect
import dataclasses
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from drumline.architectures.shapes import ModelShape
from drumline.errors import PlanError
from drumline.plan.model import Advice, Plan
from drumline.plan.resolve import resolve, shape_of
from drumline.plan.step_time import gpu_seconds, step_time
from drumline.plan.world import World
from drumline.recipe.schema import Recipe, Strategy
from drumline.units import divisors

UNUSED_SHARE = 1 / 3
"""Plans that fit also get advice if they leave more than this share of the device's memory unused."""

WORTH_TELLING = 0.97
"""Of a step's time: less is gained than the estimate errs by (tests/plan/test_throughput.py)."""

MOST_SHOWN = 6

Change = dict[str, Any]
Candidate = tuple[Change, str]

_CHUNKED = ({"loss": {"chunked": True}}, "logits are never all alive; the head runs forward twice")
_SELECTIVE = (
    {"model": {"activation_checkpointing": "selective"}},
    "matrix products and attention are kept, the rest is computed twice",
)
_CHECKPOINTED = (
    {"model": {"activation_checkpointing": "full"}},
    "activations are computed twice: about a third more compute",
)
_IN_HOST_MEMORY = (
    {"model": {"activation_checkpointing": "full", "activation_offload": True}},
    "the inputs of layers wait in host memory",
)
_ZERO = (
    {"launch": {"launcher": "deepspeed"}, "strategy": {"name": "zero2", "shard": "all"}},
    "DeepSpeed keeps 16-bit weights, and shards gradients and states",
)
_SHARDED = ({"strategy": {"name": "fsdp"}}, "weights and states are sharded; more is communicated")
_FREED_SOONER = (
    {"strategy": {"reshard": "forward", "reduce": "micro_batch"}},
    "weights and gradients are held in shards between layers",
)
_OFFLOADED = ({"strategy": {"offload": "optimizer"}}, "the optimizer steps on the host")


def with_advice(plan: Plan, world: World) -> Plan:
    """The plan with advice: how to make it fit, or how to be faster if much memory is unused."""
    memory = plan.memory
    shape = shape_of(plan.recipe, world)
    if memory.device is None or memory.capacity is None or isinstance(shape, str):
        return plan
    adviser = _Adviser(plan, world, shape)
    if memory.verdict in ("does_not_fit", "tight"):
        return dataclasses.replace(plan, advice=adviser.to_fit())
    if memory.device.high < (1 - UNUSED_SHARE) * memory.capacity:
        return dataclasses.replace(plan, advice=adviser.to_use())
    return plan


def with_torchrun(recipe: Recipe) -> str:
    """The overrides that take a recipe to torchrun, which has no ZeRO and no offload: FSDP in its place."""
    strategy = recipe.strategy
    return " ".join(
        [
            "launch.launcher=torchrun",
            *(["strategy.name=fsdp"] if strategy.name.startswith("zero") else []),
            *(["strategy.offload=none"] if strategy.offload != "none" else []),
        ]
    )


def strategy_of(recipe: Recipe, name: str) -> Change:
    """The keys of a strategy of this name: what only FSDP2 has is kept for it, and is at its default else."""
    kept = recipe.strategy if name == "fsdp" else Strategy.model_construct()
    change: Change = {"name": name, "shard": kept.shard}
    for key in ("reshard", "reduce"):
        if getattr(recipe.strategy, key) != Strategy.model_fields[key].default:
            change[key] = getattr(kept, key)
    return change


def with_change(recipe: Recipe, change: Change) -> Recipe:
    """The recipe with the change applied."""
    update = {
        name: getattr(recipe, name).model_copy(update=values)
        if isinstance(values, dict)
        else values
        for name, values in change.items()
    }
    return recipe.model_copy(update=update)


def changed_step_seconds(plan: Plan, shape: ModelShape, change: Change) -> float:
    """Seconds of a step of a changed plan, whose memory and legality are not looked at, so it is quick."""
    batch = dataclasses.replace(plan.batch, **change.get("batch", {}))
    changed = dataclasses.replace(plan, recipe=with_change(plan.recipe, change), batch=batch)
    return step_time(changed, shape).total


class _Adviser:
    """Finds the advice for one plan; changes that cannot be planned are dropped."""

    def __init__(self, plan: Plan, world: World, shape: ModelShape) -> None:
        self._plan, self._world, self._shape = plan, world, shape
        self._now: float = gpu_seconds(plan, shape)

    def to_fit(self) -> list[Advice]:
        """Changes that fit, cheapest first; else those that are tight, else those with the lowest peak."""
        found = self._all_replanned(self._savings())
        if not any(item.verdict == "fits" for item in found):
            found += self._together(found)
        if not any(item.verdict == "fits" for item in found):
            least = min(found, key=lambda item: item.device_high).change if found else {}
            others = self._all_replanned(self._other_trainings(least))
            found += [dataclasses.replace(item, changes_training=True) for item in others]
        for verdict in ("fits", "tight"):
            fitting = [item for item in found if item.verdict == verdict]
            if fitting and verdict != self._plan.memory.verdict:
                return sorted(fitting, key=lambda item: (item.cost, item.device_high))[:MOST_SHOWN]
        return sorted(found, key=lambda item: item.device_high)[:MOST_SHOWN]

    def to_use(self) -> list[Advice]:
        """Changes that use more memory, still fit, and are cheaper in GPU time, cheapest first."""
        found = self._all_replanned(c for c in self._spendings() if self._is_worth_it(c[0]))
        fitting = [item for item in found if item.verdict == "fits"]
        return sorted(fitting, key=lambda item: item.cost)[:MOST_SHOWN]

    def _is_worth_it(self, change: Change) -> bool:
        """Whether a change saves more GPU time than the estimate errs by; far cheaper than to plan it."""
        gpus = change.get("batch", {}).get("gpus", self._plan.batch.gpus)
        seconds = gpus * changed_step_seconds(self._plan, self._shape, change)
        return bool(seconds < WORTH_TELLING * self._now)

    def _all_replanned(self, candidates: Iterator[Candidate]) -> list[Advice]:
        return [item for item in (self._replanned(*candidate) for candidate in candidates) if item]

    def _other_trainings(self, least: Change) -> Iterator[Candidate]:
        """What saves memory and gives another training, alone and with the change that needs least memory.

        Only tried where nothing else fits.
        """
        recipe, length = self._plan.recipe, self._plan.recipe.data.sequence_length
        others: list[Candidate] = []
        if recipe.precision == "fp32":
            others.append(({"precision": "bf16"}, "16-bit matrix products"))
        if length and not self._shape.patches:
            others += [({"data": {"sequence_length": length // n}}, "shorter rows") for n in (2, 4)]
        for change, why in others:
            yield change, f"changes the training: {why}"
            yield {**least, **change}, f"changes the training: {why}, and what else saves memory"

    def _savings(self) -> Iterator[Candidate]:
        recipe, launcher = self._plan.recipe, self._plan.recipe.launch.launcher
        yield from self._smaller_per_device()
        if not recipe.loss.chunked and recipe.data.facts.is_shifted:
            yield _CHUNKED
        if recipe.model.activation_checkpointing == "none":
            yield _SELECTIVE
        if recipe.model.activation_checkpointing != "full":
            yield _CHECKPOINTED
        if not recipe.model.activation_offload:
            yield _IN_HOST_MEMORY
        if recipe.strategy.reshard != "forward" or recipe.strategy.reduce == "step":
            yield _FREED_SOONER
        if launcher != "deepspeed" and recipe.strategy.name == "ddp" and self._plan.batch.gpus > 1:
            yield _SHARDED
            if recipe.precision == "bf16":
                yield _ZERO
        if launcher == "deepspeed":
            stages = ("ddp", "zero1", "zero2", "zero3")
            for name in stages[stages.index(recipe.strategy.name) + 1 :]:
                yield {"strategy": {"name": name}}, "more of the states is sharded"
            if recipe.strategy.name != "ddp" and recipe.strategy.offload == "none":
                yield _OFFLOADED
        yield from self._more_gpus()

    def _smaller_per_device(self) -> Iterator[Candidate]:
        """The largest smaller per_device that fits, else the smallest."""
        split = self._plan.batch.split
        rest = split.per_device * split.accumulation
        smaller = [b for b in divisors(rest) if b < split.per_device]
        if smaller:
            b = smaller[max(0, self._count_fitting(smaller) - 1)]
            yield self._split_change(b, split.gpus), "smaller micro-batches, more of them"

    def _count_fitting(self, ascending: list[int]) -> int:
        """How many of these per_device values fit; memory grows with them, so bisection is exact."""
        gpus = self._plan.batch.gpus

        def does_not_fit(b: int) -> bool:
            advice = self._replanned(self._split_change(b, gpus), "")
            return advice is None or advice.verdict != "fits"

        return bisect.bisect_left(ascending, True, key=does_not_fit)

    def _more_gpus(self) -> Iterator[Candidate]:
        """With a sharded strategy: the smallest larger number of GPUs that fits."""
        batch = self._plan.batch
        if self._plan.recipe.strategy.name == "ddp":
            return
        for factor in divisors(batch.effective // batch.gpus)[1:]:
            gpus = batch.gpus * factor
            b = max(b for b in divisors(batch.effective // gpus) if b <= batch.per_device)
            candidate = (self._split_change(b, gpus), "more ranks hold smaller shards")
            advice = self._replanned(*candidate)
            if advice and advice.verdict == "fits":
                yield candidate
                return

    def _spendings(self) -> Iterator[Candidate]:
        recipe, split = self._plan.recipe, self._plan.batch.split
        rest = split.per_device * split.accumulation
        larger = [b for b in divisors(rest) if b > split.per_device]
        larger = [b for b in larger if self._is_worth_it(self._split_change(b, split.gpus))]
        fitting = self._count_fitting(larger)
        if fitting:
            change = self._split_change(larger[fitting - 1], split.gpus)
            yield change, "larger micro-batches, fewer of them"
        if recipe.model.activation_checkpointing != "none":
            kept: Change = {"activation_checkpointing": "none"}
            if recipe.model.activation_offload:
                kept["activation_offload"] = False
            all_kept = self._replanned({"model": kept}, "activations are kept")
            if all_kept and all_kept.verdict == "fits":
                yield all_kept.change, all_kept.why
            elif recipe.model.activation_checkpointing == "full":
                yield _SELECTIVE
        if recipe.model.activation_offload:
            yield (
                {"model": {"activation_offload": False}},
                "the inputs of layers stay on the device",
            )
        if recipe.loss.chunked:
            yield {"loss": {"chunked": False}}, "the head runs forward once"
        if recipe.strategy.name == "fsdp":
            yield from self._kept_between_layers()
            yield {"strategy": strategy_of(recipe, "ddp")}, "nothing is gathered"

    def _kept_between_layers(self) -> Iterator[Candidate]:
        """FSDP2's gathered weights kept for the backward, or for all micro-batches of a step."""
        has_several = self._plan.batch.accumulation > 1
        kept = "step" if has_several else "backward"
        if self._plan.recipe.strategy.reshard != kept:
            yield (
                {"strategy": {"reshard": kept}},
                "weights are gathered once in a step"
                if has_several
                else "weights are gathered once in a micro-batch",
            )
        if has_several and not self._plan.recipe.logging.noise_scale:
            yield (
                {"strategy": {"reshard": kept, "reduce": "step"}},
                "weights are gathered and gradients reduced once in a step",
            )

    def _split_change(self, b: int, gpus: int) -> Change:
        """Another split of the same effective batch; evaluation's per_device is at most `b`."""
        batch, recipe = self._plan.batch, self._plan.recipe
        change: Change = {"batch": {"per_device": b, "accumulation": batch.effective // gpus // b}}
        if gpus != batch.gpus:
            per_node = self._plan.mesh.ranks_per_node
            change["batch"]["gpus"] = gpus
            change["cluster"] = {"nodes": gpus // per_node, "gpus_per_node": per_node}
        evaluation = recipe.row_evaluation
        if evaluation and (evaluation.per_device or b) > b:
            change["evaluation"] = {"per_device": b}
        return change

    def _together(self, found: list[Advice]) -> list[Advice]:
        """Every pair of changes, and all of them at once; a later change overrides an earlier one's keys."""
        pairs = [_merged(pair) for pair in combinations([item.change for item in found], 2)]
        every = _merged([item.change for item in found])
        different = {change_words(change): change for change in [*pairs, every] if change}
        joined = [self._replanned(change, "together") for change in different.values()]
        return [item for item in joined if item]

    def _replanned(self, change: Change, why: str) -> Advice | None:
        try:
            changed = with_change(self._plan.recipe, change)
            plan = resolve(changed, self._world, is_candidate=True)
        except PlanError:
            return None
        memory = plan.memory
        if memory.device is None:
            return None
        cost = gpu_seconds(plan, self._shape) / self._now
        return Advice(change, memory.device.high, round(cost, 3), why, memory.verdict)


def _merged(changes: Any) -> Change:
    """Merge changes into one; a later change overrides an earlier one's keys."""
    merged: Change = {}
    for change in changes:
        for section, values in change.items():
            merged[section] = {**merged.get(section, {}), **values}
    return merged


def change_words(change: dict[str, Any]) -> str:
    """A change as command-line overrides, such as `batch.per_device=2 batch.accumulation=4`."""
    words = []
    for section, values in change.items():
        if isinstance(values, dict):
            words += [f"{section}.{key}={_plain(value)}" for key, value in values.items()]
        else:
            words.append(f"{section}={_plain(values)}")
    return " ".join(words)


def _plain(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
