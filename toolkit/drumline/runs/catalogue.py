"""Lists the run folders in a folder with state, progress and results."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from drumline.errors import RunError, RunFolderError
from drumline.metrics_file import last_step_line
from drumline.runs.folder import RunFolder
from drumline.runs.health import State, state_of


@dataclass(frozen=True)
class RunRow:
    """Summary of a run: last step's `loss`, last attempt's `split` (per_device, gpus, accumulation)."""

    run: str
    recipe: str
    state: State
    step: int
    total: int | None
    loss: float | None
    effective: int | None
    split: list[int]
    attempts: int
    created: str
    age_s: float
    reproduces: str | None
    verdict: str | None


def list_runs(folder: Path, report: Callable[[str], None]) -> list[RunRow]:
    """List the run folders directly in `folder`, newest first; RunFolderError if it is not a folder.

    `report` gets one line for each folder whose record cannot be read.
    """
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: is not a folder. Nearest: drumline run, or another folder")
    rows = []
    for path in sorted(folder.glob("*/record.json")):
        try:
            rows.append(_row(RunFolder(path.parent)))
        except (RunError, RunFolderError) as error:
            report(str(error))
    return sorted(rows, key=lambda row: row.age_s)


def _row(folder: RunFolder) -> RunRow:
    record = folder.read_record()
    attempts, plan = record["attempts"], record.get("plan") or {}
    line = last_step_line(folder.metrics_file) or {}
    created = record.get("created") or ""
    return RunRow(
        run=str(folder.path),
        recipe=record["recipe"]["recipe"],
        state=state_of(folder, attempts),
        step=line.get("step", 0),
        total=(plan.get("steps") or {}).get("total"),
        loss=line.get("loss"),
        effective=(plan.get("batch") or {}).get("effective"),
        split=list(attempts[-1]["split"].values()) if attempts else [],
        attempts=len(attempts),
        created=created,
        age_s=time.time() - datetime.fromisoformat(created).timestamp() if created else 0.0,
        reproduces=(record.get("parent") or {}).get("run"),
        verdict=(record.get("reproduced") or {}).get("verdict"),
    )
