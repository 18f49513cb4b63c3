"""`drumline sweep RECIPE key=a,b other=c,d`: every combination, one by one here or as a Slurm job array."""

import functools
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from drumline.cli.options import AsJson, Force, RecipeArgument, TrustCode
from drumline.cluster import slurm
from drumline.cluster.site import facts_of, load_site, on_site, validate_site
from drumline.compare.report import write_report
from drumline.compare.sources import read_logged
from drumline.errors import LaunchError, PlanError, RecipeError, RunError
from drumline.files import write_json, write_text
from drumline.plan.model import Plan
from drumline.recipe.load import load_recipe
from drumline.recipe.schema import NodeRange, Recipe
from drumline.runs import folder as run_folder
from drumline.runs.record import now
from drumline.runs.sweeps import SWEEP
from drumline.secrets import Secrets
from drumline.session.launch import refuse_secrets, refuse_what_does_not_fit
from drumline.session.planning import make_plan
from drumline.session.prepare import prepare_data
from drumline.session.submit import SCRIPT, batch_of, prepare_folder, runs_of
from drumline.session.submit_checks import check_slurm, refuse_without
from drumline.session.trust import load_to_run
from drumline_launchers.site import Site
from drumline_launchers.slurm import render_script

_MOST = 1000
_OPENING, _CLOSING = "[{", "]}"


