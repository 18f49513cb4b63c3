"""Run folders made without training, for what reads them."""

import json
from pathlib import Path
from typing import Any

from conftest import tiny_recipe
from drumline.plan.resolve import resolve
from drumline.plan.world import World
from drumline.recipe.load import validate
from drumline.runs import folder as run_folder
from drumline.runs.folder import RunFolder
from drumline.runs.record import new_record
from drumline.secrets import Secrets


def step_line(step: int, loss: float | None = None) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "loss": 3.0 / step if loss is None else loss, "lr": 0.1 / step, "grad_norm": 1.0 + step,
            "samples": 12 * step, "weight": 12.0, "digest": f"{step:016x}", "seconds": 0.1 / 3, "samples_per_s": 7.0,
            "tokens_per_s": 7.0, "mfu": None, "skipped": False}  # fmt: skip


def make_run(path: Path, lines: list[dict[str, Any]], **logging: Any) -> RunFolder:
    """A run folder as its supervisor sees it, with these lines of metrics."""
    recipe = validate(tiny_recipe(logging=logging), "r")
    plan = resolve(recipe, World(samples=10000, fingerprint="f", problems=[]))
    folder = run_folder.create(recipe, path)
    folder.write_record(new_record(plan, ["drumline"], Secrets({})))
    write_lines(folder, lines)
    return folder


def write_lines(folder: RunFolder, lines: list[dict[str, Any]]) -> None:
    folder.metrics_file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
