"""metrics.jsonl: a line for every step, buffered; each step stands there once."""

import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """Written by rank 0. Lines are held until `flush`, which the loop calls when it logs or saves."""

    def __init__(self, path: Path, resume_at: int) -> None:
        self._path = path
        self._waiting: list[str] = []
        if path.exists():
            _keep_until(path, resume_at)
        self._file = path.open("a", encoding="utf-8")

    def add(self, **values: Any) -> None:
        """One line; numbers that are not finite become null."""
        self._waiting.append(json.dumps({name: _finite(value) for name, value in values.items()}))

    def flush(self) -> None:
        """Write the lines held so far."""
        if self._waiting:
            self._file.write("\n".join(self._waiting) + "\n")
            self._file.flush()
            self._waiting.clear()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a torn last one is left out."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    result = []
    for line in lines:
        try:
            result.append(json.loads(line))
        except ValueError:
            continue
    return result


def _keep_until(path: Path, step: int) -> None:
    """Drop lines after the checkpoint that the run resumes from, and a torn last line."""
    kept = [json.dumps(line) for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_suffix(".part")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
