"""`drumline attend RUN`: supervises a run from inside its job.

A Slurm job starts it on its first node, other clusters on every node. Each start plans again for the nodes
that the job got, at the same effective batch.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from drumline.cli.options import TrustCode
from drumline.recipe.load import load_recipe
from drumline.runs.folder import RunFolder, open_run
from drumline.session import members
from drumline.session.attend import supervise_in_slurm, supervise_members
from drumline.session.trust import refuse_foreign_code
from drumline_launchers.node import node_number


def attend_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="Without Slurm: the number of nodes.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Where to take the run from, if it is not there yet."),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Inside a job: start or resume the run, on the nodes that the job got.

    Example: drumline attend runs/mine-1
    """
    folder = RunFolder(run.absolute())
    number = node_number(os.environ) if nodes else 0
    if number:
        raise typer.Exit(members.follow(folder, number))
    if source:
        members.adopt(source.expanduser(), folder)
    open_run(run)
    if not source and "SLURM_JOB_ID" not in os.environ:
        refuse_foreign_code(load_recipe(str(folder.recipe_file)), str(run), trust_code)
    if folder.read_record()["outcome"] == "finished":
        print(f"{run}: this run is finished")
        if nodes:
            members.end(folder, 0)
        return
    exit_code = supervise_members(folder, nodes) if nodes else supervise_in_slurm(folder)
    raise typer.Exit(exit_code)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("attend", hidden=True)(attend_command)
