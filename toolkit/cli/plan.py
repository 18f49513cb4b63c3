"""`drumline plan`, `drumline prepare`, `drumline schema`."""

import gc
import sys
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.world import read_world
from toolkit.errors import DoesNotFit, PlanError
from toolkit.plan.advise import with_advice
from toolkit.plan.model import Plan
from toolkit.plan.resolve import UNKNOWN_MEMORY, resolve
from toolkit.recipe.load import load_recipe
from toolkit.recipe.schema import Recipe

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A file or a shipped name.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="optimizer.lr=1e-3 …")
]
Gpus = Annotated[
    int | None, typer.Option("--gpus", min=1, help="Re-split over N GPUs, same batch.")
]
GpuType = Annotated[str | None, typer.Option("--gpu", help="Re-split on this kind of GPU.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


Trace = Annotated[
    bool, typer.Option("--trace", help="Memory from the real model and step, without a GPU.")
]


Fix = Annotated[
    bool, typer.Option("--fix", help="If it does not fit: the cheapest change that makes it fit.")
]
Sweep = Annotated[
    bool, typer.Option("--sweep", help="Memory of every split and strategy, as a table and a page.")
]


def make_plan(recipe: Recipe, gpus: int | None = None, gpu: str | None = None) -> Plan:
    """Read the world, re-split if asked, resolve, and advise."""
    world = read_world(recipe)
    if gpus or gpu:
        from toolkit.plan.resplit import on_gpus

        recipe = on_gpus(recipe, gpus, gpu, world)
        world = read_world(recipe)
    return with_advice(resolve(recipe, world), world)


def plan_on_nodes(recipe: Recipe, nodes: int) -> Plan:
    """The recipe on the most of these nodes that its batch can be split over; PlanError where on none."""
    as_stated = make_plan(recipe)
    per_node = as_stated.batch.gpus // as_stated.batch.nodes
    for count in range(nodes, 0, -1):
        if as_stated.batch.nodes == count:
            return as_stated
        try:
            return make_plan(recipe, count * per_node)
        except PlanError:
            continue
    raise PlanError(
        f"batch.effective {as_stated.batch.effective} cannot be split over {per_node} GPUs of a node"
    )


def traced(plan: Plan) -> Plan:
    """The same plan with its memory traced."""
    import dataclasses
    import warnings

    from toolkit.data.card import read_card
    from toolkit.plan.gpus import find_gpu
    from toolkit.plan.traced import traced_facts

    gc.enable()
    warnings.filterwarnings("ignore")
    from toolkit.train.rehearse import rehearse

    card = read_card(Path(plan.data.cache)) if plan.data.cache else None
    memory = traced_facts(rehearse(plan, card), plan, find_gpu(plan.recipe.cluster.gpu))
    told = [warning for warning in plan.warnings if not warning.startswith(UNKNOWN_MEMORY)]
    if plan.recipe.model.compile:
        told.append("traced without torch.compile, which fuses operations and keeps less alive")
    return dataclasses.replace(plan, memory=memory, warnings=told, advice=[])


def fixed(plan: Plan) -> Plan:
    """A plan that does not fit, with the cheapest change that was found; told on stderr."""
    if plan.memory.fits is not False:
        print("--fix: nothing to do", file=sys.stderr)
        return plan
    from toolkit.cli.show import change_words
    from toolkit.plan.advise import with_change

    capacity = plan.memory.capacity or 0
    best = next((item for item in plan.advice if item.device_high <= capacity), None)
    if best is None:
        raise DoesNotFit("--fix: no change that is known makes this fit; see `drumline plan`")
    print(f"--fix: {change_words(best.change)}   {best.why}", file=sys.stderr)
    return make_plan(with_change(plan.recipe, best.change))


def _sweep(plan: Plan, as_json: bool) -> None:
    """The table on stdout, the page beside it; or the cells as JSON."""
    from toolkit.cli.sweep_memory import sweep_page, sweep_table
    from toolkit.files import write_text
    from toolkit.plan.sweep import sweep

    cells = sweep(plan, read_world(plan.recipe))
    if not cells:
        raise PlanError(f"--sweep: {plan.memory.why or 'the memory of this model is not known'}")
    if as_json:
        import dataclasses
        import json

        print(json.dumps({"cells": [dataclasses.asdict(cell) for cell in cells]}, indent=2))
        return
    print(sweep_table(cells))
    page = Path(f"{plan.recipe.recipe}-memory.html")
    write_text(page, sweep_page(plan, cells))
    print(f"heat map in {page}", file=sys.stderr)


def plan_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpus: Gpus = None,
    gpu: GpuType = None,
    trace: Trace = False,
    fix: Fix = False,
    sweep: Sweep = False,
    as_json: AsJson = False,
) -> None:
    """The dry run: batch equation, optimizer steps, schedule and memory; no GPU, no torch.

    `--trace` does import torch: it runs the model's real training step on tensors without data.
    """
    plan = make_plan(load_recipe(recipe, overrides), gpus, gpu)
    if fix:
        plan = fixed(plan)
    if trace:
        plan = traced(plan)
    if sweep:
        return _sweep(plan, as_json)
    if as_json:
        print(plan.to_json())
    else:
        from toolkit.cli.show import plan_table

        print(plan_table(plan))
    if plan.memory.fits is False:
        raise typer.Exit(DoesNotFit.exit_code)


def prepare_command(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Tokenise, pack and fingerprint the data; later plans and runs reuse them. Needs no GPU."""
    loaded = load_recipe(recipe, overrides)
    folder = prepare_data(loaded)
    from toolkit.data.card import read_card

    card = read_card(folder)
    assert card
    print(f"{card.samples:,} samples, {card.validation_samples:,} for validation")
    print(f"{card.label_tokens:,} label tokens, {card.truncated} truncated, {card.dropped} dropped")
    print(f"fingerprint {card.fingerprint}")
    print(f"in {folder}")


def prepare_data(recipe: Recipe) -> Path:
    """The prepared rows of a recipe, with a progress bar on a terminal."""
    from toolkit.data.prepare import prepare

    if not sys.stderr.isatty():
        return prepare(recipe.data, recipe.project)
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("preparing")

        def show(documents: int, written: int) -> None:
            progress.update(task, description=f"preparing: {documents:,} documents, {written:,}")

        return prepare(recipe.data, recipe.project, show)


def schema_command(
    plan: Annotated[bool, typer.Option("--plan", help="The plan's schema instead.")] = False,
) -> None:
    """The JSON Schema of a recipe (or of a plan), for editors and scripts."""
    import json

    if plan:
        from pydantic import TypeAdapter

        print(json.dumps(TypeAdapter(Plan).json_schema(), indent=2))
    else:
        print(json.dumps(Recipe.model_json_schema(), indent=2))


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("plan")(plan_command)
    app.command("prepare")(prepare_command)
    app.command("schema")(schema_command)
