"""Files in a run's folder about the commands that its checkpoints are owed (`evaluation.after`).

after/step-00000500/NAME.json    how the command ended and its numbers; written once, so it is not run again
after/step-00000500/NAME.log     what it printed
after/step-00000500/NAME.pid     the process, while it runs
after/step-00000500/NAME.told    its numbers are in metrics.jsonl
"""

import contextlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from drumline.files import read_json, write_json

_STEP = re.compile(r"^step-(\d{8,})$")


class AfterFiles:
    """The folder `after` of a run."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "after"

    def file(self, step: int, name: str, suffix: str) -> Path:
        """A file of one command, whose folder is made where it does not exist."""
        folder = self._folder / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.{suffix}"

    def is_done(self, step: int, name: str) -> bool:
        """Whether the command of this step has ended."""
        return (self._folder / f"step-{step:08d}" / f"{name}.json").is_file()

    def finish(self, step: int, name: str, result: dict[str, Any]) -> None:
        """Write how a command ended, in one rename."""
        write_json(self.file(step, name, "json"), result)

    def results(self) -> list[tuple[int, str, dict[str, Any]]]:
        """Step, name and result of every command that has ended, by step."""
        found = []
        for path in self._folder.glob("step-*/*.json"):
            step = _STEP.match(path.parent.name)
            with contextlib.suppress(OSError, ValueError):
                result = read_json(path)
                if step and isinstance(result, dict):
                    found.append((int(step[1]), path.stem, result))
        return sorted(found, key=lambda one: one[:2])

    def untold(self, reached: int) -> list[tuple[int, str, dict[str, Any]]]:
        """The results of steps that the metrics have reached, and which are not in them yet."""
        return [
            (step, name, result)
            for step, name, result in self.results()
            if step <= reached and not self.file(step, name, "told").exists()
        ]

    def told(self, step: int, name: str) -> None:
        """Mark a result as written to the metrics."""
        self.file(step, name, "told").touch()

    def forget_after(self, step: int) -> None:
        """Unmark the results of later steps, whose lines a resumed run drops."""
        for path in self._folder.glob("step-*/*.told"):
            found = _STEP.match(path.parent.name)
            if found and int(found[1]) > step:
                path.unlink(missing_ok=True)


def metrics_of(name: str, result: dict[str, Any]) -> dict[str, float]:
    """A result as values of a metrics line: `after/NAME/KEY`, and the exit code."""
    numbers = result.get("numbers") or {}
    found = {f"after/{name}/{key}": value for key, value in numbers.items()}
    return {**found, f"after/{name}/exit_code": result.get("exit_code", -1)}


def numbers_in(path: Path, log: Path) -> dict[str, float]:
    """The numbers that a command wrote to the file that it was given, else in the last line of its output.

    Of a JSON object, nested ones by names with a slash; what is no number is left out.
    """
    text = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = path.read_text(encoding="utf-8")
    if not text.strip():
        with contextlib.suppress(OSError):
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            text = lines[-1] if lines else ""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return dict(_flat(found, "")) if isinstance(found, dict) else {}


def _flat(value: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict):
            found += _flat(item, f"{name}/")
        elif isinstance(item, int | float) and not isinstance(item, bool):
            with contextlib.suppress(OverflowError):  # of a whole number beyond float64
                found += [(name, item)] if math.isfinite(item) else []
    return found


def environment(run: Path, checkpoint: Path, step: int, numbers: Path) -> dict[str, str]:
    """The variables of a command."""
    return {
        **os.environ,
        "DRUMLINE_RUN": str(run),
        "DRUMLINE_CHECKPOINT": str(checkpoint),
        "DRUMLINE_STEP": str(step),
        "DRUMLINE_NUMBERS": str(numbers),
    }
