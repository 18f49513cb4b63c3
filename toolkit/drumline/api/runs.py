"""Runs: started, read, and reproduced."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from drumline.api.commands import run_command
from drumline.api.planning import Overrides, RecipeLike, ShownPlan, override_texts, recipe_of
from drumline.metrics_file import Kind, read_metrics
from drumline.recipe.schema import Recipe
from drumline.runs import folder as run_folder

if TYPE_CHECKING:
    import pandas as pd

_STOPPED, _NOT_EQUAL = 75, 5


@dataclass(frozen=True)
class Checkpoint:
    """A saved state: its optimizer step, and its folder, which holds safetensors files."""

    step: int
    path: Path


class Run:
    """A run's folder: recipe, plan, metrics, checkpoints and record; read when it is asked for."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """RunFolderError if the folder is not a run's."""
        self._folder = run_folder.open_run(Path(folder))

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    @property
    def record(self) -> dict[str, Any]:
        """record.json: recipe, code, versions, hardware, data, attempts and final weights, as it is now."""
        return self._folder.read_record()

    @property
    def outcome(self) -> str | None:
        """How the run ended, such as `finished` or `stopped`; None while it trains."""
        return self.record.get("outcome")

    @cached_property
    def plan(self) -> ShownPlan:
        """The plan of the newest attempt."""
        return ShownPlan.of(self._folder.latest_plan())

    @property
    def recipe(self) -> Recipe:
        """The recipe of that plan."""
        return self.plan.recipe

    @property
    def metrics(self) -> "pd.DataFrame":
        """One row for each optimizer step, the index: `loss`, `lr`, `grad_norm` and what else is logged."""
        return self._frame(Kind.STEP)

    @property
    def evaluations(self) -> "pd.DataFrame":
        """One row for each evaluation, by step: `eval/loss` and the task's metrics."""
        return self._frame(Kind.EVALUATION)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints that are kept, oldest first."""
        from drumline.checkpoint.manifest import step_of
        from drumline.checkpoint.retention import find_checkpoints

        found = [(step_of(path), path) for path in find_checkpoints(self._folder.checkpoints)]
        return [Checkpoint(step, path) for step, path in sorted(found) if step is not None]

    def _frame(self, kind: Kind) -> "pd.DataFrame":
        import pandas as pd

        lines = [line for line in read_metrics(self._folder.metrics_file) if line["kind"] == kind]
        frame = pd.DataFrame(lines or {"kind": [], "step": []})
        return frame.drop(columns="kind").set_index("step")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        metrics = self.metrics
        rows = {
            "outcome": self.outcome or "trains",
            "steps": f"{len(metrics):,} of {self.plan.steps.total:,}",
            "loss": f"{metrics['loss'].iloc[-1]:.4g}" if len(metrics) else "",
            "batch": f"{self.plan.batch.effective:,}",
            "checkpoints": ", ".join(f"{one.step:,}" for one in self.checkpoints),
        }
        cells = "".join(
            f"<tr><th>{key}</th><td>{escape(value)}</td></tr>" for key, value in rows.items()
        )
        return f"<table><caption>{escape(str(self.path))}</caption>{cells}</table>"


@dataclass(frozen=True)
class Reproduction:
    """A run trained again, and how it compares: `identical`, `equal` within the tolerance, or `diverged`.

    `loss_error`: the largest |a - b| / max(1, |a|) of a step's loss. `weights_error`: norm of the difference
    of the final weights by that of the original's, where both have them. `details`: all that was compared.
    """

    verdict: Literal["identical", "equal", "diverged"]
    words: str
    run: Run
    loss_error: float
    weights_error: float | None
    details: dict[str, Any] = field(repr=False)

    @property
    def is_reproduced(self) -> bool:
        """Whether it is identical, or equal within the tolerance."""
        return self.verdict != "diverged"


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Open a run's folder; RunFolderError if it is none."""
    return Run(folder)


def run(
    recipe: RecipeLike,
    overrides: Overrides = (),
    *,
    run_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
    trust_code: bool = False,
    quiet: bool = False,
) -> Run:
    """Train on this machine with the recipe's launcher, in processes of their own, and wait for the end.

    Args:
        recipe: as for `plan`.
        overrides: as for `plan`.
        run_dir: the run's folder, new or empty; else `runs/NAME-N` in the current folder.
        force: train although the plan does not fit.
        trust_code: run the Python that a run folder's recipe names.
        quiet: do not pass the progress on to stderr.

    Returns:
        The run. One that an interrupt has stopped has the outcome `stopped`, and can be resumed.

    Raises:
        DrumlineError: nothing was started. DoesNotFit: it would run out of memory. RunError: the training
            failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["run", _as_file(recipe, Path(folder)), *override_texts(overrides)]
        words += [] if run_dir is None else ["--run-dir", os.fspath(run_dir)]
        words += ["--force"] if force else []
        words += ["--trust-code"] if trust_code else []
        found = run_command(words, (_STOPPED, 130), quiet)
    return Run(found["run"])


def reproduce(
    what: Run | str | os.PathLike[str],
    overrides: Overrides = (),
    *,
    gpus: int | None = None,
    gpu: str | None = None,
    steps: int | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    tolerance: float = 1e-5,
    trust_code: bool = False,
    quiet: bool = False,
) -> Reproduction:
    """Train again here from a run's record, at another split if asked, and compare step by step.

    Args:
        what: a run, its folder, its recipe.yaml, a checkpoint, or `wandb:ENTITY/PROJECT/ID`.
        overrides: of the split, the cluster, the launcher, and where the data lie; never of the training.
        gpus: split over so many GPUs, at the same effective batch.
        gpu: of this kind.
        steps: only the first so many.
        run_dir: the new run's folder, new or empty.
        tolerance: the largest error of a loss, and of the norm of the final weights, that counts as equal.
        trust_code: run the Python that the record names.
        quiet: do not pass the progress on to stderr.

    Returns:
        The verdict with the new run; `diverged` is no error.

    Raises:
        DrumlineError: it could not be trained again. RunError: the training failed.
    """
    words = [
        "reproduce",
        os.fspath(what.path if isinstance(what, Run) else what),
        *override_texts(overrides),
    ]
    for flag, value in (
        ("--gpus", gpus),
        ("--gpu", gpu),
        ("--steps", steps),
        ("--run-dir", run_dir),
    ):
        words += [] if value is None else [flag, str(value)]
    words += ["--tolerance", repr(tolerance), *(["--trust-code"] if trust_code else [])]
    found = run_command(words, (_NOT_EQUAL,), quiet)
    return Reproduction(
        verdict=found["verdict"],
        words=found["words"],
        run=Run(found["run"]),
        loss_error=found["loss_error"],
        weights_error=found["weights_error"],
        details=found,
    )


def _as_file(recipe: RecipeLike, folder: Path) -> str:
    """What the command line can be given: a recipe of keys and values becomes a file."""
    if not isinstance(recipe, Mapping | Recipe):
        return os.fspath(recipe)
    from drumline.recipe import yaml12

    path = folder / "recipe.yaml"
    path.write_text(yaml12.dump(recipe_of(recipe).model_dump(by_alias=True)), encoding="utf-8")
    return str(path)
