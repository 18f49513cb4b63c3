"""From a recipe to a plan: reads what planning needs to know of this machine, and passes it in."""

import dataclasses
import gc
import sys
from typing import TYPE_CHECKING

from drumline.errors import DoesNotFit, PlanError
from drumline.plan.advise import with_advice
from drumline.plan.footprint import memory_warnings
from drumline.plan.model import FITS, NO_SITE, Plan, SiteFacts, StartFacts
from drumline.plan.resolve import resolve
from drumline.plan.world import World
from drumline.recipe.schema import Recipe
from drumline.session.row_lengths import longest_row, manifest_of_run
from drumline.session.world import read_world

if TYPE_CHECKING:
    from drumline.memory.recording import Traced


def make_plan(
    recipe: Recipe,
    gpus: int | None = None,
    gpu: str | None = None,
    start: StartFacts | None = None,
    site: SiteFacts = NO_SITE,
) -> Plan:
    """Read this machine, re-split over `gpus` of kind `gpu` if given, resolve, and add advice.

    `start`, `site`: see `read_world`.
    """
    world = read_world(recipe, start, site)
    if gpus or gpu:
        from drumline.plan.resplit import on_gpus

        recipe = on_gpus(recipe, gpus, gpu, world)
        world = read_world(recipe, start, site)
    plan = resolve(recipe, world)
    read = longest_row(plan)
    if read is not None and read != world.row_tokens:
        world = dataclasses.replace(world, row_tokens=read)
        plan = resolve(recipe, world)
    plan = with_advice(plan, world)
    if plan.memory.method == "unknown":
        from drumline.session.traces import kept_trace

        kept = kept_trace(plan)
        return with_trace(plan, kept) if kept else plan
    return plan


def world_of(plan: Plan) -> World:
    """What the plan was made with, for plans of changed recipes that read the same rows."""
    world = read_world(plan.recipe, plan.start, plan.site)
    return dataclasses.replace(world, row_tokens=plan.data.row_tokens)


def plan_on_nodes(
    recipe: Recipe,
    nodes: int,
    start: StartFacts | None = None,
    site: SiteFacts = NO_SITE,
) -> Plan:
    """Plan on as many of `nodes` nodes as the batch can be split over; PlanError if it is none."""
    as_stated = make_plan(recipe, start=start, site=site)
    per_node = as_stated.mesh.ranks_per_node
    for count in range(nodes, 0, -1):
        if as_stated.batch.nodes == count:
            return as_stated
        try:
            return make_plan(recipe, count * per_node, start=start, site=site)
        except PlanError:
            continue
    raise PlanError(
        f"batch.effective {as_stated.batch.effective} cannot be split over {per_node} GPUs of a node"
    )


def traced(plan: Plan) -> Plan:
    """Return the plan with memory from a trace of the real training step, which is kept for later plans."""
    import warnings

    from drumline.session.traces import keep_trace

    gc.enable()
    warnings.filterwarnings("ignore")
    from drumline.trace.rehearse import rehearse

    trace = rehearse(plan, manifest_of_run(plan)).traced()
    keep_trace(plan, trace)
    return with_trace(plan, trace)


def with_trace(plan: Plan, trace: "Traced") -> Plan:
    """The plan with the memory of a trace, and no advice, which a trace cannot give."""
    from drumline.architectures.gpus import find_gpu
    from drumline.plan.traced import traced_facts

    memory = traced_facts(trace, plan, find_gpu(plan.recipe.cluster.gpu))
    gpu = plan.recipe.cluster.gpu_name
    before = memory_warnings(plan.memory, gpu)
    told = [warning for warning in plan.warnings if warning not in before]
    told += memory_warnings(memory, gpu)
    if plan.recipe.model.compile:
        told.append(
            "traced without torch.compile, which fuses operations and stores fewer activations"
        )
    return dataclasses.replace(plan, memory=memory, warnings=told, advice=[])


def fixed(plan: Plan) -> Plan:
    """Apply the cheapest change that makes the plan fit, and print it on stderr.

    A plan that fits, or whose fit is unknown, is returned as it is. DoesNotFit if no known change helps.
    """
    if plan.memory.fits is not False:
        print("--fix: nothing to do", file=sys.stderr)
        return plan
    from drumline.plan.advise import change_words, with_change

    fitting = (item for item in plan.advice if FITS[item.verdict] and not item.changes_training)
    best = next(fitting, None)
    if best is None:
        raise DoesNotFit(
            "--fix: no change that is known makes the same training fit; see `drumline plan`"
        )
    print(f"--fix: {change_words(best.change)}   {best.why}", file=sys.stderr)
    return make_plan(with_change(plan.recipe, best.change), start=plan.start, site=plan.site)


def needs_data(recipe: Recipe) -> bool:
    """Whether the steps, or their samples, are known only once the data are prepared."""
    evaluation = recipe.evaluation
    counted = (
        recipe.duration.steps is None
        or recipe.schedule.unit == "epoch"
        or recipe.schedule.warmup_epochs is not None
        or recipe.checkpoint.every_epochs is not None
        or (evaluation is not None and evaluation.every_epochs is not None)
        or any(one.every_epochs is not None for one in recipe.after)
    )
    goes_on = recipe.start_from is not None and recipe.start_from.what == "state"
    return goes_on or (counted and recipe.data.samples is None)