def sweep_command(
    recipe: RecipeArgument,
    values: Annotated[
        list[str],
        typer.Argument(metavar="key=a,b…", help="optimizer.lr=1e-4,3e-4 batch.effective=64,128"),
    ],
    to: Annotated[str, typer.Option("--to", help="local or slurm")] = "local",
    site_file: Annotated[
        Path | None, typer.Option("--site", help="A file about the cluster.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Folder of the runs, new or empty.")
    ] = None,
    at_most: Annotated[
        int | None, typer.Option("--at-most", min=1, help="Slurm: at most N jobs run at once.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the combinations.")] = False,
    force: Force = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Train every combination of the listed values; each is planned before the first starts.

    Example: drumline sweep tiny-code-lm optimizer.lr=1e-3,3e-3
    """
    combinations = combine(values)
    if at_most is not None and to != "slurm":
        raise LaunchError("--at-most: a local sweep runs one at a time. Nearest: --to slurm")
    if to not in ("local", "slurm"):
        raise LaunchError(f"--to {to}: choose from local, slurm")
    site = load_site(site_file) if site_file else validate_site({"site": "default"}, "default site")
    load = functools.partial(load_to_run, trust_code=trust_code) if not dry_run else load_recipe
    plans = [
        _planned(load(recipe, overrides), site, to, dry_run, force) for overrides in combinations
    ]
    if to == "slurm":
        refuse_secrets(site, Secrets(os.environ))
        _check_one_size(plans)
    if to == "slurm" and not dry_run:
        check_slurm(plans[0], site)
    if dry_run:
        for overrides, plan in zip(combinations, plans, strict=True):
            print(f"{shlex.join(overrides)}   {plan.batch.split}, {plan.steps.total:,} steps")
        return
    base = (folder or _next_folder(runs_of(site), plans[0].recipe.recipe)).absolute()
    run_folder.check_new(base)
    base.mkdir(parents=True, exist_ok=True)
    names = [f"{number:03d}" for number in range(len(plans))]
    write_json(base / SWEEP, dict(zip(names, combinations, strict=True)))
    if to == "slurm":
        try:
            facts = _as_array(base, names, plans, site, at_most)
        except BaseException:
            shutil.rmtree(base, ignore_errors=True)
            raise
    else:
        options = [*(["--force"] if force else []), *(["--trust-code"] if trust_code else [])]
        facts = _one_after_the_other(base, names, recipe, combinations, options)
    if as_json:
        print(json.dumps({"sweep": str(base), **facts}))
    print(f"next  drumline runs {shlex.quote(str(base))}", file=sys.stderr)
    if facts.get("failed"):
        raise RunError(
            f"{len(facts['failed'])} of {len(names)} runs failed: {', '.join(facts['failed'])}"
        )


def combine(values: list[str]) -> list[list[str]]:
    """Return every combination as a list of overrides; commas inside brackets do not separate values."""
    choices = []
    for text in values:
        key, equals, rest = text.partition("=")
        if not equals:
            raise RecipeError(f"{text!r}: expected key=a,b, such as optimizer.lr=1e-4,3e-4")
        choices.append([f"{key}={value}" for value in split_outside_brackets(rest)])
    found = [list(one) for one in itertools.product(*choices)]
    if len(found) > _MOST:
        sizes = " × ".join(str(len(one)) for one in choices)
        raise RecipeError(
            f"sweep: {sizes} = {len(found):,} runs, over {_MOST:,}. Nearest: fewer values"
        )
    return found


def split_outside_brackets(text: str) -> list[str]:
    """Split text at commas outside brackets: `1,[2,3],{a: 4, b: 5}` gives three values."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _planned(loaded: Recipe, site: Site, to: str, dry_run: bool, force: bool) -> Plan:
    if to == "slurm":
        loaded = on_site(loaded, site)
    refuse_secrets(loaded, Secrets(os.environ))
    if not dry_run:
        if to == "slurm":
            refuse_without("slurm", loaded)
        prepare_data(loaded)
    plan = make_plan(loaded, site=facts_of(site))
    refuse_what_does_not_fit(plan, force, as_json=False)
    return plan


def _one_after_the_other(
    base: Path, names: list[str], recipe: str, combinations: list[list[str]], options: list[str]
) -> dict[str, list[str]]:
    """Call `drumline run` for each, also after one has failed; then write a report of all."""
    failed = []
    for name, overrides in zip(names, combinations, strict=True):
        print(f"\n{name}  {shlex.join(overrides)}", file=sys.stderr)
        command = [
            sys.executable,
            "-P",
            "-m",
            "drumline.cli",
            "run",
            recipe,
            *overrides,
            "--run-dir",
            str(base / name),
            *options,
        ]
        done = subprocess.run(command, check=False)
        if done.returncode:
            failed.append(name)
    logged = [read_logged(str(base / n)) for n in names if (base / n / "record.json").is_file()]
    if logged:
        write_text(base / "report.html", write_report(logged))
    return {"runs": [str(base / name) for name in names], "failed": failed}


def _check_one_size(plans: list[Plan]) -> None:
    sizes = sorted({_size_words(plan) for plan in plans})
    if len(sizes) > 1:
        raise PlanError(
            f"sweep: its runs need {', '.join(sizes)}, and an array has one size. "
            "Nearest: the same batch.gpus and cluster.nodes in all, or --to local"
        )


def _size_words(plan: Plan) -> str:
    nodes = plan.recipe.cluster.nodes
    if isinstance(nodes, NodeRange):
        return f"batch.gpus {plan.batch.gpus} on {nodes.min} to {nodes.max} nodes"
    plural = "s" if plan.batch.nodes > 1 else ""
    return f"batch.gpus {plan.batch.gpus} on {plan.batch.nodes} node{plural}"


def _as_array(
    base: Path, names: list[str], plans: list[Plan], site: Site, at_most: int | None
) -> dict[str, list[str]]:
    """Create all run folders, then submit one job array."""
    folders = []
    for name, plan in zip(names, plans, strict=True):
        made = run_folder.create(plan.recipe, base / name)
        prepare_folder(plan, site, made, Secrets(os.environ))
        folders.append(made)
    write_text(
        base / SCRIPT, render_script(plans[0], site, batch_of(plans[0], folders, at_most=at_most))
    )
    job = slurm.submit(base / SCRIPT)
    jobs = [f"{job}_{number}" for number in range(len(folders))]
    for made, one in zip(folders, jobs, strict=True):
        made.add_job({"target": "slurm", "id": one if len(jobs) > 1 else job, "submitted": now()})
    return {"runs": [str(made.path) for made in folders], "jobs": [job]}


def _next_folder(runs: Path, name: str) -> Path:
    number = 1
    while (runs / f"{name}-sweep-{number}").exists():
        number += 1
    return runs / f"{name}-sweep-{number}"


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("sweep")(sweep_command)
