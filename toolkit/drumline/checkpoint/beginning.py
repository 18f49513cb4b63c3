"""Says why a run may not begin at step 1 again: checkpoints were saved, and none of them is there."""

from pathlib import Path

from drumline.checkpoint.retention import find_checkpoints, find_set_aside
from drumline.metrics_file import last_line


def why_not_anew(checkpoints: Path, metrics: Path) -> str:
    """The reason why beginning at step 1 would give up saved work; "" if nothing was ever saved.

    `checkpoints`: the run's folder of checkpoints; `metrics`: its metrics.jsonl, which records each save.
    """
    if not checkpoints.is_dir():
        return f"{checkpoints}: it is gone. Nearest: put it back"
    if find_checkpoints(checkpoints):
        return ""
    if aside := find_set_aside(checkpoints):
        return (
            f"{checkpoints}: no checkpoint is sound; they are kept as {', '.join(aside)}. "
            "Nearest: put a sound copy in their place"
        )
    saved = last_line(metrics, lambda line: "checkpoint/saved" in line)
    if saved:
        return (
            f"{checkpoints}: it is empty, and {metrics.name} says that step {saved['step']:,} was saved. "
            "Nearest: put that checkpoint back"
        )
    return ""
