"""Measured and predicted peak memory in an attempt's entry of the record."""

from pathlib import Path
from typing import Any

from drumline.errors import RunFolderError
from drumline.memory.calibration import TOTALS, Pair
from drumline.plan.model import Plan
from drumline.rank_files import RankFiles
from drumline.runs.folder import open_run


def memory_entry(plan: Plan, ranks: list[RankFiles]) -> dict[str, Any]:
    """Peak memory in bytes: predicted (expected and high), measured (maximum over ranks); None on a CPU."""
    memory = plan.memory
    predicted = None
    if memory.allocated and memory.reserved and memory.device:
        totals = {name: getattr(memory, name) for name in TOTALS}
        predicted = {name: three.expected for name, three in totals.items()}
        predicted |= {f"{name}_high": three.high for name, three in totals.items()}
    found = [peaks for files in ranks if (peaks := (files.outcome() or {}).get("memory"))]
    measured = {name: max(peaks[name] for peaks in found) for name in TOTALS} if found else None
    return {"method": memory.method, "phase": memory.peak_phase, "predicted": predicted,
            "measured": measured}  # fmt: skip


def pairs_of(run: Path) -> list[Pair]:
    """Pairs of predicted and measured peaks of a run's attempts, without those that ran out of memory."""
    folder = open_run(run)
    pairs = []
    for attempt in folder.read_record()["attempts"]:
        memory = attempt.get("memory") or {}
        whole = memory.get("predicted") and memory.get("measured")
        if not whole or attempt.get("kind") == "OutOfMemory":
            continue
        recipe = attempt.get("recipe") or folder.read_record()["recipe"]
        gpu = recipe["cluster"]["gpu"]
        pairs.append(
            Pair(
                run=str(run),
                gpu=gpu["name"] if isinstance(gpu, dict) else gpu,
                strategy=recipe["strategy"]["name"],
                predicted={name: memory["predicted"][name] for name in TOTALS},
                measured=memory["measured"],
                time=_time_ratio(attempt.get("time")),
            )
        )
    return pairs


def _time_ratio(entry: dict[str, float | None] | None) -> float | None:
    """Measured over planned seconds of a step; None where an attempt lacks one of them."""
    planned, measured = (entry or {}).get("planned_s"), (entry or {}).get("measured_s")
    return measured / planned if planned and measured else None


def all_pairs(runs: list[Path]) -> list[Pair]:
    """Pairs of all these runs; RunFolderError if there are none."""
    pairs = [pair for run in runs for pair in pairs_of(run)]
    if not pairs:
        raise RunFolderError(
            f"{', '.join(map(str, runs))}: no attempt has logged real peaks of a GPU beside a prediction"
        )
    return pairs
