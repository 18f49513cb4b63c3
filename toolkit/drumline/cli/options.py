"""Arguments and options that several commands take, each with its help."""

import json
from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A file or a shipped name.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="optimizer.lr=1e-3 …")
]
Gpus = Annotated[
    int | None, typer.Option("--gpus", min=1, help="Re-split over N GPUs, same batch.")
]
GpuType = Annotated[str | None, typer.Option("--gpu", help="Re-split on this kind of GPU.")]
FromRun = Annotated[
    str | None,
    typer.Option("--from", metavar="RUN[@STEP]", help="Begin from that run's checkpoint."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Train although the plan does not fit.")]
SlurmTime = Annotated[
    str | None, typer.Option("--time", help="Slurm: this job's limit, instead of the site's.")
]
SlurmPartition = Annotated[str | None, typer.Option("--partition", help="Slurm: this job's.")]
SlurmAccount = Annotated[str | None, typer.Option("--account", help="Slurm: this job's.")]
SlurmQos = Annotated[str | None, typer.Option("--qos", help="Slurm: this job's.")]
Hold = Annotated[bool, typer.Option("--hold", help="Slurm: submitted, but not started.")]
SiteOfRun = Annotated[
    Path | None, typer.Option("--site", help="Instead of the site that it was submitted with.")
]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run the Python that a run folder names.")
]
Tolerance = Annotated[
    float, typer.Option("--tolerance", min=0.0, help="On losses, and on the norm of the weights.")
]
RunFolderArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


def with_from(from_run: str | None, overrides: list[str] | None) -> list[str] | None:
    """The overrides with those of `--from RUN[@STEP]` before them."""
    if from_run is None:
        return overrides
    run, at, step = from_run.rpartition("@")
    if not (at and step.isdigit()):
        run, step = from_run, "null"
    found = [f"start_from.run={json.dumps(run)}", f"start_from.step={step}"]
    found.append("start_from.training_sha256=null")  # a logged recipe states that of its own parent
    return [*found, *(overrides or [])]
