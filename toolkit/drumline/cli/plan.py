"""`drumline plan`, `drumline prepare`."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from drumline.cli.options import (
    AsJson,
    FromRun,
    GpuType,
    Overrides,
    RecipeArgument,
    TrustCode,
    with_from,
)
from drumline.errors import DoesNotFit, NotPrepared, PlanError
from drumline.plan.model import NO_SITE, Plan, SiteFacts
from drumline.recipe.load import load_recipe
from drumline.recipe.schema import Recipe
from drumline.session.planning import fixed, make_plan, traced, world_of
from drumline.session.prepare import prepare_data

Trace = Annotated[
    bool, typer.Option("--trace", help="Memory from the real model and step, without a GPU.")
]


Fix = Annotated[
    bool, typer.Option("--fix", help="If it does not fit: the cheapest change that makes it fit.")
]
Sweep = Annotated[
    bool, typer.Option("--sweep", help="Memory of every split and strategy, as a table and a page.")
]


GpuCounts = Annotated[
    str | None,
    typer.Option("--gpus", metavar="N", help="Re-split over N GPUs, same batch; --best: 8,16,32."),
]
Best = Annotated[
    bool, typer.Option("--best", help="The fastest splits that fit, with time, memory and cost.")
]
SiteFile = Annotated[
    Path | None, typer.Option("--site", help="The cluster: its GPUs, price and measured links.")
]
Html = Annotated[
    bool, typer.Option("--html", help="Also a page: equation, memory by phase, other splits.")
]


def _counts(gpus: str | None, best: bool) -> list[int | None]:
    """The numbers of `--gpus`; a list of several goes with `--best` only."""
    parts = gpus.split(",") if gpus else []
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise PlanError(
            f"--gpus {gpus}: a number of GPUs, or several with commas. Nearest: --gpus 8"
        )
    if len(parts) > 1 and not best:
        raise PlanError(f"--gpus {gpus}: several go with --best. Nearest: --best --gpus {gpus}")
    return [int(part) for part in parts] or [None]


def _for_site(loaded: Recipe, path: Path | None) -> tuple[Recipe, SiteFacts]:
    """The recipe with the site's hardware where it states none, and the site's price and bandwidths."""
    if path is None:
        return loaded, NO_SITE
    from drumline.cluster.site import facts_of, load_site, on_site

    site = load_site(path)
    if site.gpu_hour_price is None:
        print(f"warning: {path} has no gpu_hour_price, so no cost is told", file=sys.stderr)
    return on_site(loaded, site), facts_of(site)


def _best(
    loaded: Recipe,
    recipe: str,
    counts: list[int | None],
    gpu: str | None,
    site: SiteFacts,
    as_json: bool,
) -> None:
    """Print the fastest splits that fit; DoesNotFit if none does."""
    from drumline.session.best import best_facts, best_table, find_best

    found = find_best(loaded, counts, gpu, site)
    if as_json:
        import json

        print(json.dumps(best_facts(found), indent=2))
    else:
        print(best_table(found, recipe))
    if not any(one.search.found for one in found):
        raise DoesNotFit("--best: no split of this training is known to fit these GPUs")


def _page(plan: Plan) -> None:
    """Write the plan as one HTML page, with the heat map where the memory is known."""
    from drumline.files import write_text
    from drumline.plan.sweep import sweep
    from drumline.session.plan_page import plan_page

    page = Path(f"{plan.recipe.recipe}-plan.html")
    write_text(page, plan_page(plan, sweep(plan, world_of(plan))))
    print(f"written to {page}", file=sys.stderr)


def _show_as_if(loaded: Recipe, gpus: int | None, gpu: str | None, site: SiteFacts) -> None:
    """Print the plan as if the data had so many rows: all but the steps holds for any number of them."""
    from drumline.session.show import plan_table
    from drumline.session.unprepared import as_if, plan_as_if

    plan = plan_as_if(loaded, gpus, gpu, site=site)
    print(f"{as_if()}\n\n{plan_table(plan)}\n", flush=True)


def _sweep(plan: Plan, as_json: bool) -> None:
    """Print the table and write the HTML page, or print the cells as JSON."""
    from drumline.files import write_text
    from drumline.plan.sweep import sweep
    from drumline.session.sweep_page import sweep_page, sweep_table

    cells = sweep(plan, world_of(plan))
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
    from_run: FromRun = None,
    gpus: GpuCounts = None,
    gpu: GpuType = None,
    site: SiteFile = None,
    trace: Trace = False,
    fix: Fix = False,
    sweep: Sweep = False,
    html: Html = False,
    best: Best = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Show batch equation, optimizer steps, schedule, memory and time of a run; needs no GPU and no torch.

    `--trace` does need torch: it runs the model's real training step on tensors without data.

    Example: drumline plan llama-8b-8xh100 --gpus 64 optimizer.lr=1e-4
    """
    overrides = with_from(from_run, overrides)
    if trace:
        from drumline.session.trust import load_to_run

        loaded = load_to_run(recipe, overrides, trust_code)
    else:
        loaded = load_recipe(recipe, overrides)
    if best and (fix or trace or sweep or html):
        raise PlanError(
            "--best goes without --fix, --trace, --sweep and --html. Nearest: --best alone"
        )
    counts = _counts(gpus, best)
    loaded, facts = _for_site(loaded, site)
    try:
        if best:
            return _best(loaded, recipe, counts, gpu, facts, as_json)
        plan = make_plan(loaded, counts[0], gpu, site=facts)
    except NotPrepared:
        from drumline.session.unprepared import naming_prepare

        if not (as_json or sweep or html or trace or fix or best):
            _show_as_if(loaded, counts[0], gpu, facts)
        with naming_prepare(recipe, overrides):
            raise
    if fix:
        plan = fixed(plan)
    if trace:
        plan = traced(plan)
    if html:
        _page(plan)
    if sweep:
        return _sweep(plan, as_json)
    if as_json:
        print(plan.to_json())
    else:
        from drumline.session.show import plan_table

        print(plan_table(plan))
    if plan.memory.fits is False:
        raise typer.Exit(DoesNotFit.exit_code)


def prepare_command(
    recipe: RecipeArgument, overrides: Overrides = None, trust_code: TrustCode = False
) -> None:
    """Tokenise, pack and fingerprint the data; later plans and runs reuse them. Needs no GPU.

    Example: drumline prepare tiny-code-lm
    """
    from drumline.session.trust import load_to_run

    loaded = load_to_run(recipe, overrides, trust_code)
    from drumline.data.cache import cache_folder
    from drumline.data.dataset_manifest import read_dataset_manifest

    was_there = cache_folder(loaded.data, loaded.project).is_dir()
    started = time.monotonic()
    folder = prepare_data(loaded)
    seconds = time.monotonic() - started

    manifest = read_dataset_manifest(folder)
    assert manifest
    style = f", {manifest.style}" if manifest.style else ""
    print(f"{manifest.samples:,} samples, {manifest.validation_samples:,} for validation{style}")
    print(
        f"{manifest.label_tokens:,} label tokens, {manifest.truncated} truncated, {manifest.dropped} dropped"
        + (
            f", {manifest.skipped} bad rows skipped, the first: {manifest.first_problem}"
            if manifest.skipped
            else ""
        )
    )
    if not was_there:
        speed = manifest.label_tokens / seconds
        print(f"{seconds:.1f} s, {speed:,.0f} label tokens a second", file=sys.stderr)
    print(f"fingerprint {manifest.fingerprint}")
    print(f"in {folder}")


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("plan")(plan_command)
    app.command("prepare")(prepare_command)
